"""Turns a definition into pieces of SQL."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from batchctl.rollup.definition import LONGEST_NAME, NUMBER_COLUMN, ROW_COLUMN, ROWS_COLUMN, VALUE_COLUMN, Table
from batchctl.state.database import sql

if TYPE_CHECKING:
    from collections.abc import Iterable

    from batchctl.rollup.definition import Definition, Grain, Places
    from batchctl.rollup.work import Work
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


def bucket_of(session: Session, grain: Grain, instant: sql.Composable) -> sql.Composed:
    """Write the start of the bucket that an instant lies in."""
    if grain.zone:
        return sql.SQL("{}.local_day({}, {})").format(session.schema, instant, text(grain.zone))
    # From 2000, PostgreSQL's own zero: from any other origin the farthest times overflow, and a trigger would make the
    # application's insert fail.
    return sql.SQL("date_bin({}, {}, '2000-01-01 00:00:00+00')").format(_width(grain), instant)


def next_bucket(session: Session, grain: Grain, bucket: sql.Composable) -> sql.Composed:
    """Write the start of the bucket after one."""
    if grain.zone:
        # No local day has fewer than 22 hours or more than 26.
        return bucket_of(session, grain, sql.SQL("{} + interval '30 hours'").format(bucket))
    return sql.SQL("{} + {}").format(bucket, _width(grain))


def open_bucket(session: Session, definition: Definition, grain: Grain) -> sql.Composed:
    """Write the bucket that is open now by the database's clock; those before it are closed."""
    settle = text(f"{definition.settle_seconds} seconds")
    return bucket_of(session, grain, sql.SQL("now() - interval {}").format(settle))


def has_floor(definition: Definition, grain: Grain) -> bool:
    """Tell whether a grain has buckets that may not be computed anew, because their source rows may be gone."""
    # A coarser grain is built from a table of ours, whose rows stay.
    return definition.finer(grain.name) is None and definition.retention_seconds > 0


def floor(definition: Definition, grain: Grain) -> sql.Composable:
    """Write the instant before which that is so."""
    if has_floor(definition, grain):
        return sql.SQL("(now() - interval {})").format(text(f"{definition.retention_seconds} seconds"))
    return sql.SQL("'-infinity'::timestamptz")


def text(value: str) -> sql.SQL:
    """Write a text of ours for a statement that is run with parameters."""
    return operator_sql(sql.Literal(value).as_string())


def _width(grain: Grain) -> sql.Composed:
    return sql.SQL("interval {}").format(sql.Literal(f"{grain.seconds} seconds"))


def replacement(work: Work, *, ranges: int, buckets: int, occupied: bool) -> sql.Composed:
    """Compose the statement that replaces the buckets of a chunk.

    Args:
        work: The grain whose table is written.
        ranges: How many ranges of neighbouring buckets there are.
        buckets: How many buckets.
        occupied: True if the table holds rows between the first of the buckets and the last.
    """
    from batchctl.rollup import values  # noqa: PLC0415 - which is made of the pieces below

    session, definition, grain, places = work.session, work.definition, work.grain, work.places
    target = places.targets[grain.name]
    finest = definition.finer(grain.name) is None
    stored = [part.column for part in definition.parts]
    derived = [measure for measure in definition.measures if measure.value]
    columns = [*stored, *(measure.name for measure in derived)]
    kept = list(values.compared(definition, places, stored=True))
    source, time = built_from(definition, grain, places)
    apart = ranges > 1
    # A range that is one bucket need not ask each row for its bucket.
    bucket = _low(apart=apart) if ranges == buckets else bucket_of(session, grain, time)
    grouped = range(2 if ranges == buckets else 1, len(definition.key) + 1)
    read = session.statement(
        "rollup.read_ranges" if apart else "rollup.read_range",
        bucket=bucket,
        source=source,
        time=time,
        dimensions=sql.Composed([sql.SQL(", {}").format(quoted(name)) for name in definition.dimensions]),
        values=COMMA.join(values.every_part(definition, places, finest=finest)),
        # By number, because a name would mean a column of the source before one of ours.
        groups=COMMA.join(map(sql.Literal, grouped)) if grouped else sql.SQL("()"),
        where=condition(definition) if finest else sql.SQL(""),
    )
    return session.statement(
        "rollup.refresh" if occupied else "rollup.fill",
        read=read,
        target=quoted(*target),
        constraint=quoted(constraint_name(target)),
        columns=names([*definition.key, *stored]),
        derived=sql.Composed([sql.SQL(", {}").format(quoted(measure.name)) for measure in derived]),
        derivations=sql.Composed([sql.SQL(", {}").format(values.shown(measure, places)) for measure in derived]),
        row=quoted(ROW_COLUMN),
        rows=quoted(ROWS_COLUMN),
        number=quoted(NUMBER_COLUMN),
        events=quoted(definition.events or ROWS_COLUMN),
        key=names(definition.key),
        order=COMMA.join(_order(places, column) for column in definition.key),
        assignments=COMMA.join(
            sql.SQL("{} = {}").format(quoted(column), quoted("excluded", column)) for column in columns
        ),
        kept=COMMA.join(kept),
        computed=COMMA.join(values.compared(definition, places, stored=False)),
        compared=names(f"{VALUE_COLUMN}_{number}" for number, _ in enumerate(kept, start=1)),
        marks=sql.Composed([_mark(session, parent) for parent in definition.coarser(grain.name)]),
    )


def _low(*, apart: bool) -> sql.SQL:
    return sql.SQL("to_timestamp(batchctl_range.batchctl_low)" if apart else "to_timestamp(%(low)s)")


def _order(places: Places, column: str) -> sql.Composed:
    collation = places.collations.get(column, "")
    return sql.SQL("{}{}").format(quoted(column), sql.SQL(collation))


def _mark(session: Session, parent: Grain) -> sql.Composed:
    return session.statement(
        "rollup.mark",
        name=quoted(f"marked_{parent.name}"),
        grain=text(parent.name),
        bucket=bucket_of(session, parent, quoted("bucket")),
    )


def dollar_quoted(body: str) -> sql.SQL:
    """Quote the body of a function."""
    tag = "$batchctl$"
    while tag in body:
        tag = f"{tag[:-1]}_$"
    return literally(f"{tag}{body}{tag}")
