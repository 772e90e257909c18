"""A start of a batch: the guards in their order, then the run, then its end."""

from __future__ import annotations

import hashlib
import os
import secrets
import signal
import socket
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta, tzinfo
from typing import TYPE_CHECKING, Any

from batchctl.batch.process import Interruption
from batchctl.batch.record import Recorder
from batchctl.batch.runner import Runner, RunSetting, StepResult
from batchctl.config import Duration
from batchctl.errors import BatchctlError, ExitCode
from batchctl.guard.gap import Refusal, earliest_start, gap_rule, job_hours, refused
from batchctl.guard.identity import ProcessIdentity, identify
from batchctl.guard.liveness import Recorded, RunLock, find_orphans
from batchctl.guard.lock import Holder, acquire, lock_path, read_holder
from batchctl.logs import elapsed, shown
from batchctl.schedule.cron import inside_hours, next_inside_hours

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable, Iterator, Mapping
    from contextlib import AbstractContextManager

    from batchctl.batch.plan import Plan
    from batchctl.clock import Clock
    from batchctl.config import Batch, Configuration
    from batchctl.state.host import Host
    from batchctl.state.journal import Journal
    from batchctl.state.store import ClaimRequest, JobState, LiveRun, Store

PATIENCE_SECONDS = 4.0
"""How long a start that comes once a day waits for a database that restarts just then."""
SKIP_LIMIT_SECONDS = 2.0
"""How long a skip that is already decided may wait for the database to record it."""


@dataclass(frozen=True)
class HolderShown:
    """Who is in the way."""

    host: str
    pid: int
    started_at: datetime


@dataclass(frozen=True)
class RunResult:
    """What became of a start; `reason` is a skip reason, or what ended the run in words."""

    batch: str
    group: str | None
    outcome: str
    reason: str | None = None
    run_id: str | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    duration_seconds: float | None = None
    next_eligible_at: datetime | None = None
    holder: HolderShown | None = None
    steps: tuple[StepResult, ...] = ()
    message: str = ""
    signal: int | None = None

    @property
    def exit_code(self) -> int:
        """Say it as a number; --skip-exit-code is the caller's."""
        if self.outcome == "stopped":
            return ExitCode.SIGNAL + (self.signal or 0)
        return {
            "success": ExitCode.DONE,
            "partial": ExitCode.PARTIAL,
            "failed": ExitCode.FAILED,
            "timeout": ExitCode.DEADLINE,
            "skipped": ExitCode.SKIPPED,
        }[self.outcome]


@dataclass(frozen=True)
class State:
    """What a start needs of the database, loaded only when the file lock is ours (or a skip is to be recorded).

    Args:
        connect: Opens a store for a block.
        journal: Keeps what the database cannot be told.
        host: This host.
        request: Makes a claim.
    """

    connect: Callable[..., AbstractContextManager[Store]]
    journal: Journal
    host: Host
    request: type[ClaimRequest]


@dataclass(frozen=True)
class Skip:
    """A start that a guard refuses."""

    reason: str
    message: str
    next_eligible_at: datetime | None = None
    holder: HolderShown | None = None


@dataclass(frozen=True)
class Start:
    """One call of run-batch.

    Args:
        configuration: The configuration.
        plan: What it would do.
        force_gap: Lift gap and `every`.
        zone: For shown times, hours and local days.
        clock: For durations and shown times; what is decided by time is decided by the database's clock.
        log: The batch's logger.
        load_state: Loads the database driver and names the database.
        watch: Told of each change of a step.
        environment: What the steps inherit.
    """

    configuration: Configuration
    plan: Plan
    force_gap: bool
    zone: tzinfo
    clock: Clock
    log: logging.Logger
    load_state: Callable[[], State]
    watch: Callable[[StepResult], None]
    environment: Mapping[str, str]

    @property
    def batch(self) -> Batch:
        return self.configuration.batches[self.plan.batch]

    @property
    def group(self) -> str | None:
        return self.plan.job.partition("/")[2] or None

    def run(self) -> RunResult:
        """Run the batch if every guard allows it, else say which does not and until when.

        Raises:
            DatabaseUnavailableError: nothing was started.
            ConfigurationError: nothing was started.
        """
        path = lock_path(self.configuration.state_dir, f"batch.{self.plan.batch}")
        process = identify(os.getpid())
        lock = acquire(path, Holder(socket.gethostname(), *process, self.clock.now()))
        if lock is None:
            skip = self._held(read_holder(path, self.clock))
            result = self._skipped(skip)
            self._record_late(skip)
            return result
        with lock:
            return self._guarded(process)

    def _guarded(self, process: ProcessIdentity) -> RunResult:
        state = self.load_state()
        run_id = new_run_id(self.clock.now())
        with _handled_signals() as interruption:
            with state.connect(patience=PATIENCE_SECONDS) as store:
                claimed = self._alive(store, state.host) or self._claim(store, state, run_id, process)
                if isinstance(claimed, Skip):
                    store.record_skip(self.plan.job, claimed.reason, claimed.message)
            if isinstance(claimed, Skip):
                return self._skipped(claimed)
            # The session has ended: none stays open while a step runs.
            return self._run(state, run_id, claimed, interruption)

    def _held(self, holder: Holder | None) -> Skip:
        if holder is None:
            return Skip("running", "Previous run is still in progress (its holder has not signed). Skipped.")
        return self._in_progress("running", HolderShown(holder.hostname, holder.pid, holder.started_at))

    def _in_progress(self, reason: str, holder: HolderShown, elsewhere: str = "") -> Skip:
        since = shown(holder.started_at, self.zone)
        # A clock that was set back must not show a negative time.
        age = elapsed(max(self.clock.now() - holder.started_at, timedelta(0)))
        return Skip(
            reason,
            f"Previous run is still in progress{elsewhere} "
            f"(pid {holder.pid} on {holder.host}, since {since}, {age}). Skipped.",
            holder=holder,
        )

    def _alive(self, store: Store, host: Host) -> Skip | None:
        recorded = [
            Recorded(
                row.run_id,
                "batchctl" if row.step is None else f"step {row.step} of account {row.account}",
                ProcessIdentity(row.pid, row.pid_start_ticks, row.boot_id),
            )
            for row in store.unfinished(self.plan.batch, host.host_id)
        ]
        orphans = find_orphans(self.configuration.state_dir, self.plan.batch, recorded)
        if not orphans:
            return None
        live = store.live(self.plan.batch)
        if live is not None and any(orphan.what == "batchctl" and orphan.pid == live.pid for orphan in orphans):
            # Somebody removed the lock file under the holder.
            return self._in_progress("running", _shown_holder(live))
        listed = "; ".join(f"pid {orphan.pid or '?'}, {orphan.what}" for orphan in orphans)
        if self.batch.leftovers == "ignore":
            self.log.warning("An earlier run left processes alive, ignored as configured: %s", listed)
            return None
        return Skip("orphans", f"An earlier run left processes alive: {listed}. Skipped.")

    def _claim(self, store: Store, state: State, run_id: str, process: ProcessIdentity) -> Skip | datetime:
        claim = store.claim(
            state.request(
                run_id=run_id,
                batch=self.plan.batch,
                job=self.plan.job,
                jobs=self.plan.jobs,
                groups=self.plan.groups,
                host=state.host.host_id,
                hostname=state.host.hostname,
                process=process,
                claim=self.batch.timeout + self.batch.grace,
                whole=self.plan.whole,
                config_hash=hashlib.sha256(repr(self.batch).encode()).hexdigest()[:16],
            ),
            self._decide,
        )
        for crashed in claim.crashed:
            self.log.warning("Run %s died without an end; it is closed as crashed", crashed)
        if claim.live is not None:
            return self._in_progress("running_elsewhere", _shown_holder(claim.live), " on another host")
        if claim.refusal is not None:
            skip: Skip = claim.refusal
            return skip
        assert claim.started_at is not None  # noqa: S101 - neither a live run nor a refusal leaves only this
        return claim.started_at

    def _decide(self, job: JobState) -> Skip | None:
        """Say what forbids a start at the database's time."""
        if not self.batch.enabled:
            return Skip("disabled", "Disabled in the configuration. Skipped.")
        if job.paused:
            return Skip("paused", f"Paused. Skipped; `batchctl unpause {self.plan.job}` lifts it.")
        hours = job_hours(self.batch, self.group)
        if not inside_hours(hours, job.now, self.zone):
            first = next_inside_hours(hours, job.now, self.zone)
            return Skip(
                "outside_hours",
                f"Outside the hours {hours}. Skipped; next possible start {shown(first, self.zone)}.",
                first,
            )
        refusal = self._refusal(job.last_completed_at, job.last_started_at, job.estimate_seconds)
        if self.force_gap or refusal is None or not refused(refusal, job.now):
            return None
        ago, apart = elapsed(job.now - refusal.since), str(Duration(seconds=refusal.gap.total_seconds()))
        completed = refusal.reason == "gap"
        what = f"Completed {ago} ago, at least {apart} apart" if completed else f"Started {ago} ago, every {apart}"
        text = f"{what}. Skipped; next possible start {shown(refusal.next_eligible_at, self.zone)}."
        return Skip(refusal.reason, text, refusal.next_eligible_at)

    def _refusal(
        self, completed: datetime | None, started: datetime | None, estimate_seconds: float | None
    ) -> Refusal | None:
        estimate = self.batch.timeout if estimate_seconds is None else timedelta(seconds=estimate_seconds)
        return earliest_start(
            gap_rule(self.batch, self.group, self.zone),
            last_completed_at=completed,
            last_started_at=started,
            estimate=estimate,
        )

    def _skipped(self, skip: Skip) -> RunResult:
        self.log.warning(skip.message)
        return RunResult(
            self.plan.batch,
            self.group,
            "skipped",
            reason=skip.reason,
            next_eligible_at=skip.next_eligible_at,
            holder=skip.holder,
            message=skip.message,
        )

    def _record_late(self, skip: Skip) -> None:
        """Record a skip that the lock decided, without waiting for a slow or dead database."""
        at = self.clock.now()
        # A skip is never an error: what cannot even be journaled is in the log.
        with suppress(BatchctlError):
            state = self.load_state()
            try:
                with state.connect(limit=SKIP_LIMIT_SECONDS, start_server=False) as store:
                    store.record_skip(self.plan.job, skip.reason, skip.message)
            except BatchctlError:
                state.journal.append(
                    "skip", {"job": self.plan.job, "reason": skip.reason, "detail": skip.message, "at": at}
                )

    def _run(self, state: State, run_id: str, started_at: datetime, interruption: Interruption) -> RunResult:
        log, batch = self.log, self.batch
        began = self.clock.monotonic()
        run_lock = RunLock(self.configuration.state_dir, self.plan.batch, run_id)
        log.info("Run started: %s", shown(started_at, self.zone))
        quantities = {step.step: step.quantity for step in self.plan.steps}
        log.info("Steps: %s", ", ".join(f"{step}={quantity}" for step, quantity in quantities.items()))
        recorder = Recorder(state.connect, state.journal, self.clock, log)
        runner = Runner(
            self.plan,
            RunSetting(
                batch=batch,
                run_id=run_id,
                directory=self.configuration.directory,
                log_dir=self.configuration.log_dir / self.plan.batch / run_id,
                lock_descriptor=run_lock.descriptor,
                deadline=began + batch.timeout.total_seconds(),
                deadline_at=started_at + batch.timeout,
                environment=self.environment,
            ),
            recorder=recorder,
            clock=self.clock,
            interruption=interruption,
            log=log,
            watch=self.watch,
        )
        outcome: str = "failed"
        reason: str | None = "a bug in batchctl ended the run"
        try:
            steps = runner.run()
            outcome, reason = runner.outcome(), runner.reason()
        finally:
            duration = self.clock.monotonic() - began
            ended: dict[str, Any] = {"run_id": run_id, "outcome": outcome, "reason": reason}
            row = recorder.write("run_finished", {**ended, "jobs": list(self.plan.jobs)})
            if run_lock.release():
                log.warning("The run left processes alive; the next start %s them", _POLICY[batch.leftovers])
            level = log.info if outcome == "success" else log.error
            level("Run finished: %s in %s", outcome, elapsed(duration))
        finished_at = row.finished_at if row else self.clock.now()
        refusal = self._refusal(finished_at, started_at, duration)
        return RunResult(
            self.plan.batch,
            self.group,
            outcome,
            reason=reason,
            run_id=run_id,
            started_at=started_at,
            finished_at=finished_at,
            duration_seconds=round(duration, 3),
            next_eligible_at=refusal.next_eligible_at if refusal else None,
            steps=steps,
            message=f"Run finished: {outcome} in {elapsed(duration)}",
            signal=interruption.signal,
        )


_POLICY = {"skip": "is skipped because of", "ignore": "ignores"}


def new_run_id(now: datetime) -> str:
    """Make an id that sorts by start and is a file name."""
    return f"{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"


@contextmanager
def _handled_signals() -> Iterator[Interruption]:
    """Turn SIGTERM, SIGINT and SIGHUP into a request to end for the block; what was ignored (nohup) stays so."""
    interruption = Interruption()
    before = {}
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, lambda received, _frame: interruption.request(received))
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _shown_holder(live: LiveRun) -> HolderShown:
    return HolderShown(live.hostname, live.pid, live.started_at)
