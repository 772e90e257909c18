"""Walks the plan: accounts side by side, steps in order, deadline, retries, stop or continue, record."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from batchctl.batch.output import OutputCap
from batchctl.batch.plan import PlannedStep, fill
from batchctl.batch.process import Child, Command, Ending, run_child
from batchctl.batch.result import StepResult
from batchctl.errors import BatchctlError
from batchctl.guard.liveness import listed
from batchctl.paths import private_directory

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable, Mapping
    from datetime import datetime
    from pathlib import Path

    from batchctl.batch.interruption import Interruption
    from batchctl.batch.plan import AccountPlan
    from batchctl.batch.record import Recorder
    from batchctl.batch.resume import Work
    from batchctl.clock import Clock
    from batchctl.config import Batch
    from batchctl.guard.run_locks import RunLocks, StepLock

LOOKED_AFTER_SECONDS = 1.0
"""From how long on a step is worth a look through all processes for what it left: shorter ones come in hundreds."""
RETRY_SECONDS, RETRY_LONGEST_SECONDS = 10.0, 600.0
"""The delay before the first retry, doubled for each further one up to the longest."""


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


class Runner:
    """One run of a batch."""

    def __init__(
        self,
        work: Work,
        setting: RunSetting,
        *,
        recorder: Recorder,
        clock: Clock,
        interruption: Interruption,
        log: logging.Logger,
        watch: Callable[[StepResult], None],
    ) -> None:
        self._plan = plan = work.plan
        self._attempts_before = work.attempts
        self._setting = setting
        self._recorder = recorder
        self._clock = clock
        self._interruption = interruption
        self._log = log
        self._watch = watch
        self.output = OutputCap(setting.batch.output_cap, log)
        self._guard = threading.Lock()
        self._stopped_by_policy = False
        self._cut_off = False
        self._results = {
            (step.account, step.step): StepResult(step.account, step.step, step.group, step.quantity)
            for step in plan.steps
        } | dict(work.done)

    def run(self) -> tuple[StepResult, ...]:
        """Run every account and return what became of each step, in the order of the plan."""
        workers = min(self._setting.batch.max_parallel, len(self._plan.accounts))
        with ThreadPoolExecutor(workers, thread_name_prefix="account") as pool:
            for future in [pool.submit(self._run_account, account) for account in self._plan.accounts]:
                future.result()
        return tuple(self._results.values())

    def outcome(self) -> str:
        """Sum up the run by what became of its steps."""
        outcomes = [result.outcome for result in self._results.values()]
        if self._interruption.count or (self._interruption.after_step and "not_run" in outcomes):
            return "stopped"
        if self._cut_off:
            return "timeout"
        if all(outcome == "success" for outcome in outcomes):
            return "success"
        if self._stopped_by_policy or "success" not in outcomes:
            return "failed"
        return "partial"

    def reason(self) -> str | None:
        """Say in words what ended the run, None if nothing cut it short."""
        outcome = self.outcome()
        if outcome == "stopped":
            return self._interruption.reason
        if outcome == "timeout":
            return f"the whole run reached its timeout of {self._setting.batch.timeout}"
        return 'on_failure = "stop"' if self._stopped_by_policy else None

    def _run_account(self, account: AccountPlan) -> None:
        if self._may_go_on():
            self._log.info("Account %s started (own process)", account.account)
        for stage in account.stages:
            if len(stage) == 1:
                self._run_step(stage[0])
                continue
            with ThreadPoolExecutor(len(stage), thread_name_prefix=account.account) as pool:
                for future in [pool.submit(self._run_step, step) for step in stage]:
                    future.result()

    def _may_go_on(self) -> bool:
        """Tell whether something that is still to be done may be begun."""
        if self._clock.monotonic() >= self._setting.deadline:
            self._cut_off = True
        return not (self._interruption.asked or self._stopped_by_policy or self._cut_off)

    def _run_step(self, step: PlannedStep) -> None:
        if self._results[step.account, step.step].outcome == "success":
            return  # done before the run was continued
        began = self._clock.monotonic()
        ending = None
        first = self._attempts_before.get((step.account, step.step), 0) + 1
        for attempt in range(first, first + step.retries + 1):
            if not self._may_go_on():
                break
            ending = self._attempt(step, attempt)
            self._note(step, ending, attempt, self._clock.monotonic() - began)
            if ending.outcome == "timeout" and self._clock.monotonic() >= self._setting.deadline:
                self._cut_off = True
            tried = attempt - first + 1
            if ending.outcome in ("success", "stopped") or tried > step.retries:
                break
            delay = min(RETRY_SECONDS * 2 ** (tried - 1), RETRY_LONGEST_SECONDS)
            delay = min(delay, max(self._setting.deadline - self._clock.monotonic(), 0))
            self._log.warning(
                "Step %s of account %s: attempt %d of %d %s; next in %ds",
                *(step.step, step.account, tried, step.retries + 1, _in_words(ending), delay),
            )
            again_at = self._clock.monotonic() + delay
            self._interruption.wait(delay, lambda: self._stopped_by_policy or self._clock.monotonic() >= again_at)  # noqa: B023 - waited for here
        if ending is not None:
            self._conclude(step, ending)

    def _conclude(self, step: PlannedStep, ending: Ending) -> None:
        result = self._results[step.account, step.step]
        if ending.outcome == "success":
            self._log.info("Step %s of account %s: success in %.1fs", step.step, step.account, result.duration_seconds)
            return
        level = self._log.info if ending.outcome == "stopped" else self._log.error
        level("Step %s of account %s: %s; output in %s", step.step, step.account, _in_words(ending), result.log)
        if ending.outcome != "stopped" and self._setting.batch.on_failure == "stop":
            self._stopped_by_policy = True
            # Other accounts may be waiting for a retry.
            self._interruption.look()

    def _attempt(self, step: PlannedStep, attempt: int) -> Ending:
        setting = self._setting
        log_path = setting.log_dir / step.account / f"{step.step}.log"
        key = {"account": step.account, "step": step.step, "attempt": attempt}
        known = {"group": step.group, "quantity": step.quantity, "log": str(log_path), "config_hash": step.config_hash}
        began = self._clock.monotonic()

        def started(child: Child) -> None:
            self._recorder.write(
                "step_started", {**key, **known, "pid": child.pid, "pid_start_ticks": child.start_ticks}
            )

        self._update(step, attempts=attempt, log=str(log_path), running=True)
        try:
            lock = setting.locks.step(step.account, step.step, attempt)
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
                        fill(text, batch=self._plan.batch, run_id=setting.run_id, step=step) for text in step.command
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
            "BATCHCTL_BATCH": self._plan.batch,
            "BATCHCTL_ACCOUNT": step.account,
            "BATCHCTL_STEP": step.step,
            "BATCHCTL_GROUP": step.group or "",
            "BATCHCTL_QUANTITY": str(step.quantity),
            "BATCHCTL_RUN_ID": self._setting.run_id,
            "BATCHCTL_ATTEMPT": str(attempt),
            "BATCHCTL_DEADLINE": self._setting.deadline_at.strftime("%Y-%m-%dT%H:%M:%SZ"),
        }

    def _note(self, step: PlannedStep, ending: Ending, attempt: int, duration: float) -> None:
        self._update(
            step,
            outcome=ending.outcome,
            exit_code=ending.exit_code,
            signal=ending.signal,
            reason=ending.reason,
            attempts=attempt,
            duration_seconds=round(duration, 3),
            running=False,
        )

    def _update(self, step: PlannedStep, **changes: Any) -> None:
        with self._guard:
            key = (step.account, step.step)
            self._results[key] = replace(self._results[key], **changes)
            self._watch(self._results[key])


def _in_words(ending: Ending) -> str:
    return f"{ending.outcome}{f' ({ending.reason})' if ending.reason else ''}"
