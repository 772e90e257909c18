"""What is left of a run that ended without success, and whether it may still be continued."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from batchctl.batch.plan import Plan, make_plan
from batchctl.batch.result import StepResult
from batchctl.errors import ConfigurationError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from batchctl.config import Batch
    from batchctl.state.store import Store


@dataclass(frozen=True)
class Wish:
    """Which run --resume asks for.

    Args:
        run_id: The run, None for the latest.
        group: Only a run of this group.
    """

    run_id: str | None
    group: str | None


@dataclass(frozen=True)
class Work:
    """What a start has to do.

    Args:
        plan: Accounts and steps, those that are done included.
        run_id: The run that is continued, None for a new one.
        resumed: How many times that one had been continued before.
        done: Steps that need not run again, by account and step.
        attempts: How many attempts at a step there were before.
    """

    plan: Plan
    run_id: str | None = None
    resumed: int | None = None
    done: Mapping[tuple[str, str], StepResult] = field(default_factory=dict)
    attempts: Mapping[tuple[str, str], int] = field(default_factory=dict)


def find_work(store: Store, name: str, batch: Batch, wish: Wish) -> Work:
    """Choose the run that is to be continued, and what of it is left.

    Raises:
        UsageError: there is no such run, or it succeeded.
        ConfigurationError: a step that is done is no longer configured as it was.
    """
    job = None if wish.group is None else f"{name}/{wish.group}"
    run = store.resumable(name, job=job, run_id=wish.run_id)
    if run is None or run.outcome == "success":
        found = (
            f"run {run.run_id} succeeded"
            if run is not None
            else f"{job or name} has no run {wish.run_id}"
            if wish.run_id is not None
            else f"{job or name} has no run left to continue"
        )
        raise UsageError(f"nothing to resume: {found}; `batchctl history {name}` lists the runs, --run names one")
    group = run.job.partition("/")[2]
    plan = make_plan(
        name,
        batch,
        accounts=_remaining(run, "account", run.accounts, batch.accounts),
        group=_remaining(run, "group", [group], batch.groups)[0] if group else None,
        steps=_remaining(run, "step", run.steps, [step.id for step in batch.step]),
    )
    attempts = store.attempts(run.run_id)
    done = [attempt for attempt in attempts if attempt.outcome == "success"]
    _refuse_changed(run, plan, done)
    return Work(
        plan,
        run.run_id,
        run.resumed,
        done={(each.account, each.step): _result(each) for each in done},
        attempts={(each.account, each.step): each.attempt for each in attempts},
    )


def _refuse_changed(run: Any, plan: Plan, done: Iterable[Any]) -> None:
    now = {(step.account, step.step): step.config_hash for step in plan.steps}
    changed = []
    for attempt in done:
        found = now.get((attempt.account, attempt.step))
        if found is None:
            changed.append(f"step {attempt.step} of account {attempt.account} is gone")
        elif attempt.config_hash not in (None, found):
            changed.append(f"step {attempt.step} of account {attempt.account} has another command, env or quantity")
    if changed:
        raise ConfigurationError(
            f"run {run.run_id} cannot be resumed, because the configuration of finished steps changed: "
            f"{'; '.join(changed)}; put it back, or start a new run"
        )


def _remaining(run: Any, what: str, chosen: Sequence[str] | None, known: Sequence[str]) -> Sequence[str]:
    remaining = [name for name in chosen or () if name in known]
    if chosen and not remaining:
        raise ConfigurationError(
            f"run {run.run_id} cannot be resumed: its {what} {', '.join(chosen)} is no longer configured; "
            "start a new run"
        )
    return remaining


def _result(attempt: Any) -> StepResult:
    return StepResult(
        attempt.account,
        attempt.step,
        attempt.step_group,
        attempt.quantity,
        outcome=attempt.outcome,
        exit_code=attempt.exit_code,
        signal=attempt.signal,
        reason=attempt.reason,
        attempts=attempt.attempt,
        duration_seconds=attempt.duration_seconds,
        log=attempt.log,
    )
