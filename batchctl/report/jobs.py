"""Every configured job: what it does now, when it may next start, and what each guard says to that."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta, tzinfo
from typing import TYPE_CHECKING, Any, NamedTuple

from batchctl.guard.gap import earliest_start, gap_rule, job_hours
from batchctl.guard.identity import ProcessIdentity, alive, boot_id
from batchctl.guard.lock import lock_path, read_holder
from batchctl.guard.pause import lifted_by
from batchctl.logs import elapsed, shown
from batchctl.schedule.cron import inside_hours, next_inside_hours, next_time

if TYPE_CHECKING:
    from collections.abc import Iterator

    from batchctl.clock import Clock
    from batchctl.config import Batch, Configuration, Rollup
    from batchctl.guard.gap import Refusal
    from batchctl.state.store import Store

MOST_CRON_TIMES = 10_000
"""After so many cron times that a guard refuses, the schedule and the hours are taken never to meet."""


@dataclass(frozen=True)
class JobStatus:
    """A job as `status` shows it."""

    job: str
    state: str
    last_started_at: datetime | None
    last_completed_at: datetime | None
    last_outcome: str | None
    next_eligible_at: datetime | None
    estimate_seconds: float | None
    pid: int | None
    host: str | None
    paused: tuple[str, ...]
    """What is paused and keeps the job from starting."""
    enabled: bool


@dataclass(frozen=True)
class GuardAnswer:
    """What one guard says: whether it allows a start now, from when on it does, and why."""

    guard: str
    allows: bool
    until: datetime | None
    text: str


@dataclass(frozen=True)
class NextStart:
    """The first cron time that every guard will allow; estimated if a run is in progress."""

    job: str
    schedule: str
    next_start_at: datetime | None
    estimated: bool
    guards: tuple[GuardAnswer, ...]


class _Running(NamedTuple):
    pid: int
    host: str
    started_at: datetime


class _Job(NamedTuple):
    name: str
    batch: Batch | None
    group: str | None
    rollup: Rollup | None
    grain: str | None

    @property
    def lock(self) -> str:
        top = self.name.partition("/")[0]
        return f"batch.{top}" if self.batch else f"rollup.{top}.{self.grain}"

    @property
    def enabled(self) -> bool:
        return (self.batch or self.rollup).enabled  # type: ignore[union-attr]  # one of the two is there

    @property
    def schedule(self) -> str:
        if self.rollup is not None:
            return self.rollup.schedule.get(self.grain or "", "")
        own = self.batch.group.get(self.group) if self.batch and self.group else None
        if self.group:
            return own.schedule if own else ""
        return self.batch.schedule if self.batch else ""

    @property
    def hours(self) -> str:
        return job_hours(self.batch, self.group) if self.batch else (self.rollup.hours if self.rollup else "")


def pausable(configuration: Configuration) -> tuple[str, ...]:
    """Name every job, and each rollup as a whole."""
    jobs = list(_configured(configuration))
    # A batch is a job itself; a rollup is only the name of its grains.
    return tuple(dict.fromkeys(name for job in jobs for name in (job.name.partition("/")[0], job.name)))


def _configured(configuration: Configuration) -> Iterator[_Job]:
    for name, batch in configuration.batches.items():
        yield _Job(name, batch, None, None, None)
        for group in batch.groups:
            yield _Job(f"{name}/{group}", batch, group, None, None)
    for name, rollup in configuration.rollups.items():
        for grain in rollup.grains:
            yield _Job(f"{name}/{grain}", None, None, rollup, grain)


class JobReader:
    """Reads the state of the configured jobs; changes nothing, and takes no lock that a start could miss."""

    def __init__(self, configuration: Configuration, store: Store, zone: tzinfo, clock: Clock) -> None:
        self._configuration = configuration
        self._store = store
        self._zone = zone
        self._clock = clock
        self._rows = {row.job: row for row in store.jobs()}
        self._now = store.now()

    def statuses(self) -> list[JobStatus]:
        """Return every configured job in the order of the file."""
        return [self._status(job, *self._look(job)) for job in self._jobs()]

    def next_starts(self, name: str | None, at: datetime | None) -> list[NextStart]:
        """Return when jobs will next start.

        Args:
            name: A job; a batch's or rollup's name stands for all below it. None for all that have a schedule.
            at: As if it were then; None for now.
        """
        after = at or self._now
        jobs = [job for job in self._jobs() if name in (None, job.name, job.name.partition("/")[0])]
        return [self._next(job, after) for job in jobs if job.schedule or name == job.name]

    def names(self) -> list[str]:
        """Name every configured job."""
        return [job.name for job in self._jobs()]

    def _jobs(self) -> Iterator[_Job]:
        return _configured(self._configuration)

    def _look(self, job: _Job) -> tuple[_Running | None, Refusal | None]:
        row = self._rows.get(job.name)
        running = self._running(job, row)
        return running, self._refusal(job, row, running)

    def _status(self, job: _Job, running: _Running | None, refusal: Refusal | None) -> JobStatus:
        row = self._rows.get(job.name)
        paused = self._paused(job)
        return JobStatus(
            job=job.name,
            state="running" if running else "paused" if paused else "idle",
            last_started_at=row.last_started_at if row else None,
            last_completed_at=row.last_completed_at if row else None,
            last_outcome=row.last_outcome if row else None,
            next_eligible_at=refusal.next_eligible_at if refusal else None,
            estimate_seconds=self._estimate(job),
            pid=running.pid if running else None,
            host=running.host if running else None,
            paused=paused,
            enabled=job.enabled,
        )

    def _paused(self, job: _Job) -> tuple[str, ...]:
        top = job.name.partition("/")[0]
        # A start of the whole batch would run each of its groups.
        below = job.batch.groups if job.batch is not None and job.group is None else ()
        names = dict.fromkeys((top, job.name, *(f"{top}/{group}" for group in below)))
        return tuple(name for name in names if name in self._rows and self._rows[name].paused)

    def _running(self, job: _Job, row: Any) -> _Running | None:
        """Return what runs the job now: never taken from the state alone."""
        path = lock_path(self._configuration.state_dir, job.lock)
        holder = read_holder(path, self._clock, patience=0)
        if (
            holder is not None
            and holder.looking is None
            and (job.group is None or (row is not None and row.run_id is not None))
        ):
            return _Running(holder.pid, holder.hostname, holder.started_at)
        if row is None or row.run_id is None:
            return None
        process = ProcessIdentity(row.pid, row.pid_start_ticks, row.boot_id)
        elsewhere = row.claimed_until > self._now and process.boot_id != boot_id()
        if elsewhere or alive(process, hidden_counts=False):
            return _Running(row.pid, row.hostname, row.started_at)
        return None

    def _estimate(self, job: _Job) -> float | None:
        if job.batch is None:
            return None
        seconds = self._store.estimate_seconds(job.name)
        return job.batch.timeout.total_seconds() if seconds is None else seconds

    def _refusal(self, job: _Job, row: Any, running: _Running | None) -> Refusal | None:
        if job.batch is None:
            return None
        estimate = timedelta(seconds=self._estimate(job) or 0)
        completed = row.last_completed_at if row else None
        if running is not None:
            completed = max(running.started_at + estimate, self._now)
        return earliest_start(
            gap_rule(job.batch, job.group, self._zone),
            last_completed_at=completed,
            last_started_at=row.last_started_at if row else None,
            estimate=estimate,
        )

    def _next(self, job: _Job, after: datetime) -> NextStart:
        running, refusal = self._look(job)
        status = self._status(job, running, refusal)
        # Groups and the whole batch share the accounts, so whatever runs of the batch is in the way.
        if running is None and job.group is not None:
            top = job.name.partition("/")[0]
            running = self._running(job._replace(name=top, group=None), self._rows.get(top))
        guards = tuple(self._answers(job, status, running, refusal, after))
        lifted_by_hand = not job.enabled or bool(status.paused)
        earliest = after if status.next_eligible_at is None else max(after, status.next_eligible_at)
        start = None if lifted_by_hand or not job.schedule else self._first(job, earliest)
        return NextStart(job.name, job.schedule, start, running is not None and job.batch is not None, guards)

    def _first(self, job: _Job, earliest: datetime) -> datetime | None:
        # A cron time at the very instant counts, so the search begins just before it.
        time: datetime | None = earliest - timedelta(microseconds=1)
        for _ in range(MOST_CRON_TIMES):
            time = next_time(job.schedule, time, self._zone) if time else None
            if time is None or inside_hours(job.hours, time, self._zone):
                return time
        return None

    def _answers(
        self,
        job: _Job,
        status: JobStatus,
        running: _Running | None,
        refusal: Refusal | None,
        after: datetime,
    ) -> Iterator[GuardAnswer]:
        if not job.enabled:
            yield GuardAnswer("enabled", False, None, "disabled in the configuration")
        if running is not None:
            pid, host, since = running
            age = elapsed(max(self._now - since, timedelta(0)))
            yield GuardAnswer("lock", False, None, f"running: pid {pid} on {host}, since {self._shown(since)}, {age}")
        else:
            yield GuardAnswer("lock", True, None, "free")
        if status.paused:
            yield GuardAnswer("paused", False, None, f"paused: {lifted_by(status.paused)}")
        if refusal is not None:
            eligible = refusal.next_eligible_at
            estimated = " (an estimate: the run in progress is taken to end after the median time)" if running else ""
            allows = eligible <= after
            word = "over since" if allows else "until"
            guard = "every" if refusal.reason == "not_due" else "gap"
            yield GuardAnswer(guard, allows, eligible, f"{word} {self._shown(eligible)}{estimated}")
        elif job.batch is not None:
            yield GuardAnswer("gap", True, None, "nothing ran before")
        if job.hours:
            inside = inside_hours(job.hours, after, self._zone)
            first = None if inside else next_inside_hours(job.hours, after, self._zone)
            until = f"; next at {self._shown(first)}" if first else ""
            yield GuardAnswer("hours", inside, first, f"{'inside' if inside else 'outside'} {job.hours}{until}")

    def _shown(self, instant: datetime) -> str:
        return shown(instant, self._zone)
