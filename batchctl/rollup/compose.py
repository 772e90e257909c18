"""Turns a definition into pieces of SQL."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from batchctl.rollup.definition import LONGEST_NAME, ROW_COLUMN, ROWS_COLUMN, Table
from batchctl.state.database import sql

if TYPE_CHECKING:
    from collections.abc import Iterable

    from batchctl.rollup.definition import Definition, Grain, Places
    from batchctl.state.database import Session

COMMA = sql.SQL(", ")


def literally(text: str) -> sql.SQL:
    """Take over a piece of SQL as it is."""
    return sql.SQL(text)


def operator_sql(text: str) -> sql.SQL:
    """Take over the operator's SQL as it is; it becomes part of a statement that is run with parameters."""
    # It is trusted like the configuration itself, which may name any command to run.
    return literally(text.replace("%", "%%"))


def condition(definition: Definition) -> sql.Composable:
    """Write the filter of the source as a further condition."""
    return sql.SQL(" AND ({})").format(operator_sql(definition.where)) if definition.where else sql.SQL("")


def quoted(*name: str) -> sql.SQL:
    """Quote a name for a statement that is run with parameters, which would take its percent signs for theirs."""
    return operator_sql(sql.Identifier(*name).as_string())


def names(columns: Iterable[str], *prefix: str) -> sql.Composed:
    """List columns for a statement that is run with parameters, each after a prefix if there is one."""
    return COMMA.join(quoted(*prefix, column) for column in columns)


def short(name: str) -> str:
    """Fit a name into PostgreSQL's limit, with a hash in place of what is cut."""
    encoded = name.encode()
    if len(encoded) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(encoded).hexdigest()[:8]
    return f"{encoded[: LONGEST_NAME - 9].decode(errors='ignore')}_{digest}"


def function_name(rollup: str) -> str:
    """Name the trigger function of a rollup, which is in our schema."""
    return short(f"capture_{rollup}")


def trigger_name(schema: str, rollup: str, event: str) -> str:
    """Name a trigger on a source, which other schemas of ours may watch as well."""
    # Without the hash, rollup a_b of schema x and rollup b of schema x_a would take each other's triggers over.
    digest = hashlib.sha256(json.dumps([schema, rollup, event]).encode()).hexdigest()[:8]
    text = f"{schema}_{rollup}_{event}".encode()[: LONGEST_NAME - 9].decode(errors="ignore")
    return f"{text}_{digest}"


def constraint_name(target: Table) -> str:
    """Name the constraint that keeps one row for each group of a bucket."""
    return short(f"{target.name}_bucket_key")


def built_from(definition: Definition, grain: Grain, places: Places) -> tuple[sql.SQL, sql.SQL]:
    """Name the table that a grain is built from, and its time column."""
    finer = definition.finer(grain.name)
    if finer is None:
        return quoted(*places.source), quoted(definition.time)
    return quoted(*places.targets[finer.name]), quoted("bucket")


def refresh(session: Session, definition: Definition, grain: Grain, places: Places, *, apart: bool) -> sql.Composed:
    """Compose the statement that replaces the buckets of a chunk.

    Args:
        session: Knows our schema.
        definition: The rollup.
        grain: The grain whose table is written.
        places: The tables.
        apart: True if the buckets are not all neighbours of each other.
    """
    from batchctl.rollup import values  # noqa: PLC0415 - which is made of the pieces below

    target = places.targets[grain.name]
    finest = definition.finer(grain.name) is None
    stored = [part.column for part in definition.parts]
    derived = [measure for measure in definition.measures if measure.value]
    columns = [*stored, *(measure.name for measure in derived)]
    source, time = built_from(definition, grain, places)
    read = session.statement(
        "rollup.read_ranges" if apart else "rollup.read_range",
        source=source,
        time=time,
        dimensions=sql.Composed([sql.SQL(", {}").format(quoted(name)) for name in definition.dimensions]),
        values=COMMA.join(values.every_part(definition, places, finest=finest)),
        # By number, because a name would mean a column of the source before one of ours.
        positions=COMMA.join(sql.Literal(number) for number, _ in enumerate(definition.key, start=1)),
        where=condition(definition) if finest else sql.SQL(""),
    )
    return session.statement(
        "rollup.refresh",
        read=read,
        target=quoted(*target),
        constraint=quoted(constraint_name(target)),
        columns=names([*definition.key, *stored]),
        derived=sql.Composed([sql.SQL(", {}").format(quoted(measure.name)) for measure in derived]),
        derivations=sql.Composed([sql.SQL(", {}").format(values.shown(measure, places)) for measure in derived]),
        row=quoted(ROW_COLUMN),
        rows=quoted(ROWS_COLUMN),
        events=quoted(definition.events or ROWS_COLUMN),
        key=names(definition.key),
        assignments=COMMA.join(
            sql.SQL("{} = {}").format(quoted(column), quoted("excluded", column)) for column in columns
        ),
        kept=COMMA.join(values.compared(definition, places, "kept")),
        excluded=COMMA.join(values.compared(definition, places, "excluded")),
        mark=session.statement("rollup.mark") if definition.coarser(grain.name) else sql.SQL(""),
    )
