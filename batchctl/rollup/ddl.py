"""Makes what a rollup needs in the database: the plan, and its steps one after the other."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from batchctl.errors import ConfigurationError
from batchctl.rollup import apply, change, compose, partitions, views
from batchctl.rollup.apply import PATIENCE_SECONDS, Manner
from batchctl.rollup.definition import NEXT, Places, Table, differences, is_switch, next_name
from batchctl.rollup.drop import check_droppable, triggers_of
from batchctl.rollup.refresh import NO_LIMITS
from batchctl.rollup.source import find
from batchctl.rollup.steps import Step, completion, creation, removal, switch, tracking
from batchctl.rollup.swap import leftover, swap

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from batchctl.clock import Clock
    from batchctl.rollup.definition import Definition
    from batchctl.rollup.refresh import Limits
    from batchctl.rollup.source import Found
    from batchctl.rollup.swap import Change
    from batchctl.state.database import Session


@dataclass(frozen=True)
class Migrated:
    """What `migrate` did, or would do."""

    statements: tuple[str, ...]
    """The SQL, in order, transactions included."""
    created: tuple[str, ...]
    """Rollups that were new."""
    warnings: tuple[str, ...]
    changed: tuple[str, ...] = ()
    """Rollups whose tables were built anew."""
    discarded: tuple[str, ...] = ()
    """Rollups whose definition is again that of their tables, so that a half-built new version was dropped."""
    switched: tuple[str, ...] = ()
    """Rollups whose changes are noticed in the other way from now on: by triggers, or by `lookback`."""


@dataclass(frozen=True)
class _Plan:
    rollup: str
    places: Places
    steps: tuple[Step, ...]
    created: bool
    warnings: tuple[str, ...]
    change: Change | None = None
    discarded: bool = False
    switched: bool = False


def migrate(
    session: Session,
    definitions: Sequence[Definition],
    clock: Clock,
    *,
    dry_run: bool = False,
    patience: float = PATIENCE_SECONDS,
    logger: Callable[[str], logging.Logger] = logging.getLogger,
    say: Callable[[str], None] = lambda _: None,
    limits: Limits = NO_LIMITS,
) -> Migrated:
    """Make what the configured rollups lack; build those anew that have changed, and exchange their tables.

    Args:
        session: An open session, no transaction begun.
        definitions: All rollups of the configuration.
        clock: Waits between attempts to lock a source.
        dry_run: Only say what would be done.
        patience: Seconds after which a source that is never free is given up.
        logger: Makes the logger of a rollup that is built anew.
        say: Takes a line for somebody who waits.
        limits: How many chunks of new tables are built at a time.

    Raises:
        ConfigurationError: a rollup does not fit its source, or its tables are someone else's.
        BatchctlError: a source stayed locked, or new tables cannot be built; the next call goes on.
    """
    # All are checked before anything is made.
    with session.transaction():
        apply.exclude_others(session)
        plans = [_plan(session, definition) for definition in definitions]
        registered = session.fetch("rollup.registered")
    _refuse_shared_targets(plans)
    statements = [text for plan in plans for text in _text(session, plan)]
    if not dry_run:
        manner = Manner(clock, patience, logger, say, limits)
        for plan in plans:
            if plan.change:
                say(_announced(plan.change))
            if not _carry_out(session, plan, manner):
                # Another `migrate` was quicker, perhaps with another configuration, or a partition is new.
                return migrate(session, definitions, **manner._asdict())
    configured = {definition.name for definition in definitions}
    strangers = [row.rollup for row in registered if row.rollup not in configured and not row.rollup.endswith(NEXT)]
    return Migrated(
        statements=tuple(statements),
        created=tuple(plan.rollup for plan in plans if plan.created),
        warnings=(
            *(warning for plan in plans for warning in plan.warnings),
            *(
                f"rollup.{name} is in the database and not in the configuration: changes are still captured for it, "
                f"nothing aggregates them; `batchctl migrate --drop {name}` takes it away"
                for name in strangers
            ),
        ),
        changed=tuple(plan.rollup for plan in plans if plan.change),
        discarded=tuple(plan.rollup for plan in plans if plan.discarded),
        switched=tuple(plan.rollup for plan in plans if plan.switched),
    )


def _carry_out(session: Session, plan: _Plan, manner: Manner) -> bool:
    """Run a plan; False if it has to be made anew."""
    clock, patience = manner.clock, manner.patience
    if not all(apply.apply(session, step, clock, patience) for step in plan.steps):
        return False
    if plan.change is None:
        return True
    from batchctl.rollup.rebuild import fill  # noqa: PLC0415 - only a change is filled here

    if not fill(session, plan.change, manner):
        return False
    with session.transaction():
        apply.exclude_others(session)
        now = _plan(session, plan.change.definition)
        last = swap(session, now.change) if now.change and not now.steps else None
    if last is None or not apply.apply(session, last, clock, patience):
        return False
    manner.logger(plan.rollup).info("Rebuilt by its new definition: %s", "; ".join(plan.change.differences))
    return all(apply.apply(session, step, clock, patience) for step in change.discard(session, plan.rollup))


def _text(session: Session, plan: _Plan) -> Iterable[str]:
    if plan.change is None:
        return [*apply.text(session, plan.steps)]
    rest = removal(session, next_name(plan.rollup), None, leftover(session, plan.change))
    return [
        f"-- {_announced(plan.change)}",
        *apply.text(session, plan.steps),
        "-- Here the new tables are filled from the source, as `aggregate` does it; then they replace the old ones",
        *apply.text(session, [swap(session, plan.change), *rest]),
    ]


def _announced(changed: Change) -> str:
    return (
        f"rollup.{changed.definition.name} has changed ({'; '.join(changed.differences)}): its new tables are built "
        f"from {changed.found.places.source} beside the old ones, which stay as they are until those are ready"
    )


def _plan(session: Session, definition: Definition) -> _Plan:
    """Check one rollup against the database and list what is missing."""
    place = f"rollup.{definition.name}"
    registered = next((row for row in session.fetch("rollup.registered") if row.rollup == definition.name), None)
    before = dict(registered.definition) if registered is not None else definition.as_json()
    if "dropping" in before:
        raise ConfigurationError(
            f"{place} is being dropped; run `batchctl migrate --drop {definition.name}` again, then `batchctl migrate`"
        )
    complete = registered is not None and not before.pop("unfinished", False)
    changes, switched = differences(before, definition.as_json()), is_switch(before, definition.as_json())
    if switched:
        _check_switch(session, definition, changes)
    elif changes:
        return _plan_change(session, definition, registered, changes)
    discarded = change.discard(session, definition.name)
    found = find(session, definition, None if registered is None else Places.from_json(registered.places))
    steps, missed = tracking(session, definition, found, again=complete)
    warnings = _advice(session, definition, found)
    if registered is None or switched:
        warnings += _first_warnings(definition, found, switched=switched)
    if registered is None:
        # Before the triggers, because what they note has to be somebody's work.
        steps.insert(0, creation(session, definition, found))
    if lacking := views.missing(session, definition, found):
        steps.append(Step(lacking))
    # After the triggers: a partition that is not known is one that a tick gives its triggers.
    steps += partitions.remembering(session, definition, found.places.source, queued=switched or not complete)
    if switched:
        steps.append(switch(session, definition, before))
    if not complete:
        steps.append(completion(session, definition.name))
    elif missed and not switched:
        warnings.append(
            f"{place}: tracking was missing on {', '.join(missed)}; the next aggregate recomputes the history"
        )
    return _Plan(
        definition.name,
        found.places,
        (*discarded, *steps),
        created=not complete,
        warnings=tuple(warnings),
        discarded=complete and bool(discarded),
        switched=switched,
    )


def _plan_change(session: Session, definition: Definition, registered: Any, changes: Sequence[str]) -> _Plan:
    check_droppable(session, definition.name, registered, triggers_of(session, definition.name), "changed")
    beginning = change.begin(session, definition, registered, changes)
    found = beginning.change.found
    warnings = _advice(session, definition, found)
    if beginning.missed:
        warnings.append(
            f"rollup.{definition.name}: tracking was missing on {', '.join(beginning.missed)}; its new tables are "
            "built once more"
        )
    return _Plan(
        definition.name,
        found.places,
        beginning.steps,
        created=False,
        warnings=tuple(warnings),
        change=beginning.change,
    )


def _check_switch(session: Session, definition: Definition, changes: Sequence[str]) -> None:
    """Refuse what is more than taking `lookback` in or out, and what would fail halfway."""
    if len(changes) > 1:
        raise ConfigurationError(
            f"rollup.{definition.name} has changed ({'; '.join(changes)}): `lookback` cannot be set or taken out "
            "together with another change; undo one of them, run `batchctl migrate`, and then make the other"
        )
    if definition.lookback_seconds and (triggers := triggers_of(session, definition.name)):
        check_droppable(session, definition.name, None, triggers, "changed")


def _first_warnings(definition: Definition, found: Found, *, switched: bool) -> list[str]:
    """Say what the way means in which changes are noticed from now on."""
    place = f"rollup.{definition.name}"
    if definition.lookback_seconds:
        return [f"{place}: with lookback older changes are not noticed; `batchctl aggregate --rebuild` counts them"]
    if switched:
        return [f"{place}: triggers take the place of lookback; the next aggregate recomputes the history"]
    if definition.retention_seconds:
        return []
    text = "leave the rollup too, also when old rows are purged, unless source_retention is set"
    return [f"{place}: rows deleted from {found.places.source} {text}"]


def _advice(session: Session, definition: Definition, found: Found) -> list[str]:
    place, source, time = f"rollup.{definition.name}", found.places.source, definition.time
    warnings = []
    if not session.fetch_one("rollup.early_bins").correct:
        warnings.append(
            f"{place}: this server has a fault that loses events before the year 2000 at the very start of a bucket; "
            "install the latest minor release of PostgreSQL"
        )
    if not found.indexed:
        warnings.append(
            f"{place}: {source} has no index that starts with {time}, so each refresh reads the whole table; "
            f"CREATE INDEX CONCURRENTLY ON {compose.spelled(*source)} ({compose.spelled(time)}) makes it quick"
        )
    return warnings


def _refuse_shared_targets(plans: Iterable[_Plan]) -> None:
    """Refuse two tables under one name, which two spellings of it may hide in the configuration."""
    owners: dict[Table, str] = {}
    for plan in plans:
        for grain, target in plan.places.targets.items():
            owner = f"{plan.rollup}/{grain}"
            for table in (target, *views.views(plan.rollup, grain, target)[:2]):
                if table in owners:
                    raise ConfigurationError(
                        f"rollup.{plan.rollup}.target: {table} is the table or a view of {owners[table]} and of "
                        f"{owner}; expected names of its own for each"
                    )
                owners[table] = owner
