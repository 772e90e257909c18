"""Turns a definition into pieces of SQL."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from batchctl.rollup.definition import LONGEST_NAME, Table
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


def spelled(*name: str) -> str:
    """Quote a name for a value or a message."""
    return sql.Identifier(*name).as_string()


def quoted(*name: str) -> sql.SQL:
    """Quote a name for a statement that is run with parameters, which would take its percent signs for theirs."""
    return operator_sql(spelled(*name))


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
    """Write the instant before which no bucket may be computed anew."""
    if has_floor(definition, grain):
        return sql.SQL("(now() - interval {})").format(text(f"{definition.retention_seconds} seconds"))
    return sql.SQL("'-infinity'::timestamptz")


def text(value: str) -> sql.SQL:
    """Write a text of ours for a statement that is run with parameters."""
    return operator_sql(sql.Literal(value).as_string())


def _width(grain: Grain) -> sql.Composed:
    return sql.SQL("interval {}").format(sql.Literal(f"{grain.seconds} seconds"))


def dollar_quoted(body: str) -> sql.SQL:
    """Quote the body of a function."""
    tag = "$batchctl$"
    while tag in body:
        tag = f"{tag[:-1]}_$"
    return literally(f"{tag}{body}{tag}")
