"""How long a run is taken to last, by what its job took before (pure)."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from batchctl.logs import elapsed

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from batchctl.config import Batch, Step
    from batchctl.state.claim import PastRun

OVERDUE_FACTOR = 1.5
"""How many times its estimate a run may last before it is worth a warning."""
NEVER_OVERDUE = timedelta(seconds=5)
"""What a run may last in any case: batchctl looks at it no sooner, and such short runs vary by more than half."""


@dataclass(frozen=True)
class Estimate:
    """How long a run is taken to last.

    Args:
        seconds: That long.
        runs: How many successful runs say so; 0 if none did, and it is the configured timeout.
        scaled: Whether these had other quantities, or other steps or accounts, than are configured now.
        of_batch: Whether it is a group's, put together from its steps in runs of the whole batch.
    """

    seconds: float
    runs: int = 0
    scaled: bool = False
    of_batch: bool = False

    @property
    def duration(self) -> timedelta:
        """Return the same as a length of time."""
        return timedelta(seconds=self.seconds)

    @property
    def source(self) -> str:
        """Say for people where it comes from."""
        if not self.runs:
            return "the timeout, before a first success"
        last = f"the last {self.runs} successes" if self.runs > 1 else "the last success"
        if self.of_batch:
            return f"its steps in {last} of the whole batch"
        if self.scaled:
            return f"{last}, by today's quantities"
        return f"median of {last}" if self.runs > 1 else last

    @property
    def overdue_after(self) -> timedelta | None:
        """Return how long a run lasts that exceeds it by half; None if no run has shown how long that may be."""
        return max(self.duration * OVERDUE_FACTOR, NEVER_OVERDUE) if self.runs else None

    def __str__(self) -> str:
        return f"{elapsed(self.seconds)} ({self.source})"


def estimate(batch: Batch, group: str | None, past: Sequence[PastRun]) -> Estimate:
    """Say how long a batch, or one of its groups, is taken to run.

    Args:
        batch: Its configuration.
        group: The group; None for the whole batch.
        past: The last successful runs of this job that left nothing out; of a group that has none, of the whole batch.
    """
    steps = [step for step in batch.step if group in (None, step.group)]
    if any(run.of_batch for run in past):
        # Of such a run only its steps say anything about the group.
        ids = {step.id for step in steps}
        past = [run for run in past if any(each.step in ids for each in run.steps)]
        if past:
            return Estimate(_walked(batch, steps, past), len(past), of_batch=True)
    if not past:
        return Estimate(batch.timeout.total_seconds())
    today = {(account, step.id): batch.quantity_of(step) for account in batch.accounts for step in steps}
    # A run of which no step is recorded says nothing about quantities, nor does a group that is no longer configured.
    if not today or all(not run.steps or run.quantities == today for run in past):
        return Estimate(_median(run.seconds for run in past), len(past))
    return Estimate(_walked(batch, steps, past), len(past), scaled=True)


def step_seconds(batch: Batch, past: Sequence[PastRun]) -> dict[str, float]:
    """Say how long each step is taken to last, on average over the accounts; those that no run had are left out."""
    taken = {each.step for run in past for each in run.steps}
    return {
        step.id: sum(_step_seconds(batch, step, account, past) for account in batch.accounts) / len(batch.accounts)
        for step in batch.step
        if step.id in taken
    }


def _walked(batch: Batch, steps: Sequence[Step], past: Sequence[PastRun]) -> float:
    """Add up the steps as a run does: accounts beside each other, the stages of one after another."""
    stages = batch.stages(steps)
    # When each of the accounts that may run at a time is done with what it was given.
    busy_until = [0.0] * min(batch.max_parallel, len(batch.accounts))
    for account in batch.accounts:
        seconds = sum(max(_step_seconds(batch, step, account, past) for step in stage) for stage in stages)
        heapq.heappush(busy_until, heapq.heappop(busy_until) + seconds)
    return max(busy_until)


def _step_seconds(batch: Batch, step: Step, account: str, past: Sequence[PastRun]) -> float:
    quantity = batch.quantity_of(step)
    known = [each for run in past for each in run.steps if each.step == step.id]
    # A new account is taken to be as quick as the others.
    known = [each for each in known if each.account == account] or known
    if not known:
        return (step.timeout or batch.step_timeout).total_seconds()
    return _median(
        each.seconds if each.quantity in (quantity, 0) else each.seconds / each.quantity * quantity for each in known
    )


def _median(values: Iterable[float]) -> float:
    # Imported before a start is decided it would cost more than the decision.
    from statistics import median  # noqa: PLC0415

    return median(values)
