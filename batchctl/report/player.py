"""A schedule played against durations: what starts, what is skipped, and how often it runs in the end."""

from __future__ import annotations

import heapq
import statistics
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta, tzinfo
from itertools import islice, pairwise, takewhile
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from batchctl.guard.gap import earliest_start, refused
from batchctl.schedule.cron import inside_hours, next_inside_hours
from batchctl.schedule.times import EPOCH, MOST_TIMES, CronTime, marked_times, period, repeating_times

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from batchctl.guard.gap import GapRule, Refusal

ESTIMATED_FROM = 10
"""How many of the latest successes the estimate is the median of."""
LONGEST = timedelta(days=60 * 365)
"""For how long the cadence is looked for; the 29th of February is a Sunday every 28 years."""


class Length(NamedTuple):
    """How long a run takes, and whether it then ends as a success."""

    duration: timedelta
    success: bool = True


@dataclass(frozen=True)
class Job:
    """What cron starts: a batch, or a group of it with a schedule of its own.

    Args:
        name: The batch or batch/group; None for one that is not configured.
        schedule: Its cron expression.
        rule: How far apart its starts have to be.
        hours: In which hours it may start.
        lengths: How long its runs take, in turn, again and again.
        counts_for: Jobs for which its starts and completions count.
        known: Durations of successes before the first that is played, in seconds.
        part: Seconds that a group's steps take in a run of the whole batch; its estimate until it has run alone.
        part_known: Whether the whole batch succeeded before the first run that is played.
    """

    name: str | None
    schedule: str
    rule: GapRule
    hours: str
    lengths: tuple[Length, ...]
    counts_for: tuple[str | None, ...]
    known: tuple[float, ...] = ()
    part: float | None = None
    part_known: bool = False


@dataclass(frozen=True)
class Event:
    """A cron time and what comes of it.

    Args:
        job: The job.
        scheduled_at: The cron time.
        action: Whether it starts or is skipped.
        reason: Of a skip.
        ends_at: When a run that starts ends.
        outcome: How it ends.
        next_eligible_at: From when on the job may start again, as far as is known then.
        daylight_saving: `missing` or `twice`, of local times.
        note: What that means, in words.
    """

    job: str | None
    scheduled_at: datetime
    action: Literal["start", "skip"]
    reason: str | None
    ends_at: datetime | None
    outcome: str | None
    next_eligible_at: datetime | None
    daylight_saving: Literal["missing", "twice"] | None
    note: str | None


@dataclass(frozen=True)
class Cadence:
    """How often a job runs in the end, were the clocks never changed.

    Args:
        job: The job.
        schedule: Its cron expression.
        cadence_seconds: The mean distance between two starts; None if there are fewer than two.
        shortest_seconds: The shortest of these distances.
        longest_seconds: The longest.
        scheduled_seconds: The mean distance between two cron times.
    """

    job: str | None
    schedule: str
    cadence_seconds: float | None
    shortest_seconds: float | None
    longest_seconds: float | None
    scheduled_seconds: float | None


class Player:
    """Lets cron times come one after another, and decides each as a start does.

    Args:
        jobs: What cron starts; at one and the same minute the first of them is first.
        timeout: What no run is longer than, and the estimate before the first success.
        zone: Of the hours.
    """

    def __init__(self, jobs: Sequence[Job], timeout: timedelta, zone: tzinfo) -> None:
        self._timeout = timeout
        self._zone = zone
        self._busy_until: datetime | None = None
        self._started: dict[str | None, datetime] = {}
        self._completed: dict[str | None, datetime] = {}
        self._opens: dict[str, datetime] = {}
        self._turns = {job.name: 0 for job in jobs}
        self._successes = {job.name: job.known[-ESTIMATED_FROM:] for job in jobs}
        self._whole_succeeded = False

    def meet(self, job: Job, time: CronTime) -> Event:
        """Decide about a cron time: the guards in their order, as in reality."""
        now = time.at
        if self._busy_until is not None and now < self._busy_until:
            return self._event(job, time, "running", self._eligible(job))
        if not inside_hours(job.hours, now, self._zone):
            return self._event(job, time, "outside_hours", self._opening(job.hours, now))
        refusal = self._refusal(job)
        if refusal is not None and refused(refusal, now):
            return self._event(job, time, refusal.reason, refusal.next_eligible_at)
        ends_at, outcome = self._run(job, now)
        return replace(
            self._event(job, time, None, self._eligible(job)), action="start", ends_at=ends_at, outcome=outcome
        )

    def settled(self, jobs: Sequence[Job]) -> datetime | None:
        """Return from when on no earlier run refuses anything any more; None if there was none."""
        return max((until for job in jobs if (until := self._eligible(job)) is not None), default=None)

    def state(self, job: Job, now: datetime) -> tuple[Any, ...]:
        """Return all of the past that decides about the future of a job, instants as distances from now."""
        return (
            self._turns[job.name] % len(job.lengths),
            job.rule.gap_factor and (self._successes[job.name], self._whole_succeeded),
            *(now - found if (found := past.get(job.name)) else None for past in (self._started, self._completed)),
        )

    def _run(self, job: Job, now: datetime) -> tuple[datetime, str]:
        length = job.lengths[self._turns[job.name] % len(job.lengths)]
        self._turns[job.name] += 1
        cut = length.duration > self._timeout
        ends_at = now + min(length.duration, self._timeout)
        # Nobody asks for the completion while the run lasts, so it may be written down in advance.
        self._busy_until = ends_at
        for name in job.counts_for:
            self._started[name], self._completed[name] = now, ends_at
        if length.success and not cut:
            latest = (*self._successes[job.name], length.duration.total_seconds())
            self._successes[job.name] = latest[-ESTIMATED_FROM:]
            self._whole_succeeded |= job.part is None
        return ends_at, "timeout" if cut else "success" if length.success else "partial"

    def _opening(self, hours: str, now: datetime) -> datetime:
        # The same for every cron time until then.
        if hours not in self._opens or self._opens[hours] <= now:
            self._opens[hours] = next_inside_hours(hours, now, self._zone)
        return self._opens[hours]

    def _refusal(self, job: Job) -> Refusal | None:
        return earliest_start(
            job.rule,
            last_completed_at=self._completed.get(job.name),
            last_started_at=self._started.get(job.name),
            estimate=self._estimate(job),
        )

    def _estimate(self, job: Job) -> timedelta:
        if successes := self._successes[job.name]:
            return timedelta(seconds=statistics.median(successes))
        if job.part is not None and (job.part_known or self._whole_succeeded):
            return timedelta(seconds=job.part)
        return self._timeout

    def _eligible(self, job: Job) -> datetime | None:
        refusal = self._refusal(job)
        if refusal is None or self._busy_until is None:
            return self._busy_until
        return max(self._busy_until, refusal.next_eligible_at)

    def _event(self, job: Job, time: CronTime, reason: str | None, eligible: datetime | None) -> Event:
        return Event(job.name, time.at, "skip", reason, None, None, eligible, time.daylight_saving, time.note)


def play(jobs: Sequence[Job], timeout: timedelta, zone: tzinfo, begin: datetime, end: datetime) -> Iterator[Event]:
    """Play the cron times between two instants, the second outside; nothing ran before."""
    player = Player(jobs, timeout, zone)
    for time, _, job in _merged(jobs, [marked_times(job.schedule, begin, end, zone) for job in jobs]):
        yield player.meet(job, time)


def _merged(jobs: Sequence[Job], times: Sequence[Iterator[CronTime]]) -> Iterator[tuple[CronTime, int, Job]]:
    """Put the cron times of all jobs in order; at one and the same minute the first job is first."""

    def of_job(number: int) -> Iterator[tuple[CronTime, int, Job]]:
        return ((time, number, jobs[number]) for time in times[number])

    return heapq.merge(*(of_job(number) for number in range(len(jobs))), key=lambda each: (each[0].at, each[1]))


def cadences(jobs: Sequence[Job], timeout: timedelta, begin: datetime) -> tuple[Cadence, ...]:
    """Say how often each job runs in the end.

    The schedule is played, as if the clocks were never changed, until a start finds everything as an earlier one did:
    from then on all repeats, and that part is measured. If nothing repeats for very long, the second half is.

    Args:
        jobs: As for `play`.
        timeout: The same.
        begin: Local wall time of the first day, as if it were UTC.
    """
    jobs = [replace(job, rule=replace(job.rule, zone=UTC)) for job in jobs]
    player = Player(jobs, timeout, UTC)
    length = period([job.schedule for job in jobs])
    seen: dict[tuple[Any, ...], datetime] = {}
    starts: dict[str | None, list[datetime]] = {job.name: [] for job in jobs}
    times: dict[str | None, list[datetime]] = {job.name: [] for job in jobs}
    settled = begin
    streams = [(CronTime(at) for at in repeating_times(job.schedule, begin)) for job in jobs]
    merged = takewhile(lambda each: each[0].at < begin + LONGEST, _merged(jobs, streams))
    for time, _, job in islice(merged, MOST_TIMES):
        now = time.at
        if now > settled + 2 * length:
            # Nothing forbids a start but the hours, and no cron time is inside them.
            break
        event = player.meet(job, time)
        if event.action == "start":
            state = ((now - EPOCH) % length, job.name, *(player.state(each, now) for each in jobs))
            if since := seen.get(state):
                return tuple(
                    _measured(job, _closed(starts[job.name], since, now), _closed(times[job.name], since, now))
                    for job in jobs
                )
            seen[state] = now
            settled = player.settled(jobs) or now
            starts[job.name].append(now)
        times[job.name].append(now)
    return tuple(_measured(job, _second_half(starts[job.name]), _second_half(times[job.name])) for job in jobs)


def _closed(instants: Sequence[datetime], since: datetime, until: datetime) -> list[datetime]:
    """Return the instants of the part that repeats, and the first of the next one."""
    inside = [instant for instant in instants if since <= instant < until]
    return [*inside, inside[0] + (until - since)] if inside else []


def _second_half(instants: list[datetime]) -> list[datetime]:
    return instants[len(instants) // 2 :] if len(instants) > 3 else instants  # noqa: PLR2004 - two distances at least


def _measured(job: Job, starts: Sequence[datetime], times: Sequence[datetime]) -> Cadence:
    distances = [(later - earlier).total_seconds() for earlier, later in pairwise(starts)]
    scheduled = [(later - earlier).total_seconds() for earlier, later in pairwise(times)]
    return Cadence(
        job.name,
        job.schedule,
        statistics.fmean(distances) if distances else None,
        min(distances, default=None),
        max(distances, default=None),
        statistics.fmean(scheduled) if scheduled else None,
    )
