"""Makes and takes away what a rollup needs in the database: tables, trigger function, triggers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from batchctl.errors import BatchctlError, ConfigurationError, UsageError
from batchctl.rollup import compose
from batchctl.rollup.definition import Places, Table, differences
from batchctl.rollup.source import find
from batchctl.state.database import sql

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from batchctl.clock import Clock
    from batchctl.rollup.definition import Definition
    from batchctl.rollup.source import Found
    from batchctl.state.database import Session

EVENTS = ("insert", "update", "delete", "truncate")
# Whoever waits for a lock on the source makes the application wait behind it, so the wait is short and often repeated.
LOCK_MILLISECONDS = 200
PAUSE_SECONDS = 0.8
PATIENCE_SECONDS = 30.0
LOCK_TIMEOUT = {"55P03", "40P01"}
"""SQLSTATE of a lock that was not free in time, or that would have been a deadlock."""


@dataclass(frozen=True)
class Migrated:
    """What `migrate` did, or would do."""

    statements: tuple[str, ...]
    """The SQL, in order, transactions included."""
    created: tuple[str, ...]
    """Rollups that were new."""
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Step:
    """Statements of one transaction."""

    statements: tuple[sql.Composed, ...]
    locks: str = ""
    """The table of the application that they lock."""
    rollup: str = ""
    """The rollup that they register."""


@dataclass(frozen=True)
class _Plan:
    steps: tuple[_Step, ...]
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
    plans = [_plan(session, definition) for definition in definitions]
    steps = [step for plan in plans for step in plan.steps]
    if not dry_run:
        for step in steps:
            _apply(session, step, clock, patience)
    configured = {definition.name for definition in definitions}
    strangers = [row.rollup for row in session.fetch("rollup.registered") if row.rollup not in configured]
    return Migrated(
        statements=tuple(_text(steps)),
        created=tuple(definition.name for definition, plan in zip(definitions, plans, strict=True) if plan.created),
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
        BatchctlError: a table stayed locked, or something else depends on one; call again.
    """
    rows = session.fetch("rollup.registered")
    registered = next((row for row in rows if row.rollup == name), None)
    function = _function(name)
    triggers = session.fetch("rollup.find_triggers", function=function, schema_name=session.schema_name)
    if registered is None and not triggers:
        known = ", ".join(row.rollup for row in rows) or "(none)"
        raise UsageError(f"rollup {name!r} is not in the database; expected one of {known}")
    literal = sql.Literal(name)
    steps = []
    if registered is not None:
        steps.append(_Step((session.statement("rollup.refuse_ticks", rollup=literal),)))
    for table in dict.fromkeys(Table(row.schema, row.table) for row in triggers):
        own = [row.trigger for row in triggers if (row.schema, row.table) == table]
        steps.append(_Step(tuple(_drop_trigger(session, trigger, table) for trigger in own), locks=str(table)))
    last = [session.statement("rollup.drop_function", function=sql.Identifier(function))]
    if registered is not None:
        targets = Places.from_json(registered.places).targets
        last += [session.statement("rollup.drop_target", table=sql.Identifier(*table)) for table in targets.values()]
        last += [
            session.statement("rollup.forget_job", job=sql.Literal(f"{name}/{grain}"))
            for grain in registered.definition["grains"]
        ]
    last += [session.statement(f"rollup.{key}", rollup=literal) for key in ("forget_queue", "forget")]
    steps.append(_Step(tuple(last), locks=f"the tables of rollup.{name}"))
    if not dry_run:
        for step in steps:
            _apply(session, step, clock, patience)
    return tuple(_text(steps))


def _plan(session: Session, definition: Definition) -> _Plan:
    """Check one rollup against the database and list what is missing."""
    place = f"rollup.{definition.name}"
    registered = next((row for row in session.fetch("rollup.registered") if row.rollup == definition.name), None)
    if registered is not None and (changes := differences(registered.definition, definition.as_json())):
        raise ConfigurationError(
            f"{place}: changed since it was migrated ({'; '.join(changes)}); `batchctl migrate --drop "
            f"{definition.name}` and then `batchctl migrate` rebuild it from the source"
        )
    before = None if registered is None else Places.from_json(registered.places)
    found = find(session, definition, before)
    tracking, missed = _tracking(session, definition, found, again=registered is not None)
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
        warnings.append(f"{place}: rows deleted from {source} leave the rollup too, also when old rows are purged")
        creation = _creation(session, definition, found)
        return _Plan((*tracking, creation), created=True, warnings=tuple(warnings))
    if missed:
        warnings.append(
            f"{place}: tracking was missing on {', '.join(missed)}; the next aggregate recomputes the history"
        )
    return _Plan(tracking, created=False, warnings=tuple(warnings))


def _tracking(
    session: Session, definition: Definition, found: Found, *, again: bool
) -> tuple[tuple[_Step, ...], list[str]]:
    """List the steps that install what is missing of the function and the triggers, and the tables that lacked some."""
    function = _function(definition.name)
    body = _body(session, definition)
    present = session.fetch_one("rollup.find_function", function=function, schema_name=session.schema_name)
    steps = []
    if present is None or present.body != body:
        steps.append(
            _Step(
                (
                    session.statement(
                        "rollup.create_function", function=sql.Identifier(function), body=_dollar_quoted(body)
                    ),
                    session.statement("rollup.close_function", function=sql.Identifier(function)),
                )
            )
        )
    rows = session.fetch("rollup.find_triggers", function=function, schema_name=session.schema_name)
    tracked = {(row.schema, row.table, row.trigger) for row in rows if row.enabled}
    missed = []
    for name in found.tables:
        missing = [event for event in EVENTS if (*name, _trigger(session, definition, event)) not in tracked]
        if not missing:
            continue
        missed.append(str(name))
        statements = [
            session.statement(
                f"rollup.create_trigger_{event}",
                trigger=sql.Identifier(_trigger(session, definition, event)),
                table=sql.Identifier(*name),
                function=sql.Identifier(function),
            )
            for event in missing
        ]
        if again:
            statements.append(session.statement("rollup.forget_history", rollup=sql.Literal(definition.name)))
        steps.append(_Step(tuple(statements), locks=str(name)))
    return tuple(steps), missed


def _creation(session: Session, definition: Definition, found: Found) -> _Step:
    """Make the tables and register the rollup in one transaction, so that a table of ours is always known as such."""
    rollup = sql.Literal(definition.name)
    statements = [session.statement("rollup.one_migration", rollup=rollup)]
    for grain in definition.grains:
        target = found.places.targets[grain.name]
        statements.append(
            session.statement(
                "rollup.create_target",
                target=sql.Identifier(*target),
                columns=sql.SQL(",\n    ").join(
                    sql.SQL("{} {}").format(sql.Identifier(column), compose.literally(kind))
                    for column, kind in found.columns
                ),
                constraint=sql.Identifier(compose.constraint_name(target)),
                key=compose.COMMA.join(map(sql.Identifier, definition.key)),
            )
        )
        statements += _comments(session, definition, found.places, grain.name)
    described = json.dumps({**definition.as_json(), "places": found.places.as_json()})
    statements.append(session.statement("rollup.register", rollup=rollup, definition=sql.Literal(described)))
    statements += [
        session.statement("rollup.register_job", job=sql.Literal(definition.job(grain.name)))
        for grain in definition.grains
    ]
    return _Step(tuple(statements), rollup=definition.name)


def _comments(session: Session, definition: Definition, places: Places, grain: str) -> Iterable[sql.Composed]:
    finer = definition.finer(grain)
    origin = places.targets[finer.name] if finer else places.source
    table = sql.Identifier(*places.targets[grain])
    text = f"Rollup {definition.name}: {origin} in buckets of {grain}; kept by batchctl, not to be written by hand."
    yield session.statement("rollup.comment_table", table=table, text=sql.Literal(text))
    texts = {"bucket": f"Start of the bucket, which is {grain} long and does not hold its end; UTC."}
    texts |= {name: f"Dimension {name} of {places.source}." for name in definition.dimensions}
    for measure in definition.measures:
        texts |= {part.column: f"{part.function}({part.expression})" for part in measure.parts}
        texts[measure.name] = str(measure)
    for column, comment in texts.items():
        yield session.statement(
            "rollup.comment_column", table=table, column=sql.Identifier(column), text=sql.Literal(comment)
        )


def _apply(session: Session, step: _Step, clock: Clock, patience: float) -> None:
    """Run a step in a transaction, again and again while a table that it locks is busy."""
    give_up = clock.monotonic() + patience
    while True:
        try:
            with session.transaction():
                _run(session, step)
        except BatchctlError as error:
            if getattr(error.__cause__, "sqlstate", None) not in LOCK_TIMEOUT:
                raise
            if clock.monotonic() >= give_up:
                raise BatchctlError(
                    f"{step.locks} was locked for {patience:.0f} s, by a long transaction or another migration; what "
                    "was done so far stays. Run the command again when that has ended (pg_stat_activity shows it)"
                ) from error
        else:
            return
        clock.sleep(PAUSE_SECONDS)


def _run(session: Session, step: _Step) -> None:
    if step.locks:
        session.run(session.statement("rollup.set_lock_timeout", milliseconds=sql.Literal(LOCK_MILLISECONDS)))
    first, *rest = step.statements
    session.run(first)
    # Another `migrate` may have been quicker while this one waited.
    if step.rollup and any(row.rollup == step.rollup for row in session.fetch("rollup.registered")):
        return
    for statement in rest:
        session.run(statement)


def _text(steps: Iterable[_Step]) -> Iterable[str]:
    for step in steps:
        yield "BEGIN;"
        if step.locks:
            yield f"SET LOCAL lock_timeout = {LOCK_MILLISECONDS};"
        yield from (f"{statement.as_string()};" for statement in step.statements)
        yield "COMMIT;"


def _body(session: Session, definition: Definition) -> str:
    finest = definition.finest
    body = session.statement(
        "rollup.capture_body",
        rollup=sql.Literal(definition.name),
        grain=sql.Literal(finest.name),
        width=sql.SQL("interval {}").format(sql.Literal(f"{finest.seconds} seconds")),
        time=sql.Identifier(definition.time),
    )
    return f"\n{body.as_string()}\n"


def _dollar_quoted(body: str) -> sql.SQL:
    tag = "$batchctl$"
    while tag in body:
        tag = f"{tag[:-1]}_$"
    return compose.literally(f"{tag}{body}{tag}")


def _function(rollup: str) -> str:
    return compose.short(f"capture_{rollup}")


def _trigger(session: Session, definition: Definition, event: str) -> str:
    return compose.short(f"{session.schema_name}_{definition.name}_{event}")


def _drop_trigger(session: Session, trigger: str, table: Table) -> sql.Composed:
    return session.statement("rollup.drop_trigger", trigger=sql.Identifier(trigger), table=sql.Identifier(*table))
