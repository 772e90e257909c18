"""Composes what a rollup needs in the database: tables, trigger function, triggers, and their end."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from batchctl.errors import ConfigurationError
from batchctl.rollup import compose, views
from batchctl.rollup.definition import CAPTURE, NEXT, Places, Table
from batchctl.state.database import sql

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from batchctl.rollup.definition import Definition
    from batchctl.rollup.source import Found
    from batchctl.state.database import Session

EVENTS = ("insert", "update", "delete", "truncate")
# Whoever waits for a lock on the source makes the application wait behind it, so the wait is short and often repeated.
LOCK_MILLISECONDS = 200
LOCK_TIMEOUT = {"55P03", "40P01"}
"""SQLSTATE of a lock that was not free in time, or that would have been a deadlock."""


@dataclass(frozen=True)
class Step:
    """Statements of one transaction."""

    statements: tuple[sql.Composed, ...]
    locks: str = ""
    """The table of the application that they lock."""
    expects: tuple[tuple[str, Mapping[str, Any] | None], ...] = ()
    """Rollups and the definitions that are registered for them, None for none; otherwise another migration was quicker,
    and there is nothing left to do."""


def creation(session: Session, definition: Definition, found: Found) -> Step:
    """Make the tables and register the rollup in one transaction, so that a table of ours is always known as such."""
    rollup = sql.Literal(definition.name)
    statements = []
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
        statements.append(session.statement("rollup.identify_target", target=sql.Identifier(*target)))
        statements += comments(session, definition, found.places, grain.name)
    described = {**definition.as_json(), "places": found.places.as_json(), "unfinished": True}
    statements.append(
        session.statement("rollup.register", rollup=rollup, definition=sql.Literal(json.dumps(described)))
    )
    statements += [
        session.statement("rollup.register_job", job=sql.Literal(definition.job(grain.name)))
        for grain in definition.grains
    ]
    return Step(tuple(statements), expects=((definition.name, None),))


def tracking(
    session: Session, definition: Definition, found: Found, *, again: bool, afresh: bool = False
) -> tuple[list[Step], list[str]]:
    """List the steps that install what is missing of the function and the triggers, and the tables that lacked some.

    With `lookback`, those that take away what there is of them.

    Args:
        session: An open session.
        definition: The rollup.
        found: What the database says about it.
        again: True if it was complete before, so that changes may have been missed.
        afresh: True if what is there will be gone before the steps are run.

    Raises:
        ConfigurationError: a trigger of somebody else has a name that we need.
    """
    function = compose.function_name(definition.name)
    body = _body(session, definition)
    ours: dict[str, Any] = {"function": function, "schema_name": session.schema_name}
    present = session.fetch_one("rollup.find_function", **ours)
    if definition.lookback_seconds:
        if afresh or present is None:
            return [], []
        return [*_untracking(session, session.fetch("rollup.find_triggers", **ours)), _end(session, function)], []
    steps = []
    if afresh or present is None or present.body != body:
        identifier = sql.Identifier(function)
        create = session.statement("rollup.create_function", function=identifier, body=compose.dollar_quoted(body))
        steps.append(Step((create, session.statement("rollup.close_function", function=identifier))))
    tracked = {
        (row.schema, row.table, row.trigger) for row in session.fetch("rollup.find_triggers", **ours) if row.enabled
    }
    names = trigger_names(session.schema_name, definition.name)
    missed = []
    for table in found.tables:
        missing = [event for event in EVENTS if afresh or (*table, names[event]) not in tracked]
        if not missing:
            continue
        missed.append(str(table))
        strange = session.fetch("rollup.find_strange_triggers", table_schema=table.schema, table=table.name, **ours)
        if taken := {row.trigger for row in strange} & set(names.values()):
            raise ConfigurationError(
                f"rollup.{definition.name}: {table} has a trigger {min(taken)} that was not made by batchctl for this "
                "rollup; rename that trigger"
            )
        statements = [_trigger(session, definition, table, event) for event in missing]
        if again:
            statements.append(
                session.statement(
                    "rollup.forget_history",
                    rollup=sql.Literal(definition.name),
                    grain=sql.Literal(definition.finest.name),
                )
            )
        steps.append(Step(tuple(statements), locks=str(table)))
    return steps, missed


def trigger_names(schema: str, rollup: str) -> dict[str, str]:
    """Name the triggers of a rollup, by what fires them."""
    return {event: compose.trigger_name(schema, rollup, event) for event in EVENTS}


def missing_triggers(session: Session, definition: Definition, table: Table) -> list[sql.Composed]:
    """List the statements that give one table the triggers that it lacks."""
    function = compose.function_name(definition.name)
    rows = session.fetch("rollup.find_triggers", function=function, schema_name=session.schema_name)
    present = {row.trigger for row in rows if row.enabled and (row.schema, row.table) == table}
    wanted = trigger_names(session.schema_name, definition.name)
    return [_trigger(session, definition, table, event) for event in EVENTS if wanted[event] not in present]


def _trigger(session: Session, definition: Definition, table: Table, event: str) -> sql.Composed:
    return session.statement(
        f"rollup.create_trigger_{event}",
        trigger=sql.Identifier(compose.trigger_name(session.schema_name, definition.name, event)),
        table=sql.Identifier(*table),
        function=sql.Identifier(compose.function_name(definition.name)),
    )


def completion(session: Session, rollup: str) -> Step:
    """Let ticks begin, as the last step of a new rollup."""
    return Step((session.statement("rollup.allow_ticks", rollup=sql.Literal(rollup)),))


def removal(session: Session, name: str, registered: Any, triggers: Iterable[Any]) -> list[Step]:
    """List the steps that take a rollup away.

    Args:
        session: An open session.
        name: The rollup.
        registered: Its row of the registry, None if that is gone already.
        triggers: Those that call its function.
    """
    rollup = sql.Literal(name)
    steps = []
    if registered is not None:
        steps.append(Step((session.statement("rollup.refuse_ticks", rollup=rollup),)))
    steps += _untracking(session, triggers)
    last = [session.statement("rollup.drop_function", function=sql.Identifier(compose.function_name(name)))]
    if registered is not None:
        targets = Places.from_json(registered.places).targets
        for grain, target in targets.items():
            last += views.removal(session, name, grain, target)
        last += [session.statement("rollup.drop_target", table=sql.Identifier(*table)) for table in targets.values()]
        last += [
            session.statement("rollup.forget_job", job=sql.Literal(f"{name}/{grain}"))
            for grain in registered.definition["grains"]
        ]
    forgotten = ("forget_notes", "forget_queue", "forget_partitions", "forget_pause", "forget")
    last += [session.statement(f"rollup.{key}", rollup=rollup) for key in forgotten]
    return [*steps, Step(tuple(last), locks=f"a table of rollup.{name.removesuffix(NEXT)}")]


def switch(session: Session, definition: Definition, before: Mapping[str, Any]) -> Step:
    """Register how changes are noticed from now on; without triggers no partition is followed.

    Args:
        session: An open session.
        definition: The rollup.
        before: The definition that is registered.
    """
    rollup = sql.Literal(definition.name)
    capture = {key: value for key, value in definition.as_json().items() if key == CAPTURE}
    statements = [session.statement("rollup.switch_capture", rollup=rollup, capture=sql.Literal(json.dumps(capture)))]
    if definition.lookback_seconds:
        statements.append(session.statement("rollup.forget_partitions", rollup=rollup))
    return Step(tuple(statements), expects=((definition.name, before),))


def _untracking(session: Session, triggers: Iterable[Any]) -> list[Step]:
    tables: dict[Table, list[sql.Composed]] = {}
    for row in triggers:
        table = Table(row.schema, row.table)
        tables.setdefault(table, []).append(
            session.statement("rollup.drop_trigger", trigger=sql.Identifier(row.trigger), table=sql.Identifier(*table))
        )
    return [Step(tuple(statements), locks=str(table)) for table, statements in tables.items()]


def _end(session: Session, function: str) -> Step:
    return Step((session.statement("rollup.drop_function", function=sql.Identifier(function)),))


def comments(session: Session, definition: Definition, places: Places, grain: str) -> Iterable[sql.Composed]:
    """List the statements that say what the table of a grain and its columns are."""
    finer = definition.finer(grain)
    origin = places.targets[finer.name] if finer else places.source
    table = sql.Identifier(*places.targets[grain])
    text = f"Rollup {definition.name}: {origin} in buckets of {grain}; kept by batchctl, not to be written by hand."
    yield session.statement("rollup.comment_table", table=table, text=sql.Literal(text))
    zone = definition.grain(grain).zone
    what = f"which is a day in {zone}" if zone else f"which is {grain} long"
    texts = {"bucket": f"Start of the bucket, {what} and does not hold its end; UTC."}
    texts |= {name: f"Dimension {name} of {places.source}." for name in definition.dimensions}
    for measure in definition.measures:
        texts |= {part.column: str(part) for part in measure.parts}
        texts[measure.name] = str(measure)
    for column, comment in texts.items():
        yield session.statement(
            "rollup.comment_column", table=table, column=sql.Identifier(column), text=sql.Literal(comment)
        )


def _body(session: Session, definition: Definition) -> str:
    finest = definition.finest
    pieces = {
        "rollup": sql.Literal(definition.name),
        "grain": sql.Literal(finest.name),
        "bucket": compose.bucket_of(session, finest, sql.Identifier(definition.time)),
    }
    body = session.statement(
        "rollup.capture_body",
        **pieces,
        time=sql.Identifier(definition.time),
        touched=session.statement("rollup.touched", **pieces),
    )
    return f"\n{body.as_string()}\n"
