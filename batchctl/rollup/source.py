"""Fits a rollup to a database: its source, its tables' names, the types of its columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from batchctl.errors import BatchctlError, ConfigurationError, DatabaseUnavailableError
from batchctl.rollup import compose
from batchctl.rollup.definition import LONGEST_NAME, Places, Table
from batchctl.rollup.types import compiled, measure_columns, measured

if TYPE_CHECKING:
    from collections.abc import Collection

    from batchctl.rollup.definition import Definition
    from batchctl.state.database import Session

SOURCE_KINDS = ("r", "p")
"""What can have triggers."""
READABLE_KINDS = (*SOURCE_KINDS, "v", "m", "f")
"""What `lookback` can read."""
INDEXABLE_KINDS = (*SOURCE_KINDS, "m")
WAY_OUT = "; or set `lookback`, which needs no triggers and is not exact"
BYTEWISE = ' COLLATE "C"'
"""How a target compares text that its source compares in the database's own way: equal is the same, and quicker."""
OTHER_KINDS = {"v": "a view", "m": "a materialized view", "f": "a foreign table", "S": "a sequence", "i": "an index"}


@dataclass(frozen=True)
class Found:
    """What a database says about a rollup."""

    places: Places
    tables: tuple[Table, ...]
    """The source and its partitions of all levels, whose writers have to be watched; none with `lookback`."""
    columns: tuple[tuple[str, str], ...]
    """Name and definition of each column of a target table."""
    indexed: bool
    """True if an index of the source starts with the time, or it cannot have one."""


def find(
    session: Session, definition: Definition, before: Places | None, freed: Collection[Table] = frozenset()
) -> Found:
    """Check a rollup against the database.

    Args:
        session: An open session.
        definition: The rollup.
        before: The tables as they were registered, None for a new rollup.
        freed: Tables that will be gone when those of the rollup get their names.

    Raises:
        ConfigurationError: names the key, what was found and what is allowed.
    """
    place = f"rollup.{definition.name}"
    source = _find_source(session, definition, place)
    columns = {row.name: row for row in session.fetch("rollup.table_columns", oid=source.oid)}
    _check_columns(definition, columns, source, place)
    _check_zone(session, definition, place)
    places = Places(
        Table(source.schema, source.name),
        _targets(session, definition, source, place),
        collations={name: BYTEWISE for name in definition.dimensions if columns[name].plain},
    )
    if before not in (None, places):
        raise ConfigurationError(
            f"{place}: its tables are now found under other names (was {before}, now {places}); rename them "
            f"back, or `batchctl migrate --drop {definition.name}` and then `batchctl migrate` rebuild it"
        )
    _check_targets(session, definition, places, freed, ours=before is not None)
    kinds = dict(_column_types(session, definition, columns, places))
    places = measured(session, definition, places)
    kinds |= measure_columns(session, definition, places)
    return Found(
        places,
        () if definition.lookback_seconds else tuple(_tables(session, source, place)),
        tuple(kinds.items()),
        indexed=columns[definition.time].indexed or source.kind not in INDEXABLE_KINDS,
    )


def _find_source(session: Session, definition: Definition, place: str) -> Any:
    try:
        source = session.fetch_one("rollup.find_table", table=definition.source)
    except DatabaseUnavailableError:
        raise
    except BatchctlError as error:
        raise ConfigurationError(f"{place}.source: found {definition.source!r}: {error}") from error
    if source is None:
        raise ConfigurationError(
            f"{place}.source: there is no table {definition.source!r} on the search path; "
            "expected TABLE or SCHEMA.TABLE of an existing table"
        )
    if source.kind not in READABLE_KINDS:
        raise ConfigurationError(
            f"{place}.source: {definition.source!r} is {_kind(source.kind)}; expected a table, partitioned or not"
        )
    if not definition.lookback_seconds:
        _check_triggers(definition, source, place)
    if source.filtered:
        raise ConfigurationError(
            f"{place}.source: row-level security hides rows of {definition.source!r} from this role, so sums would be "
            "too small; expected a role with BYPASSRLS, or the owner of the table without FORCE ROW LEVEL SECURITY"
        )
    return source


def _check_triggers(definition: Definition, source: Any, place: str) -> None:
    """Refuse a source on which triggers would not see everything."""
    place = f"{place}.source: {definition.source!r}"
    if source.kind not in SOURCE_KINDS:
        raise ConfigurationError(f"{place} is {_kind(source.kind)}; expected a table, partitioned or not{WAY_OUT}")
    if source.parent is not None:
        raise ConfigurationError(
            f"{place} is a part of {source.parent}, and what is written through that fires no trigger here; expected "
            f"{source.parent}{WAY_OUT}"
        )
    if source.subscribed:
        raise ConfigurationError(
            f"{place} is filled by logical replication, which fires no statement trigger; expected a table that is "
            f"written here{WAY_OUT}"
        )


def _check_columns(definition: Definition, columns: dict[str, Any], source: Any, place: str) -> None:
    keys = [("time", definition.time), *(("dimensions", name) for name in definition.dimensions)]
    for key, name in keys:
        if name not in columns:
            raise ConfigurationError(
                f"{place}.{key}: {source.schema}.{source.name} has no column {name!r}; it has {', '.join(columns)}"
            )
    if not columns[definition.time].instant:
        raise ConfigurationError(
            f"{place}.time: {definition.time!r} is of type {columns[definition.time].type}; "
            "expected timestamp with time zone, because a bucket is an instant"
        )
    if columns[definition.time].virtual and not definition.lookback_seconds:
        raise ConfigurationError(
            f"{place}.time: {definition.time!r} is a virtual generated column, which triggers cannot read; "
            f"expected an ordinary or a stored generated one{WAY_OUT}"
        )


def _check_zone(session: Session, definition: Definition, place: str) -> None:
    zone = definition.grains[-1].zone
    if zone and not session.fetch_one("rollup.known_zone", zone=zone).known:
        raise ConfigurationError(
            f"{place}.grains: a local day needs a time zone that the server knows, which {zone!r} is not; expected a "
            "`timezone` of the time zone database such as Asia/Seoul"
        )


def _targets(session: Session, definition: Definition, source: Any, place: str) -> dict[str, Table]:
    targets = {}
    for grain in definition.grains:
        try:
            parts = session.fetch_one("rollup.parse_name", text=grain.target).parts
        except DatabaseUnavailableError:
            raise
        except BatchctlError as error:
            raise ConfigurationError(f"{place}.target: found {grain.target!r}: {error}") from error
        if len(parts) not in (1, 2) or len(parts[-1].encode()) > LONGEST_NAME:
            raise ConfigurationError(
                f"{place}.target: found {grain.target!r}, expected TABLE or SCHEMA.TABLE, at most {LONGEST_NAME} bytes"
            )
        targets[grain.name] = Table(*([source.schema] if len(parts) == 1 else []), *parts)
    return targets


def _check_targets(
    session: Session, definition: Definition, places: Places, freed: Collection[Table], *, ours: bool
) -> None:
    place = f"rollup.{definition.name}"
    for table in places.targets.values():
        found = session.fetch_one("rollup.name_taken", schema_name=table.schema, table=table.name)
        if not found.schema:
            raise ConfigurationError(f"{place}.target: there is no schema {table.schema!r}; create it first")
        if not found.writable and not ours:
            raise ConfigurationError(
                f"{place}.target: this role may not create {table}; GRANT CREATE ON SCHEMA {table.schema} to it, or "
                "set another target"
            )
        if found.relation and not ours and table not in freed:
            raise ConfigurationError(
                f"{place}.target: {table} exists and was not made by batchctl for this rollup; expected a free name: "
                "rename that table, or set another target"
            )
        if ours and not found.relation:
            raise ConfigurationError(
                f"{place}: its table {table} is gone; `batchctl migrate --drop {definition.name}` and then "
                "`batchctl migrate` rebuild it from the source"
            )


def _tables(session: Session, source: Any, place: str) -> list[Table]:
    tables = []
    for row in session.fetch("rollup.table_tree", oid=source.oid):
        if row.kind not in SOURCE_KINDS:
            raise ConfigurationError(
                f"{place}.source: its partition {row.schema}.{row.name} is {_kind(row.kind)}, which can have no "
                f"statement trigger; expected ordinary partitions{WAY_OUT}"
            )
        tables.append(Table(row.schema, row.name))
    return tables


def _column_types(
    session: Session, definition: Definition, columns: dict[str, Any], places: Places
) -> list[tuple[str, str]]:
    """Let PostgreSQL compile the operator's SQL and say what each column will hold."""
    source = compose.quoted(*places.source)
    place = f"rollup.{definition.name}"
    if definition.where:
        statement = session.statement("rollup.try_where", source=source, where=compose.condition(definition))
        compiled(session, statement, f"{place}.where", definition.where)
    if definition.dimensions:
        statement = session.statement("rollup.group_rows", source=source, columns=compose.names(definition.dimensions))
        compiled(session, statement, f"{place}.dimensions", ", ".join(definition.dimensions))
    found = [("bucket", "timestamp with time zone NOT NULL")]
    found += [(name, columns[name].type + places.collations.get(name, "")) for name in definition.dimensions]
    return found


def _kind(letter: str) -> str:
    return OTHER_KINDS.get(letter, "something else")
