"""Walks the plan: accounts side by side, steps in order, deadline, retries, stop or continue, record."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from batchctl.batch.attempt import Attempts
from batchctl.batch.result import StepResult

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable

    from batchctl.batch.attempt import RunSetting
    from batchctl.batch.interruption import Interruption
    from batchctl.batch.plan import AccountPlan, PlannedStep
    from batchctl.batch.process import Ending
    from batchctl.batch.record import Recorder
    from batchctl.batch.resume import Work
    from batchctl.clock import Clock

RETRY_SECONDS, RETRY_LONGEST_SECONDS = 10.0, 600.0
"""The delay before the first retry, doubled for each further one up to the longest."""


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
        self._attempts = Attempts(
            plan.batch, setting, recorder=recorder, clock=clock, interruption=interruption, log=log
        )
        self._clock = clock
        self._interruption = interruption
        self._log = log
        self._watch = watch
        self.output = self._attempts.output
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
            self._wait_for_retry(delay)
        if ending is not None:
            self._conclude(step, ending)

    def _wait_for_retry(self, delay: float) -> None:
        again_at = self._clock.monotonic() + delay
        self._interruption.wait(delay, lambda: self._stopped_by_policy or self._clock.monotonic() >= again_at)

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
        log_path = self._setting.log_dir / step.account / f"{step.step}.log"
        self._update(step, attempts=attempt, log=str(log_path), running=True)
        return self._attempts.make(step, attempt, log_path)

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
