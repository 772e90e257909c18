"""A start of a batch: the guards in their order, then the run, then its end."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from batchctl.batch.guards import Guards, Skip
from batchctl.batch.process import Interruption
from batchctl.batch.record import Recorder, within
from batchctl.batch.result import RunResult, StepResult
from batchctl.batch.runner import Runner, RunSetting
from batchctl.errors import BatchctlError
from batchctl.guard.identity import ProcessIdentity, identify
from batchctl.guard.liveness import RunLock
from batchctl.guard.lock import Holder, acquire, lock_path, read_holder
from batchctl.logs import elapsed, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from datetime import datetime

    from batchctl.batch.guards import State

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
                claimed = self.guards.alive(store, state.host) or self.guards.claim(store, state, run_id, process)
                if isinstance(claimed, Skip):
                    store.record_skip(self.guards.plan.job, claimed.reason, claimed.message)
            if isinstance(claimed, Skip):
                return self._skipped(claimed)
            # The session has ended: none stays open while a step runs.
            return self._run(state, run_id, claimed, interruption)

    def _skipped(self, skip: Skip) -> RunResult:
        self.guards.log.warning(skip.message)
        return RunResult(
            self.guards.plan.batch,
            self.guards.group,
            "skipped",
            reason=skip.reason,
            next_eligible_at=skip.next_eligible_at,
            holder=skip.holder,
            message=skip.message,
        )

    def _record_late(self, skip: Skip) -> None:
        """Record a skip that the lock decided, without waiting for a slow or dead database."""
        # With its own time, so that a record that is given up and yet arrives is not made twice.
        values = {"job": self.guards.plan.job, "reason": skip.reason, "detail": skip.message}
        values |= {"at": self.guards.clock.now().isoformat()}

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

    def _run(self, state: State, run_id: str, started_at: datetime, interruption: Interruption) -> RunResult:
        log, batch = self.guards.log, self.guards.batch
        began = self.guards.clock.monotonic()
        run_lock = RunLock(self.guards.configuration.state_dir, self.guards.plan.batch, run_id)
        log.info("Run started: %s", shown(started_at, self.guards.zone))
        quantities = {step.step: step.quantity for step in self.guards.plan.steps}
        log.info("Steps: %s", ", ".join(f"{step}={quantity}" for step, quantity in quantities.items()))
        recorder = Recorder(state.connect, state.journal, self.guards.clock, log)
        runner = Runner(
            self.guards.plan,
            RunSetting(
                batch=batch,
                run_id=run_id,
                directory=self.guards.configuration.directory,
                log_dir=self.guards.configuration.log_dir / self.guards.plan.batch / run_id,
                lock_descriptor=run_lock.descriptor,
                deadline=began + batch.timeout.total_seconds(),
                deadline_at=started_at + batch.timeout,
                environment=self.environment,
            ),
            recorder=recorder,
            clock=self.guards.clock,
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
            duration = self.guards.clock.monotonic() - began
            ended: dict[str, Any] = {"run_id": run_id, "outcome": outcome, "reason": reason}
            row = recorder.write("run_finished", {**ended, "jobs": list(self.guards.plan.jobs)})
            if run_lock.release():
                log.warning("The run left processes alive; the next start %s them", _POLICY[batch.leftovers])
            level = log.info if outcome == "success" else log.error
            level("Run finished: %s in %s", outcome, elapsed(duration))
        finished_at = row.finished_at if row else self.guards.clock.now()
        refusal = self.guards.refusal(finished_at, started_at, duration)
        return RunResult(
            self.guards.plan.batch,
            self.guards.group,
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
