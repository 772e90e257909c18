"""Puts the new version of a rollup in the place of the old one, in one short transaction."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from batchctl.rollup import compose, views
from batchctl.rollup.definition import Places, Table, next_name
from batchctl.rollup.steps import Step, comments, tracking, trigger_names
from batchctl.state.database import sql

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from batchctl.rollup.definition import Definition
    from batchctl.rollup.source import Found
    from batchctl.state.database import Session


@dataclass(frozen=True)
class Change:
    """A rollup whose definition is no longer that of its tables."""

    before: Any
    """Its row of the registry."""
    definition: Definition
    """As it is configured."""
    found: Found
    """What the database says about that, under the names that it will have."""
    differences: tuple[str, ...]

    @property
    def expected(self) -> tuple[str, Mapping[str, Any]]:
        """Name the rollup and the definition that is to be replaced."""
        old = {key: value for key, value in self.before.definition.items() if key != "unfinished"}
        return self.before.rollup, old

    @property
    def next_definition(self) -> Definition:
        """Describe the new version as a rollup of its own, beside the old one."""
        return replace(self.definition, name=next_name(self.definition.name))

    @property
    def next_found(self) -> Found:
        """Name the tables of the new version as long as it stands beside the old one."""
        return replace(self.found, places=next_places(self.found.places))

    @property
    def before_places(self) -> Places:
        """Name the tables that are replaced."""
        return Places.from_json(self.before.places)


def next_places(places: Places) -> Places:
    """Name the tables of a new version that stands beside the old one."""
    targets = {
        grain: Table(table.schema, compose.short(next_name(table.name))) for grain, table in places.targets.items()
    }
    return replace(places, targets=targets)


def swap(session: Session, change: Change) -> Step:
    """Compose the step that takes the old version away and gives its name to the new one.

    Raises:
        ConfigurationError: something else has the name of a view or of a trigger.
    """
    new = change.definition.name
    described = {**change.definition.as_json(), "places": change.found.places.as_json()}
    named: dict[str, sql.Composable] = {"rollup": sql.Literal(new), "next": sql.Literal(next_name(new))}
    statements = [
        *_exclusion(session, change),
        *(session.statement(f"rollup.{key}", rollup=named["rollup"]) for key in ("forget_notes", "forget_queue")),
        *_queue(session, change, named),
        *_partitions(session, change, named),
        *_departure(session, change),
        *_arrival(session, change),
        *_grants_kept(session, change),
        session.statement("swap.replace", definition=sql.Literal(json.dumps(described)), **named),
        session.statement("rollup.forget", rollup=named["next"]),
    ]
    expects = (change.expected, (next_name(new), change.definition.as_json()))
    return Step(tuple(statements), locks=f"{change.found.places.source}, or a table of rollup.{new},", expects=expects)


def leftover(session: Session, change: Change) -> list[Any]:
    """List the triggers that the swap leaves behind, because readers of the source wait for the end of one."""
    names = trigger_names(session.schema_name, next_name(change.definition.name))
    return [_Trigger(table.schema, table.name, name) for table in change.found.tables for name in names.values()]


@dataclass(frozen=True)
class _Trigger:
    schema: str
    table: str
    trigger: str


def _exclusion(session: Session, change: Change) -> Iterator[sql.Composed]:
    """Keep out ticks, then readers of the old tables, then writers of the source, who have to wait the shortest."""
    grains = dict.fromkeys([*change.before.definition["grains"], *change.found.places.targets])
    names = (change.definition.name, next_name(change.definition.name))
    jobs = [f"{name}/{grain}" for name in names for grain in grains]
    yield session.statement("swap.hold_jobs", jobs=sql.Literal(jobs))
    # What was noted while the new version was built may be much; it goes before anybody has to wait.
    yield session.statement("rollup.forget_notes", rollup=sql.Literal(change.definition.name))
    if present := [table for table in change.before_places.targets.values() if _exists(session, table)]:
        tables = compose.COMMA.join(sql.Identifier(*table) for table in present)
        yield session.statement("swap.lock_targets", tables=tables)
    function = compose.function_name(change.definition.name)
    for row in session.fetch("rollup.find_triggers", function=function, schema_name=session.schema_name):
        table = Table(row.schema, row.table)
        # A source that is no longer ours would fail on a function that expects the new one's columns.
        if table not in change.found.tables:
            yield session.statement(
                "rollup.drop_trigger", trigger=sql.Identifier(row.trigger), table=sql.Identifier(*table)
            )
    # With `lookback` no writer notes anything, and not every source can be locked.
    if not change.definition.lookback_seconds:
        yield session.statement("swap.lock_source", source=sql.Identifier(*change.found.places.source))


def _queue(session: Session, change: Change, named: dict[str, sql.Composable]) -> Iterator[sql.Composed]:
    yield session.statement("swap.rename_queue", **named)
    targets = change.next_found.places.targets
    for grain, target in targets.items():
        yield session.statement("swap.queue_notes", grain=sql.Literal(grain), target=sql.Identifier(*target), **named)
    yield session.statement("rollup.forget_notes", rollup=named["next"])
    for grain in targets:
        next_job = sql.Literal(change.next_definition.job(grain))
        yield session.statement(
            "swap.take_over_job",
            job=sql.Literal(change.definition.job(grain)),
            next_job=next_job,
            grain=sql.Literal(grain),
            rollup=named["rollup"],
        )
        yield session.statement("rollup.forget_job", job=next_job)
    for grain in change.before.definition["grains"]:
        if grain not in targets:
            yield session.statement("rollup.forget_job", job=sql.Literal(change.definition.job(grain)))


def _partitions(session: Session, change: Change, named: dict[str, sql.Composable]) -> Iterator[sql.Composed]:
    tables = [compose.spelled(*table) for table in change.found.tables]
    yield session.statement("rollup.forget_partitions", rollup=named["rollup"])
    yield session.statement("swap.rename_partitions", tables=sql.Literal(tables), **named)


def _departure(session: Session, change: Change) -> Iterator[sql.Composed]:
    for grain, target in change.before_places.targets.items():
        yield from views.removal(session, change.definition.name, grain, target)
    for target in change.before_places.targets.values():
        yield session.statement("rollup.drop_target", table=sql.Identifier(*target))


def _arrival(session: Session, change: Change) -> Iterator[sql.Composed]:
    definition, found = change.definition, change.found
    for grain, target in found.places.targets.items():
        made = change.next_found.places.targets[grain]
        yield session.statement("swap.rename_table", table=sql.Identifier(*made), name=sql.Identifier(target.name))
        yield session.statement(
            "swap.rename_constraint",
            table=sql.Identifier(*target),
            constraint=sql.Identifier(compose.constraint_name(made)),
            name=sql.Identifier(compose.constraint_name(target)),
        )
        was, name = (compose.short(f"{table.name}_bucket_not_null") for table in (made, target))
        body = session.statement(
            "swap.not_null_body",
            relation=sql.Literal(compose.spelled(*target)),
            old=sql.Literal(was),
            table=sql.Identifier(*target),
            constraint=sql.Identifier(was),
            name=sql.Identifier(name),
        )
        yield session.statement("swap.rename_not_null", body=compose.dollar_quoted(f"\n{body.as_string()}\n"))
        yield from comments(session, definition, found.places, grain)
    yield from views.creation(session, definition, found)
    steps, _ = tracking(session, definition, found, again=False)
    for step in steps:
        yield from step.statements


def _grants_kept(session: Session, change: Change) -> Iterator[sql.Composed]:
    """Let others do with the new what they could do with the old, in the grains that remain."""
    columns = {name for name, _ in change.found.columns}
    for grain, new in change.found.places.targets.items():
        old = change.before_places.targets.get(grain)
        if old is None:
            continue
        before, after = (views.views(change.definition.name, grain, table) for table in (old, new))
        for was, now in ((old, new), (before.values, after.values), (before.live, after.live)):
            rows = session.fetch("swap.relation_grants", schema_name=was.schema, table=was.name)
            granted = [row for row in rows if row.column is None or row.column in columns]
            yield from _grants(session, granted, sql.Identifier(*now))
        rows = session.fetch("swap.function_grants", schema_name=session.schema_name, function=before.function)
        yield from _grants(
            session, rows, sql.SQL("FUNCTION {}").format(sql.Identifier(session.schema_name, after.function))
        )


def _grants(session: Session, rows: list[Any], what: sql.Composable) -> Iterator[sql.Composed]:
    for row in rows:
        yield session.statement(
            "swap.grant",
            privilege=compose.literally(row.privilege),
            columns=sql.SQL(" ({})").format(sql.Identifier(row.column)) if row.column else sql.SQL(""),
            what=what,
            role=sql.Identifier(row.role) if row.role else sql.SQL("PUBLIC"),
            option=sql.SQL(" WITH GRANT OPTION" if row.grantable else ""),
        )


def _exists(session: Session, table: Table) -> bool:
    found: bool = session.fetch_one("rollup.name_taken", schema_name=table.schema, table=table.name).relation
    return found
