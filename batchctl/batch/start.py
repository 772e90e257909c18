"""A start of a batch: the guards in their order, then the run, then its end."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from batchctl.batch.guards import INTERRUPTED, Guards, Skip
from batchctl.batch.process import Interruption
from batchctl.batch.record import Recorder
from batchctl.batch.result import RunResult, StepResult
from batchctl.batch.runner import Runner, RunSetting
from batchctl.errors import BatchctlError
from batchctl.guard.identity import ProcessIdentity, identify
from batchctl.guard.liveness import listed
from batchctl.guard.lock import Holder, acquire, lock_path, read_holder
from batchctl.guard.run_locks import RunLocks
from batchctl.logs import elapsed, shown
from batchctl.state.within import within

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from batchctl.batch.guards import State
    from batchctl.clock import Clock
    from batchctl.state.store import Store

PATIENCE_SECONDS = 4.0
"""How long a start that comes once a day waits for a database that restarts just then."""
SKIP_LIMIT_SECONDS = 2.0
"""How long a skip that is already decided may wait for the database to record it."""


@dataclass(frozen=True)
class Start:
    """One call of run-batch.

    Args:
        guards: What may refuse it.
        load_state: Loads the database driver and names the database.
        watch: Told of each change of a step.
        environment: What the steps inherit.
    """

    guards: Guards
    load_state: Callable[[], State]
    watch: Callable[[StepResult], None]
    environment: Mapping[str, str]

    def run(self) -> RunResult:
        """Run the batch if every guard allows it, else say which does not and until when.

        Raises:
            DatabaseUnavailableError: nothing was started.
            ConfigurationError: nothing was started.
        """
        path = lock_path(self.guards.configuration.state_dir, f"batch.{self.guards.plan.batch}")
        process = identify(os.getpid())
        lock = acquire(path, Holder(socket.gethostname(), *process, self.guards.clock.now()))
        if lock is None:
            skip = self.guards.held(read_holder(path, self.guards.clock))
            result = self._skipped(skip)
            self._record_late(skip)
            return result
        with lock:
            return self._guarded(process)

    def _guarded(self, process: ProcessIdentity) -> RunResult:
        state = self.load_state()
        run_id = new_run_id(self.guards.clock.now())
        with _handled_signals() as interruption:
            with state.connect(patience=PATIENCE_SECONDS) as store:
                claimed = self._claim(store, state, run_id, process, interruption)
                if isinstance(claimed, Skip) and claimed is not INTERRUPTED:
                    self._record_skip(store, state, claimed)
            if claimed is INTERRUPTED:
                return self._result("stopped", message=INTERRUPTED.message, signal=interruption.signal)
            if isinstance(claimed, Skip):
                return self._skipped(claimed)
            # The session has ended: none stays open while a step runs.
            return self._run(state, run_id, claimed, interruption)

    def _claim(
        self, store: Store, state: State, run_id: str, process: ProcessIdentity, interruption: Interruption
    ) -> Skip | Claimed:
        skip = self.guards.alive(store, state.host)
        if skip is not None:
            return skip
        # Made before the claim, so that what a full disk prevents is not claimed.
        locks = RunLocks(
            self.guards.configuration.state_dir, self.guards.plan.batch, run_id, process, self.guards.clock
        )
        claimed: Skip | datetime | None = None
        try:
            claimed = self.guards.claim(store, state, run_id, process, interruption)
        finally:
            if not isinstance(claimed, datetime):
                locks.release()
        if isinstance(claimed, Skip):
            return claimed
        return Claimed(claimed, self.guards.clock.monotonic(), locks)

    def _result(self, outcome: str, **values: Any) -> RunResult:
        return RunResult(self.guards.plan.batch, self.guards.group, outcome, **values)

    def _skipped(self, skip: Skip) -> RunResult:
        self.guards.log.warning(skip.message)
        return self._result(
            "skipped",
            reason=skip.reason,
            next_eligible_at=skip.next_eligible_at,
            holder=skip.holder,
            orphans=skip.orphans,
            message=skip.message,
        )

    def _record_skip(self, store: Store, state: State, skip: Skip) -> None:
        try:
            store.record_skip(self.guards.plan.job, skip.reason, skip.message)
        except BatchctlError:
            # Decided is decided, also if the database goes away just then.
            with suppress(BatchctlError):
                state.journal.append("skip", self._skip_values(skip))

    def _record_late(self, skip: Skip) -> None:
        """Record a skip that the lock decided, without waiting for a slow or dead database."""
        # With its own time, so that a record that is given up and yet arrives is not made twice.
        values = self._skip_values(skip)

        def record() -> None:
            with state.connect(limit=SKIP_LIMIT_SECONDS, start_server=False) as store:
                store.write("skip", values)

        # A skip is never an error: what cannot even be journaled is in the log.
        with suppress(BatchctlError):
            state = self.load_state()
            try:
                within(SKIP_LIMIT_SECONDS, record)
            except BatchctlError:
                state.journal.append("skip", values)

    def _skip_values(self, skip: Skip) -> dict[str, Any]:
        at = self.guards.clock.now().isoformat()
        return {"job": self.guards.plan.job, "reason": skip.reason, "detail": skip.message, "at": at}

    def _run(self, state: State, run_id: str, claimed: Claimed, interruption: Interruption) -> RunResult:
        guards, log = self.guards, self.guards.log
        recorder = Recorder(state.connect, state.journal, lambda: claimed.now(guards.clock), log)
        outcome: str = "failed"
        reason: str | None = None
        try:
            log.info("Run started: %s", shown(claimed.started_at, guards.zone))
            quantities = {step.step: step.quantity for step in guards.plan.steps}
            log.info("Steps: %s", ", ".join(f"{step}={quantity}" for step, quantity in quantities.items()))
            runner = Runner(
                guards.plan,
                RunSetting(
                    batch=guards.batch,
                    run_id=run_id,
                    directory=guards.configuration.directory,
                    log_dir=guards.configuration.log_dir / guards.plan.batch / run_id,
                    locks=claimed.locks,
                    deadline=claimed.began + guards.batch.timeout.total_seconds(),
                    deadline_at=claimed.started_at + guards.batch.timeout,
                    environment=self.environment,
                ),
                recorder=recorder,
                clock=guards.clock,
                interruption=interruption,
                log=log,
                watch=self.watch,
            )
            steps = runner.run()
            outcome, reason = runner.outcome(), runner.reason()
        except BaseException as error:
            reason = f"{type(error).__name__}: {error}"
            raise
        finally:
            # Whatever happened, a claim never outlives its run.
            duration = guards.clock.monotonic() - claimed.began
            ended: dict[str, Any] = {"run_id": run_id, "outcome": outcome, "reason": reason}
            row = recorder.write("run_finished", {**ended, "jobs": list(guards.plan.jobs)})
            self._name_leftovers(claimed.locks)
            level = log.info if outcome == "success" else log.error
            level("Run finished: %s in %s", outcome, elapsed(duration))
        finished_at = row.finished_at if row else claimed.now(guards.clock)
        refusal = guards.refusal(finished_at, claimed.started_at, self._estimate(state, duration))
        return self._result(
            outcome,
            reason=reason,
            run_id=run_id,
            started_at=claimed.started_at,
            finished_at=finished_at,
            duration_seconds=round(duration, 3),
            next_eligible_at=refusal.next_eligible_at if refusal else None,
            steps=steps,
            message=f"Run finished: {outcome} in {elapsed(duration)}",
            signal=interruption.signal,
        )

    def _name_leftovers(self, locks: RunLocks) -> None:
        left = locks.release()
        if left:
            ignored = self.guards.batch.leftovers == "ignore" and not locks.unfinished
            policy = "ignores" if ignored else "is skipped because of"
            self.guards.log.warning("The run left processes alive, the next start %s them: %s", policy, listed(left))

    def _estimate(self, state: State, duration: float) -> float:
        if not self.guards.batch.gap_factor:
            return duration  # which decides nothing then

        def ask() -> float | None:
            with state.connect(limit=SKIP_LIMIT_SECONDS) as store:
                return store.estimate_seconds(self.guards.plan.job)

        try:
            return within(SKIP_LIMIT_SECONDS, ask) or self.guards.batch.timeout.total_seconds()
        except BatchctlError:
            return duration


@dataclass(frozen=True)
class Claimed:
    """A claim that is ours.

    Args:
        started_at: When, by the database's clock.
        began: The same by the monotonic clock.
        locks: What says that the run lives, and what its steps inherit.
    """

    started_at: datetime
    began: float
    locks: RunLocks

    def now(self, clock: Clock) -> datetime:
        """Return the time by the database's clock without asking it; the host's own may be wrong."""
        return self.started_at + timedelta(seconds=clock.monotonic() - self.began)


def new_run_id(now: datetime) -> str:
    """Make an id that sorts by start and is a file name."""
    return f"{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"


@contextmanager
def _handled_signals() -> Iterator[Interruption]:
    """Turn SIGTERM, SIGINT and SIGHUP into a request to end for the block; what was ignored (nohup) stays so.

    A handler in Python runs only when the main thread gets to it, and a signal that comes just before that thread
    begins to wait is not noticed until the wait ends. So the number is taken from the wake-up descriptor, which the
    interpreter writes at once, by a thread that does nothing else.
    """
    interruption = Interruption()
    receiving, sending = socket.socketpair()
    sending.setblocking(False)
    numbers = [
        number
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        if signal.getsignal(number) is not signal.SIG_IGN
    ]

    def listen() -> None:
        while received := receiving.recv(1):
            if received[0] in numbers:
                interruption.request(received[0])

    threading.Thread(target=listen, daemon=True, name="signals").start()
    descriptor_before = signal.set_wakeup_fd(sending.fileno(), warn_on_full_buffer=False)
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(descriptor_before)
        sending.close()
