"""What each guard says to a start, in the order in which they are asked: yes or no, until when, why."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from batchctl.config import Duration
from batchctl.guard.gap import earliest_start, gap_rule
from batchctl.guard.liveness import listed
from batchctl.guard.pause import lifted_by
from batchctl.logs import elapsed, shown
from batchctl.schedule.cron import inside_hours, next_inside_hours

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import tzinfo

    from batchctl.guard.gap import Refusal
    from batchctl.guard.liveness import Orphan
    from batchctl.report.configured import Job
    from batchctl.schedule.estimate import Estimate


@dataclass(frozen=True)
class GuardAnswer:
    """What one guard says: whether it allows a start, from when on it does, and why."""

    guard: str
    allows: bool
    until: datetime | None
    text: str


@dataclass(frozen=True)
class RunSeen:
    """A run in progress, or one that died and still has its claim.

    Args:
        pid: Process id of batchctl.
        host: Name of the machine.
        started_at: Since when it runs.
        estimate: How long it is taken to run; None for an aggregation.
        here: Whether it is of this state directory.
        claimed_until: Until when a run that died elsewhere has to be believed; None for one that lives.
    """

    pid: int
    host: str
    started_at: datetime
    estimate: Estimate | None
    here: bool
    claimed_until: datetime | None = None

    @property
    def dead(self) -> bool:
        """Tell whether only its claim is left of it."""
        return self.claimed_until is not None

    @property
    def estimated_end(self) -> datetime | None:
        """Return when its estimate is over, which may be past."""
        return self.started_at + self.estimate.duration if self.estimate and not self.dead else None

    def died_with_claim(self, until: datetime) -> RunSeen:
        """Return it as one that died."""
        return replace(self, claimed_until=until)

    def taken_to_end(self, now: datetime) -> datetime:
        """Return when it is taken to be out of the way; one that exceeds its estimate, now."""
        return max(self.claimed_until or self.estimated_end or now, now)

    def overdue(self, now: datetime) -> bool:
        """Tell whether it exceeds its estimate by half."""
        limit = self.estimate.overdue_after if self.estimate and not self.dead else None
        return limit is not None and now - self.started_at > limit


@dataclass(frozen=True)
class Seen:
    """A job as it is seen at an instant.

    Args:
        job: The job.
        now: That instant, by the database's clock.
        run: What keeps it, or the batch that it belongs to, busy.
        counts: Whether that run is one of this job, so that its end will be a completion.
        orphans: What earlier runs of this host left alive, as far as it forbids a start.
        paused: What is paused of all that would start with it.
        estimate: How long it is taken to run; None for an aggregation.
        last_completed_at: None if it never completed.
        last_started_at: None if it never started, as far as `every` goes.
    """

    job: Job
    now: datetime
    run: RunSeen | None
    counts: bool
    orphans: tuple[Orphan, ...]
    paused: tuple[str, ...]
    estimate: Estimate | None
    last_completed_at: datetime | None
    last_started_at: datetime | None

    @property
    def own_run(self) -> RunSeen | None:
        """Return the run in progress if it is one of this job."""
        return self.run if self.counts else None

    def refusal(self, zone: tzinfo, *, gap: bool = True, every: bool = True) -> Refusal | None:
        """Say what gap and `every`, or one of them, forbid; the end of a run in progress is estimated."""
        if self.job.batch is None or self.estimate is None:
            return None
        own = self.own_run
        return earliest_start(
            gap_rule(self.job.batch, self.job.group, zone),
            last_completed_at=(own.taken_to_end(self.now) if own else self.last_completed_at) if gap else None,
            last_started_at=self.last_started_at if every else None,
            estimate=self.estimate.duration,
        )


def answers(seen: Seen, at: datetime, zone: tzinfo) -> Iterator[GuardAnswer]:
    """Ask each guard.

    Args:
        seen: The job.
        at: When the start would be; what is not known of that time is taken to be as it is now.
        zone: For hours, local days and shown times.
    """
    job, run = seen.job, seen.run
    here = run is None or run.here
    yield _busy("lock", run if here else None, seen, at, zone)
    if job.batch is not None:
        left = f"left alive by an earlier run: {listed(seen.orphans)}; `batchctl orphans --kill` ends them"
        yield GuardAnswer("orphans", not seen.orphans, None, left if seen.orphans else "none")
        yield _busy("elsewhere", None if here else run, seen, at, zone)
    yield GuardAnswer("enabled", job.enabled, None, "enabled" if job.enabled else "disabled in the configuration")
    paused = f"paused: {lifted_by(seen.paused)}" if seen.paused else "not paused"
    yield GuardAnswer("paused", not seen.paused, None, paused)
    yield _hours(job.hours, at, zone)
    if job.batch is not None:
        yield _gap(seen, at, zone)
        yield _every(seen, at, zone)


def _busy(guard: str, run: RunSeen | None, seen: Seen, at: datetime, zone: tzinfo) -> GuardAnswer:
    if run is None:
        return GuardAnswer(guard, True, None, "free" if guard == "lock" else "no run on another host")
    now = seen.now
    age = elapsed(max(now - run.started_at, timedelta(0)))
    who = f"pid {run.pid} on {run.host}, since {shown(run.started_at, zone)}, {age}"
    # What runs now does not allow a start now, however long it should have been over.
    end = run.taken_to_end(now)
    allows = at > now and end <= at
    if run.claimed_until is not None:
        until = shown(run.claimed_until, zone)
        return GuardAnswer(guard, allows, end, f"died ({who}), but has its claim until {until}; see `batchctl recover`")
    if run.estimate is None or run.estimated_end is None:
        # The next tick does what this one leaves.
        return GuardAnswer(guard, at > now, None, f"running: {who}")
    when = shown(run.estimated_end, zone)
    if run.estimated_end > now:
        text = f"running: {who}; estimated to end at {when}, after {run.estimate}"
    else:
        text = f"running: {who}; should have ended at {when}, after {run.estimate}; taken to end now"
    return GuardAnswer(guard, allows, end, text)


def _hours(hours: str, at: datetime, zone: tzinfo) -> GuardAnswer:
    if not hours:
        return GuardAnswer("hours", True, None, "any")
    if inside_hours(hours, at, zone):
        return GuardAnswer("hours", True, None, f"inside {hours}")
    first = next_inside_hours(hours, at, zone)
    return GuardAnswer("hours", False, first, f"outside {hours}; next at {shown(first, zone)}")


def _gap(seen: Seen, at: datetime, zone: tzinfo) -> GuardAnswer:
    refusal = seen.refusal(zone, every=False)
    if refusal is None or seen.job.batch is None:
        return GuardAnswer("gap", True, None, "nothing completed before")
    rule = gap_rule(seen.job.batch, seen.job.group, zone)
    apart = f"at least {Duration(seconds=refusal.gap.total_seconds())} apart"
    if refusal.gap > rule.min_gap:
        apart += f": {rule.gap_factor:g} times {seen.estimate}"
    completed = f"{'estimated to complete' if seen.counts else 'completed'} {shown(refusal.since, zone)}"
    return _dated("gap", refusal, at, zone, f"{completed}, {apart}")


def _every(seen: Seen, at: datetime, zone: tzinfo) -> GuardAnswer:
    assert seen.job.batch is not None  # noqa: S101 - asked for batches only
    every = gap_rule(seen.job.batch, seen.job.group, zone).every
    refusal = seen.refusal(zone, gap=False)
    if not every or refusal is None:
        return GuardAnswer("every", True, None, "never started" if every else "not configured")
    apart = str(Duration(seconds=every.total_seconds()))
    return _dated("every", refusal, at, zone, f"started {shown(refusal.since, zone)}, every {apart}")


def _dated(guard: str, refusal: Refusal, at: datetime, zone: tzinfo, why: str) -> GuardAnswer:
    until = refusal.next_eligible_at
    allows = until <= at
    return GuardAnswer(guard, allows, until, f"{'over since' if allows else 'until'} {shown(until, zone)} ({why})")
