"""A start of a batch: the guards in their order, then the run."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from batchctl.batch.guards import INTERRUPTED, Guards, Skip
from batchctl.batch.interruption import STOP_SIGNALS, Interruption
from batchctl.batch.result import RunResult, StepResult
from batchctl.batch.resume import Wish, Work, find_work
from batchctl.batch.run import SKIP_LIMIT_SECONDS, Claimed, Run
from batchctl.errors import BatchctlError, DatabaseUnavailableError
from batchctl.guard.identity import ProcessIdentity, identify
from batchctl.guard.lock import Holder, acquire, lock_path, read_holder
from batchctl.guard.run_locks import RunLocks
from batchctl.state.within import within

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from datetime import datetime

    from batchctl.batch.guards import State
    from batchctl.state.store import Store

PATIENCE_SECONDS = 4.0
"""How long a start that comes once a day waits for a database that restarts just then."""
CLAIM_LIMIT_SECONDS = 45.0
"""How long a start waits for a database that has taken the connection, whatever it does then."""


@dataclass(frozen=True)
class Start:
    """One call of run-batch.

    Args:
        guards: What may refuse it.
        work: What it has to do, or which run it is to continue.
        load_state: Loads the database driver and names the database.
        watch: Told of each change of a step.
        environment: What the steps inherit.
        interruption: The wish to end the run early.
    """

    guards: Guards
    work: Work | Wish
    load_state: Callable[[], State]
    watch: Callable[[StepResult], None]
    environment: Mapping[str, str]
    interruption: Interruption

    def run(self) -> RunResult:
        """Run the batch if every guard allows it, else say which does not and until when.

        Raises:
            DatabaseUnavailableError: nothing was started.
            ConfigurationError: nothing was started.
            UsageError: there is nothing to resume.
        """
        path = lock_path(self.guards.configuration.state_dir, f"batch.{self.guards.name}")
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
        asking: list[tuple[str, int]] = []

        def ask() -> Skip | Claimed:
            with state.connect(patience=PATIENCE_SECONDS) as store:
                claimed = self._claim(store, state, process, asking)
                if isinstance(claimed, Skip) and claimed is not INTERRUPTED:
                    self._record_skip(store, state, claimed)
                return claimed

        try:
            claimed = within(CLAIM_LIMIT_SECONDS, ask)
        except DatabaseUnavailableError:
            self._withdraw(state, asking)
            without = self._without_database(state)
            if without is None:
                raise
            claimed = without
        if claimed is INTERRUPTED:
            return self._result("stopped", message=INTERRUPTED.message, signal=self.interruption.signal)
        if isinstance(claimed, Skip):
            return self._skipped(claimed)
        # The session has ended: none stays open while a step runs.
        guards = replace(self.guards, job=claimed.work.plan.job)
        return Run(guards, state, claimed, self.interruption, self.watch, self.environment).run()

    def _claim(
        self, store: Store, state: State, process: ProcessIdentity, asking: list[tuple[str, int]]
    ) -> Skip | Claimed:
        guards = self.guards
        skip = guards.alive(store, state.host)
        if skip is not None:
            return skip
        work = self.work if isinstance(self.work, Work) else find_work(store, guards.name, guards.batch, self.work)
        run_id = work.run_id or new_run_id(guards.clock.now())
        # Made before the claim, so that what a full disk prevents is not claimed.
        locks = RunLocks(guards.configuration.state_dir, guards.name, run_id, process, guards.clock)
        claim = None
        # What comes behind the question may get lost, also when the answer was yes.
        asking.append((run_id, 0 if work.resumed is None else work.resumed + 1))
        asked = guards.clock.monotonic()
        try:
            claim = replace(guards, job=work.plan.job).claim(
                store, state, work, run_id=run_id, process=process, interruption=self.interruption
            )
        finally:
            if claim is None or isinstance(claim, Skip):
                locks.release()
        if isinstance(claim, Skip):
            return claim
        assert claim.run is not None  # noqa: S101 - neither a live run nor a refusal leaves only this
        expected = replace(guards, job=work.plan.job).estimate(claim.past_runs)
        return Claimed(work, claim.run, claim.now, guards.clock.monotonic(), asked, locks, expected)

    def _withdraw(self, state: State, asking: list[tuple[str, int]]) -> None:
        """Take back a claim that the database may have granted without our hearing of it; nothing was started."""
        for run_id, resumed in asking:
            with suppress(BatchctlError):
                state.journal.append("withdraw", {"run_id": run_id, "resumed": resumed})

    def _without_database(self, state: State) -> Skip | None:
        """Find without the database why there would be no start with it either."""
        skip = self.guards.alive_by_locks_and_marks()
        if skip is None and isinstance(self.work, Work):
            skip = self.guards.journaled(state.journal)
        if skip is not None:
            with suppress(BatchctlError):
                state.journal.append("skip", self._skip_values(skip))
        return skip

    def _result(self, outcome: str, **values: Any) -> RunResult:
        return RunResult(self.guards.name, self.guards.group, outcome, **values)

    def _skipped(self, skip: Skip) -> RunResult:
        # A run in progress or a gap is what a schedule expects; what an earlier run left has to be looked at.
        level = self.guards.log.error if skip.reason == "orphans" else self.guards.log.warning
        level(skip.message)
        return self._result(
            "skipped",
            reason=skip.reason,
            next_eligible_at=skip.next_eligible_at,
            holder=skip.holder,
            orphans=skip.orphans,
            message=skip.message,
        )

    def _record_skip(self, store: Store, state: State, skip: Skip) -> None:
        values = self._skip_values(skip)
        try:
            store.write("skip", {**values, "at": None})
        except BatchctlError:
            # Decided is decided, also if the database goes away just then.
            with suppress(BatchctlError):
                state.journal.append("skip", values)

    def _record_late(self, skip: Skip) -> None:
        """Record a skip that the lock decided, without waiting for a slow or dead database."""
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
        # With its token a record that is given up and yet arrives is not made twice.
        own = {"at": self.guards.clock.now().isoformat(), "token": secrets.token_hex(8)}
        return {"job": self.guards.job, "reason": skip.reason, "detail": skip.message, **own}


def new_run_id(now: datetime) -> str:
    """Make an id that sorts by start and is a file name."""
    return f"{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"


@contextmanager
def handled_signals() -> Iterator[Interruption]:
    """Turn SIGTERM, SIGINT, SIGHUP and those of `stop` into a wish to end; what was ignored (nohup) stays so.

    A handler in Python runs only when the main thread gets to it, and a signal that comes just before that thread
    begins to wait is not noticed until the wait ends. So the number is taken from the wake-up descriptor, which the
    interpreter writes at once, by a thread that does nothing else.
    """
    interruption = Interruption()
    receiving, sending = socket.socketpair()
    sending.setblocking(False)
    numbers = [
        number
        for number in {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, *STOP_SIGNALS.values()}
        if signal.getsignal(number) is not signal.SIG_IGN
    ]

    def listen() -> None:
        while received := receiving.recv(1):
            if received[0] in numbers:
                interruption.receive(received[0])

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
