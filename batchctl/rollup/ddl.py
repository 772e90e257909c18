"""Makes and takes away what a rollup needs in the database: the plan, and its steps one after the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from batchctl.errors import BatchctlError, ConfigurationError, UsageError
from batchctl.rollup import compose, partitions, views
from batchctl.rollup.definition import Places, Table, differences
from batchctl.rollup.source import find
from batchctl.rollup.steps import LOCK_MILLISECONDS, LOCK_TIMEOUT, Step, completion, creation, removal, tracking
from batchctl.state.database import sql

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from batchctl.clock import Clock
    from batchctl.rollup.definition import Definition
    from batchctl.state.database import Session

PAUSE_SECONDS = 0.8
PATIENCE_SECONDS = 30.0


@dataclass(frozen=True)
class Migrated:
    """What `migrate` did, or would do."""

    statements: tuple[str, ...]
    """The SQL, in order, transactions included."""
    created: tuple[str, ...]
    """Rollups that were new."""
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Plan:
    rollup: str
    places: Places
    steps: tuple[Step, ...]
    created: bool
    warnings: tuple[str, ...]


def migrate(
    session: Session,
    definitions: Sequence[Definition],
    clock: Clock,
    *,
    dry_run: bool = False,
    patience: float = PATIENCE_SECONDS,
) -> Migrated:
    """Make tables and triggers of the configured rollups, where they are missing.

    Args:
        session: An open session, no transaction begun.
        definitions: All rollups of the configuration.
        clock: Waits between attempts to lock a source.
        dry_run: Only say what would be done.
        patience: Seconds after which a source that is never free is given up.

    Raises:
        ConfigurationError: a rollup does not fit its source, has changed, or its tables are someone else's.
        BatchctlError: a source stayed locked; what is missing is made by the next call.
    """
    # All are checked before anything is made.
    with session.transaction():
        _exclude_others(session)
        plans = [_plan(session, definition) for definition in definitions]
        registered = session.fetch("rollup.registered")
    _refuse_shared_targets(plans)
    steps = [step for plan in plans for step in plan.steps]
    if not dry_run:
        for step in steps:
            if not _apply(session, step, clock, patience):
                # Another `migrate` was quicker, perhaps with another configuration.
                return migrate(session, definitions, clock, patience=patience)
    configured = {definition.name for definition in definitions}
    strangers = [row.rollup for row in registered if row.rollup not in configured]
    return Migrated(
        statements=tuple(_text(session, steps)),
        created=tuple(plan.rollup for plan in plans if plan.created),
        warnings=(
            *(warning for plan in plans for warning in plan.warnings),
            *(
                f"rollup.{name} is in the database and not in the configuration: changes are still captured for it, "
                f"nothing aggregates them; `batchctl migrate --drop {name}` takes it away"
                for name in strangers
            ),
        ),
    )


def drop(
    session: Session, name: str, clock: Clock, *, dry_run: bool = False, patience: float = PATIENCE_SECONDS
) -> tuple[str, ...]:
    """Take triggers, function, tables, queue and state of a rollup away; return the SQL.

    Raises:
        UsageError: there is no such rollup in the database.
        ConfigurationError: a table belongs to another role.
        BatchctlError: a table stayed locked, or something else depends on one; call again.
    """
    rows = session.fetch("rollup.registered")
    registered = next((row for row in rows if row.rollup == name), None)
    function = compose.function_name(name)
    triggers = session.fetch("rollup.find_triggers", function=function, schema_name=session.schema_name)
    if registered is None and not triggers:
        known = ", ".join(row.rollup for row in rows) or "(none)"
        raise UsageError(f"rollup {name!r} is not in the database; expected one of {known}")
    _check_droppable(session, name, registered, triggers)
    steps = removal(session, name, registered, triggers)
    if not dry_run:
        for step in steps:
            _apply(session, step, clock, patience)
    return tuple(_text(session, steps))


def _check_droppable(session: Session, name: str, registered: Any, triggers: Iterable[Any]) -> None:
    """Refuse what would fail later, half dropped."""
    # A source first: what is said of a target holds for a table that is both.
    wanted = {Table(row.schema, row.table): False for row in triggers}
    if registered is not None:
        targets = Places.from_json(registered.places).targets
        wanted |= dict.fromkeys(targets.values(), True)
        for grain, target in targets.items():
            wanted |= dict.fromkeys(views.existing(session, name, grain, target), True)
    rows = session.fetch(
        "rollup.undroppable",
        schemas=[table.schema for table in wanted],
        names=[table.name for table in wanted],
        targets=list(wanted.values()),
    )
    if foreign := [row.table for row in rows if row.foreign]:
        raise ConfigurationError(
            f"rollup.{name} cannot be dropped by this role, which does not own {', '.join(foreign)}; "
            "connect as the owner, or as a member of it"
        )
    if depending := [f"{', '.join(row.dependants)} on {row.table}" for row in rows if row.dependants]:
        raise BatchctlError(
            f"rollup.{name} cannot be dropped, because something else depends on its tables: {'; '.join(depending)}"
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
    if changes := differences(before, definition.as_json()):
        raise ConfigurationError(
            f"{place}: changed since it was migrated ({'; '.join(changes)}); `batchctl migrate --drop "
            f"{definition.name}` and then `batchctl migrate` rebuild it from the source"
        )
    found = find(session, definition, None if registered is None else Places.from_json(registered.places))
    steps, missed = tracking(session, definition, found, again=complete)
    source, time = found.places.source, definition.time
    warnings = []
    if not session.fetch_one("rollup.early_bins").correct:
        warnings.append(
            f"{place}: this server has a fault that loses events before the year 2000 at the very start of a bucket; "
            "install the latest minor release of PostgreSQL"
        )
    if not found.indexed:
        warnings.append(
            f"{place}: {source} has no index that starts with {time}, so each refresh reads the whole table; "
            f"CREATE INDEX CONCURRENTLY ON {source} ({time}) makes it quick"
        )
    if registered is None:
        if not definition.retention_seconds:
            warnings.append(
                f"{place}: rows deleted from {source} leave the rollup too, also when old rows are purged, "
                "unless source_retention is set"
            )
        # Before the triggers, because what they note has to be somebody's work.
        steps.insert(0, creation(session, definition, found))
    if lacking := views.missing(session, definition, found):
        steps.append(Step(lacking))
    # After the triggers: a partition that is not known is one that a tick gives its triggers.
    steps += partitions.remembering(session, definition, found.places.source, queued=not complete)
    if not complete:
        steps.append(completion(session, definition.name))
    elif missed:
        warnings.append(
            f"{place}: tracking was missing on {', '.join(missed)}; the next aggregate recomputes the history"
        )
    return _Plan(definition.name, found.places, tuple(steps), created=not complete, warnings=tuple(warnings))


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


def _exclude_others(session: Session) -> None:
    # The lock is only ours, so no timeout that the role has for the application's sake may end the wait for it.
    session.run(session.statement("rollup.set_lock_timeout", milliseconds=sql.Literal(0)))
    session.run(_one_migration(session))


def _one_migration(session: Session) -> sql.Composed:
    return session.statement("rollup.one_migration", name=sql.Literal(session.schema_name))


def _apply(session: Session, step: Step, clock: Clock, patience: float) -> bool:
    """Run a step in a transaction, again and again while a table that it locks is busy; False if it is obsolete."""
    give_up = clock.monotonic() + patience
    while True:
        try:
            with session.transaction():
                return _run(session, step)
        except BatchctlError as error:
            if getattr(error.__cause__, "sqlstate", None) not in LOCK_TIMEOUT:
                raise
            if clock.monotonic() >= give_up:
                raise BatchctlError(
                    f"{step.locks} was locked for {patience:.0f} s, by a long transaction or another migration; what "
                    "was done so far stays. Run the command again when that has ended (pg_stat_activity shows it)"
                ) from error
        clock.sleep(PAUSE_SECONDS)


def _run(session: Session, step: Step) -> bool:
    _exclude_others(session)
    if step.registers and any(row.rollup == step.registers for row in session.fetch("rollup.registered")):
        return False
    if step.locks:
        session.run(session.statement("rollup.set_lock_timeout", milliseconds=sql.Literal(LOCK_MILLISECONDS)))
    for statement in step.statements:
        session.run(statement)
    return True


def _text(session: Session, steps: Iterable[Step]) -> Iterable[str]:
    for step in steps:
        yield "BEGIN;"
        yield "SET LOCAL lock_timeout = 0;"
        yield f"{_one_migration(session).as_string()};"
        if step.locks:
            yield f"SET LOCAL lock_timeout = {LOCK_MILLISECONDS};"
        yield from (f"{statement.as_string()};" for statement in step.statements)
        yield "COMMIT;"
