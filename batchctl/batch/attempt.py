"""One attempt at a step: its lock, its output, its process, what it leaves, and the records of it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from batchctl.batch.output import OutputCap
from batchctl.batch.plan import fill
from batchctl.batch.process import Child, Command, Ending, run_child
from batchctl.errors import BatchctlError
from batchctl.guard.liveness import listed
from batchctl.paths import private_directory

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable, Mapping
    from datetime import datetime
    from pathlib import Path

    from batchctl.batch.interruption import Interruption
    from batchctl.batch.plan import PlannedStep
    from batchctl.batch.record import Recorder
    from batchctl.clock import Clock
    from batchctl.config import Batch
    from batchctl.guard.run_locks import RunLocks, StepLock

LOOKED_AFTER_SECONDS = 1.0
"""From how long on a step is worth a look through all processes for what it left: shorter ones come in hundreds."""


@dataclass(frozen=True)
class RunSetting:
    """What a run needs besides its plan.

    Args:
        batch: The configuration.
        run_id: Its id.
        directory: Working directory of the steps.
        log_dir: Directory for the output of this run's steps.
        locks: What each step inherits, one for each attempt.
        deadline: When the whole run is over, by the monotonic clock.
        deadline_at: The same as an instant, for the steps to know.
        environment: What the steps inherit.
    """

    batch: Batch
    run_id: str
    directory: Path
    log_dir: Path
    locks: RunLocks
    deadline: float
    deadline_at: datetime
    environment: Mapping[str, str]


class Attempts:
    """Makes the attempts of a run.

    Args:
        batch_name: Name of the batch.
        setting: What the run needs besides its plan.
        recorder: Told of each beginning and end.
        clock: Measures.
        interruption: The wish to end the run early.
        log: The batch's logger.
    """

    def __init__(
        self,
        batch_name: str,
        setting: RunSetting,
        *,
        recorder: Recorder,
        clock: Clock,
        interruption: Interruption,
        log: logging.Logger,
    ) -> None:
        self._batch_name = batch_name
        self._setting = setting
        self._recorder = recorder
        self._clock = clock
        self._interruption = interruption
        self._log = log
        self.output = OutputCap(setting.batch.output_cap, log)

    def make(self, step: PlannedStep, attempt: int, log_path: Path) -> Ending:
        """Run a step once, and record that it began and how it ended; whatever goes wrong is how it ended."""
        key = {"account": step.account, "step": step.step, "attempt": attempt}
        known = {"group": step.group, "quantity": step.quantity, "log": str(log_path), "config_hash": step.config_hash}
        began = self._clock.monotonic()

        def started(child: Child) -> None:
            self._recorder.write(
                "step_started", {**key, **known, "pid": child.pid, "pid_start_ticks": child.start_ticks}
            )

        try:
            lock = self._setting.locks.step(step.account, step.step, attempt)
            try:
                ending = self._execute(step, attempt, lock, log_path, started)
            finally:
                left = lock.release()
            self._name_leftovers(step, ending, seen=left or self._clock.monotonic() - began >= LOOKED_AFTER_SECONDS)
        except BatchctlError as error:
            ending = Ending("failed", reason=f"cannot be started: {error}")
        except Exception as error:  # noqa: BLE001 - whatever becomes of one step, the others and the accounts go on
            ending = Ending("failed", reason=f"a bug in batchctl: {type(error).__name__}: {error}")
        values: dict[str, Any] = {"outcome": ending.outcome, "reason": ending.reason}
        values |= {"exit_code": ending.exit_code, "signal": ending.signal}
        duration = timedelta(seconds=self._clock.monotonic() - began)
        self._recorder.write("step_finished", {**key, **known, **values, "duration": duration})
        return ending

    def _execute(
        self, step: PlannedStep, attempt: int, lock: StepLock, log_path: Path, started: Callable[[Child], None]
    ) -> Ending:
        setting = self._setting
        output = self._open_output(step, log_path)
        try:
            return run_child(
                Command(
                    arguments=[
                        fill(text, batch=self._batch_name, run_id=setting.run_id, step=step) for text in step.command
                    ],
                    directory=setting.directory,
                    environment=self._environment(step, attempt),
                    output=output,
                    lock=lock,
                ),
                timeouts=[
                    (step.timeout.total_seconds(), f"ran longer than its timeout of {step.timeout}"),
                    (
                        setting.deadline - self._clock.monotonic(),
                        f"the whole run reached its timeout of {setting.batch.timeout}",
                    ),
                ],
                grace=setting.batch.grace.total_seconds(),
                interruption=self._interruption,
                clock=self._clock,
                started=started,
            )
        finally:
            os.close(output)
            self.output.finish(log_path)

    def _open_output(self, step: PlannedStep, path: Path) -> int:
        try:
            private_directory(path.parent)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
        except (BatchctlError, OSError) as error:
            # A full disk must not end a batch of 26 hours; the step may not even need it.
            why = getattr(error, "strerror", None) or error
            self._log.error(
                "Step %s of account %s: its output is lost, %s cannot be written: %s",
                *(step.step, step.account, path, why),
            )
            return os.open(os.devnull, os.O_WRONLY)
        self.output.register(path)
        return descriptor

    def _name_leftovers(self, step: PlannedStep, ending: Ending, *, seen: bool) -> None:
        if not seen:
            return
        locks = self._setting.locks
        try:
            left = locks.leftovers(step.account, step.step)
        except BatchctlError as error:
            self._log.error("What step %s of account %s left alive cannot be told: %s", step.step, step.account, error)
            return
        if not left:
            return
        if ending.outcome != "success":
            locks.unfinished = True
            self._log.error(
                "Step %s of account %s: these could not be ended: %s", step.step, step.account, listed(left)
            )
        else:
            self._log.warning("Step %s of account %s left processes alive: %s", step.step, step.account, listed(left))

    def _environment(self, step: PlannedStep, attempt: int) -> Mapping[str, str]:
        return {
            **self._setting.environment,
            **step.env,
            "BATCHCTL_BATCH": self._batch_name,
            "BATCHCTL_ACCOUNT": step.account,
            "BATCHCTL_STEP": step.step,
            "BATCHCTL_GROUP": step.group or "",
            "BATCHCTL_QUANTITY": str(step.quantity),
            "BATCHCTL_RUN_ID": self._setting.run_id,
            "BATCHCTL_ATTEMPT": str(attempt),
            "BATCHCTL_DEADLINE": self._setting.deadline_at.strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
