"""What a run will do: batch and options become accounts and steps in order (pure)."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from batchctl.errors import UsageError, choices

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import timedelta

    from batchctl.config import Batch, Step

TOKENS = re.compile(r"\{(batch|account|step|group|quantity|run_id)\}")


@dataclass(frozen=True)
class PlannedStep:
    """One step for one account."""

    account: str
    step: str
    group: str | None
    quantity: int
    timeout: timedelta
    retries: int
    command: tuple[str, ...]
    env: Mapping[str, str]

    @property
    def config_hash(self) -> str:
        """Sum up what the step is told to do; timeout and retries are how patiently, not what."""
        told = [self.command, sorted(self.env.items()), self.quantity]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class AccountPlan:
    """The steps of an account: stages one after another, the steps of a stage together."""

    account: str
    stages: tuple[tuple[PlannedStep, ...], ...]


@dataclass(frozen=True)
class Plan:
    """Everything that a run will do.

    Args:
        batch: Name of the batch.
        job: The batch, or batch/group if one group was asked for.
        groups: Groups whose steps take part.
        chosen_accounts: The accounts that options chose, None for all.
        chosen_steps: The steps that options chose, None for all of the job.
        accounts: What each account does.
    """

    batch: str
    job: str
    groups: tuple[str, ...]
    chosen_accounts: tuple[str, ...] | None
    chosen_steps: tuple[str, ...] | None
    accounts: tuple[AccountPlan, ...]

    @property
    def steps(self) -> tuple[PlannedStep, ...]:
        """List every step of every account in order."""
        return tuple(step for account in self.accounts for stage in account.stages for step in stage)

    @property
    def jobs(self) -> tuple[str, ...]:
        """Name the jobs for which a completion counts: the batch and each group that takes part."""
        return (self.batch, *(f"{self.batch}/{group}" for group in self.groups))


def make_plan(
    name: str, batch: Batch, *, accounts: Sequence[str] = (), group: str | None = None, steps: Sequence[str] = ()
) -> Plan:
    """Choose accounts and steps.

    Args:
        name: Name of the batch.
        batch: Its configuration.
        accounts: Only these accounts, in the order of the file whatever their order here.
        group: Only the steps of this group.
        steps: Only these steps, in the order of the file whatever their order here.

    Raises:
        UsageError: an option names something that the batch does not have.
    """
    for account in accounts:
        _require("--account", account, batch.accounts)
    _require("--group", group, batch.groups)
    for step in steps:
        _require("--step", step, tuple(known.id for known in batch.step))
    job_steps = [step for step in batch.step if group is None or step.group == group]
    chosen = [step for step in job_steps if not steps or step.id in steps]
    if not chosen:
        raise UsageError(f"--step {' --step '.join(steps)}: none of these steps is in the group {group!r}")
    taking_part = tuple(account for account in batch.accounts if not accounts or account in accounts)
    return Plan(
        batch=name,
        job=name if group is None else f"{name}/{group}",
        groups=tuple(dict.fromkeys(step.group for step in chosen if step.group is not None)),
        chosen_accounts=None if taking_part == batch.accounts else taking_part,
        chosen_steps=None if chosen == job_steps else tuple(step.id for step in chosen),
        accounts=tuple(AccountPlan(each, _stages(each, batch, chosen)) for each in taking_part),
    )


def fill(text: str, *, batch: str, run_id: str, step: PlannedStep) -> str:
    """Replace the known tokens of an argument; other braces stay as they are."""
    values = {
        "batch": batch,
        "account": step.account,
        "step": step.step,
        "group": step.group or "",
        "quantity": str(step.quantity),
        "run_id": run_id,
    }
    return TOKENS.sub(lambda match: values[match[1]], text)


def _stages(account: str, batch: Batch, steps: Sequence[Step]) -> tuple[tuple[PlannedStep, ...], ...]:
    def planned(step: Step) -> PlannedStep:
        return PlannedStep(
            account=account,
            step=step.id,
            group=step.group,
            quantity=batch.quantity_of(step),
            timeout=step.timeout or batch.step_timeout,
            retries=step.retries,
            command=step.command,
            env=step.env,
        )

    return tuple(tuple(planned(step) for step in stage) for stage in batch.stages(steps))


def _require(option: str, value: str | None, known: tuple[str, ...]) -> None:
    if value is not None and value not in known:
        raise UsageError(f"{option} {choices([value])}: no such {option[2:]}; known: {choices(known)}")
