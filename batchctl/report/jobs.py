"""What each configured job does now, and when it may next start."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from batchctl.guard.identity import ProcessIdentity, alive, boot_id
from batchctl.guard.liveness import find_orphans, recorded_processes
from batchctl.guard.lock import lock_path, read_holder
from batchctl.report.configured import Job, configured_jobs
from batchctl.report.guards import RunSeen, Seen
from batchctl.report.start import next_start
from batchctl.schedule.estimate import Estimate, estimate
from batchctl.state.host import this_host

if TYPE_CHECKING:
    from datetime import datetime, tzinfo

    from batchctl.clock import Clock
    from batchctl.config import Configuration
    from batchctl.guard.liveness import Orphan
    from batchctl.report.start import NextStart
    from batchctl.state.store import Store


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
    estimate_runs: int | None
    """How many runs the estimate comes from; 0 if it is the timeout, None for a rollup."""
    expected_end_at: datetime | None
    """When the run in progress is over by its estimate, which may be past."""
    overdue: bool
    """Whether the run in progress exceeds its estimate by half, as far as runs have shown how long one takes."""
    pid: int | None
    host: str | None
    paused: tuple[str, ...]
    """What is paused and keeps the job from starting."""
    enabled: bool
    schedule: str
    hours: str


class JobReader:
    """Reads the state of the configured jobs; changes nothing, and takes no lock that a start could miss."""

    def __init__(self, configuration: Configuration, store: Store, zone: tzinfo, clock: Clock) -> None:
        self._configuration = configuration
        self._store = store
        self._zone = zone
        self._clock = clock
        self._rows = {row.job: row for row in store.jobs()}
        self._now = store.now()
        self._estimates: dict[str, Estimate] = {}
        self._orphans: dict[str, tuple[Orphan, ...]] = {}

    def statuses(self) -> list[JobStatus]:
        """Return every configured job in the order of the file."""
        return [self._status(self._see(job)) for job in configured_jobs(self._configuration)]

    def next_starts(self, name: str | None, at: datetime | None) -> list[NextStart]:
        """Return when jobs will next start.

        Args:
            name: A job; a batch's or rollup's name stands for all below it. None for all that have a schedule.
            at: As if it were then; None for now.
        """
        return [
            next_start(self._see(job, orphans=True), at or self._now, self._zone)
            for job in configured_jobs(self._configuration)
            if name in (None, job.name, job.top) and (job.schedule or name == job.name)
        ]

    def names(self) -> list[str]:
        """Name every configured job."""
        return [job.name for job in configured_jobs(self._configuration)]

    def _status(self, seen: Seen) -> JobStatus:
        row, own = self._rows.get(seen.job.name), seen.own_run
        refusal = seen.refusal(self._zone)
        return JobStatus(
            job=seen.job.name,
            state="running" if own else "paused" if seen.paused else "idle",
            last_started_at=row.last_started_at if row else None,
            last_completed_at=row.last_completed_at if row else None,
            last_outcome=row.last_outcome if row else None,
            next_eligible_at=refusal.next_eligible_at if refusal else None,
            estimate_seconds=seen.estimate.seconds if seen.estimate else None,
            estimate_runs=seen.estimate.runs if seen.estimate else None,
            expected_end_at=own.estimated_end if own else None,
            # A run of a part of the batch may be overdue while of the whole nothing is known but the timeout.
            overdue=own is not None and bool(seen.estimate and seen.estimate.runs) and own.overdue(self._now),
            pid=own.pid if own else None,
            host=own.host if own else None,
            paused=seen.paused,
            enabled=seen.job.enabled,
            schedule=seen.job.schedule,
            hours=seen.job.hours,
        )

    def _see(self, job: Job, *, orphans: bool = False) -> Seen:
        row = self._rows.get(job.name)
        # Groups and the whole batch share the accounts, so whatever runs of the batch is in the way.
        run = self._run(job, self._rows.get(job.top) if job.batch else row)
        live = row is not None and row.run_id is not None
        # A run that died is closed by the next start of its host, and then never started as far as `every` goes.
        died = live and run is None
        return Seen(
            job=job,
            now=self._now,
            run=run,
            # The lock says that the batch runs; only the state says which groups take part.
            counts=run is not None and not run.dead and (job.group is None or live),
            orphans=self._left(job.top) if orphans and job.batch is not None else (),
            paused=self._paused(job),
            estimate=self._estimate(job) if job.batch is not None else None,
            last_completed_at=row.last_completed_at if row else None,
            last_started_at=(row.earlier_started_at if died else row.last_started_at) if row else None,
        )

    def _paused(self, job: Job) -> tuple[str, ...]:
        # A start of the whole batch would run each of its groups.
        below = job.batch.groups if job.batch is not None and job.group is None else ()
        names = dict.fromkeys((job.top, job.name, *(f"{job.top}/{group}" for group in below)))
        return tuple(name for name in names if name in self._rows and self._rows[name].paused)

    def _run(self, job: Job, row: Any) -> RunSeen | None:
        """Return what keeps the job busy now: never taken from the state alone."""
        live = row is not None and row.run_id is not None
        estimate = self._estimate_of_run(job, row.run_job if live else None)
        holder = read_holder(lock_path(self._configuration.state_dir, job.lock), self._clock, patience=0)
        if holder is not None and holder.looking is None:
            return RunSeen(holder.pid, holder.hostname, holder.started_at, estimate, here=True)
        if not live:
            return None
        process = ProcessIdentity(row.pid, row.pid_start_ticks, row.boot_id)
        claimed = row.claimed_until > self._now
        run = RunSeen(row.pid, row.hostname, row.started_at, estimate, here=row.host == self._host_id)
        if alive(process, hidden_counts=False) or (claimed and process.boot_id != boot_id()):
            return run
        # Another state directory of this machine: a start from here must believe the claim all the same.
        return run.died_with_claim(row.claimed_until) if claimed and not run.here else None

    def _estimate_of_run(self, job: Job, run_job: str | None) -> Estimate | None:
        if job.batch is None:
            return None
        name = run_job or job.top
        return self._estimate(Job(name, job.batch, name.partition("/")[2] or None))

    def _estimate(self, job: Job) -> Estimate:
        assert job.batch is not None  # noqa: S101 - aggregations are not estimated
        if job.name not in self._estimates:
            self._estimates[job.name] = estimate(job.batch, job.group, self._store.past_runs(job.name))
        return self._estimates[job.name]

    @cached_property
    def _host_id(self) -> str:
        return this_host(self._configuration.state_dir).host_id

    def _left(self, batch: str) -> tuple[Orphan, ...]:
        """List what the liveness guard refuses a start for, unless that belongs to a run that lives."""
        if batch not in self._orphans:
            processes = recorded_processes(self._store.unfinished(batch, self._host_id))
            found = find_orphans(self._configuration.state_dir, batch, processes)
            living = {orphan.run_id for orphan in found if orphan.supervisor}
            ignored = self._configuration.batches[batch].leftovers == "ignore"
            self._orphans[batch] = tuple(
                orphan for orphan in found if orphan.run_id not in living and not (ignored and orphan.run_ended)
            )
        return self._orphans[batch]
