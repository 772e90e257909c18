"""When a job will next start: the first cron time that every guard will allow."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from batchctl.report.guards import answers
from batchctl.schedule.cron import inside_hours, moved, next_inside_hours, next_time

if TYPE_CHECKING:
    from datetime import tzinfo

    from batchctl.report.configured import Job
    from batchctl.report.guards import GuardAnswer, Seen

MOST_CRON_TIMES = 10_000
"""After so many cron times that a guard refuses, the schedule and the hours are taken never to meet."""
LIFTED_BY_HAND = frozenset({"enabled", "paused", "orphans"})
"""Guards of which nobody knows when they will allow a start."""


@dataclass(frozen=True)
class NextStart:
    """The first cron time that every guard will allow.

    Args:
        job: The job.
        schedule: Its cron time; empty if it has none.
        at: The instant that is asked about.
        next_start_at: That cron time; None if there is none in sight.
        next_eligible_at: From when on every guard allows a start, also without cron; None if nobody knows.
        estimated: Whether a run in progress, of which only an estimate tells when it ends, is taken into account.
        moved: Whether the cron time names a local time that does not exist that day.
        guards: What each guard says at that instant.
    """

    job: str
    schedule: str
    at: datetime
    next_start_at: datetime | None
    next_eligible_at: datetime | None
    estimated: bool
    moved: bool
    guards: tuple[GuardAnswer, ...]


def next_start(seen: Seen, at: datetime, zone: tzinfo) -> NextStart:
    """Say when a job will start, seen from an instant on."""
    job, guards = seen.job, tuple(answers(seen, at, zone))
    refusing = [answer for answer in guards if not answer.allows]
    eligible = start = None
    if not any(answer.guard in LIFTED_BY_HAND for answer in refusing):
        # Hours come back each day; all others allow it from some time on.
        earliest = max([at, *(each.until for each in refusing if each.until and each.guard != "hours")])
        eligible = earliest if inside_hours(job.hours, earliest, zone) else next_inside_hours(job.hours, earliest, zone)
        start = _first(job, earliest, zone) if job.schedule else None
    return NextStart(
        job=job.name,
        schedule=job.schedule,
        at=at,
        next_start_at=start,
        next_eligible_at=eligible,
        estimated=seen.run is not None and seen.run.estimated_end is not None,
        moved=start is not None and moved(job.schedule, start, zone),
        guards=guards,
    )


def _first(job: Job, earliest: datetime, zone: tzinfo) -> datetime | None:
    # A cron time at the very instant counts, so the search begins just before it.
    time: datetime | None = earliest - timedelta(microseconds=1)
    for _ in range(MOST_CRON_TIMES):
        time = next_time(job.schedule, time, zone) if time else None
        if time is None or inside_hours(job.hours, time, zone):
            return time
    return None
