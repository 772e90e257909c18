"""Composes the statements that compute the buckets of a chunk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchctl.rollup import values
from batchctl.rollup.compose import (
    COMMA,
    bucket_of,
    built_from,
    condition,
    constraint_name,
    names,
    operator_sql,
    quoted,
    text,
)
from batchctl.rollup.definition import OWN
from batchctl.state.database import sql

if TYPE_CHECKING:
    from collections.abc import Iterable

    from batchctl.rollup.definition import Definition, Grain, Places
    from batchctl.rollup.measure import Measure
    from batchctl.rollup.work import Work
    from batchctl.state.database import Session

ROWS_COLUMN = f"{OWN}rows"
"""Carries the number of rows read through a refresh."""

ROW_COLUMN = f"{OWN}row"
"""Tells where a row is stored."""

VALUE_COLUMN = f"{OWN}value"
"""Carries what is compared of a row, with a number for each."""


def filling(work: Work, *, ranges: int, buckets: int) -> sql.Composed:
    """Compose the statement that computes the buckets of a chunk of which the table holds nothing.

    Args:
        work: The grain whose table is written.
        ranges: How many ranges of neighbouring buckets there are.
        buckets: How many buckets.
    """
    derivations = (values.shown(measure, work.places) for measure in _derived(work.definition))
    # There is nothing to tell apart of one bucket.
    changed = sql.SQL("SELECT bucket FROM fresh LIMIT 1" if buckets == 1 else "SELECT DISTINCT bucket FROM fresh")
    shared = _shared(work, ranges, buckets)
    return work.session.statement("rollup.fill", **shared, derivations=_further(derivations), changed=changed)


def replacement(work: Work, *, ranges: int, buckets: int) -> sql.Composed:
    """Compose the statement that replaces the buckets of a chunk; the arguments are the same."""
    definition, places, types = work.definition, work.places, work.stored_types
    target = places.targets[work.grain.name]
    derived = _derived(definition)
    # By columns whose types PostgreSQL can compare, rows are told apart as they are; others by something beside them.
    beside = {
        part.column: told
        for measure in definition.measures
        for part in measure.parts
        if (told := values.compared(measure, part, places)) is not None
    }
    compared = [f"{VALUE_COLUMN}_{number}" for number, _ in enumerate(beside, start=1)]
    columns = [*definition.key, *_stored(definition), *(measure.name for measure in derived)]
    derivations = (
        _typed(sql.SQL("({})").format(values.shown(measure, places)), types.get(measure.name)) for measure in derived
    )
    return work.session.statement(
        "rollup.refresh",
        **_shared(work, ranges, buckets),
        constraint=quoted(constraint_name(target)),
        row=quoted(ROW_COLUMN),
        typed=COMMA.join(_typed(quoted(name), types.get(name)) for name in [*definition.key, *_stored(definition)]),
        derivations=_further(derivations),
        found=COMMA.join(
            sql.SQL("(array_agg({0}))[1] AS {0}").format(quoted(name)) if name in beside else quoted(name)
            for name in columns
        ),
        kept=_further(beside.values()),
        compared=_further(map(quoted, compared)),
        told_apart=names([*(name for name in columns if name not in beside), *compared]),
        key=names(definition.key),
        assignments=COMMA.join(
            sql.SQL("{} = {}").format(quoted(column), quoted("excluded", column))
            for column in columns[len(definition.key) :]
        ),
    )


def _shared(work: Work, ranges: int, buckets: int) -> dict[str, sql.Composable]:
    definition, grain = work.definition, work.grain
    return {
        "read": _read(work, ranges, buckets),
        "target": work.target,
        "columns": names([*definition.key, *_stored(definition)]),
        "derived": _further(quoted(measure.name) for measure in _derived(definition)),
        "rows": quoted(ROWS_COLUMN),
        "events": quoted(definition.events or ROWS_COLUMN),
        "order": COMMA.join(_order(work.places, column) for column in definition.key),
        "marks": sql.Composed([_mark(work.session, parent) for parent in definition.coarser(grain.name)]),
    }


def _read(work: Work, ranges: int, buckets: int) -> sql.Composed:
    session, definition, grain = work.session, work.definition, work.grain
    finest = definition.finer(grain.name) is None
    source, time = built_from(definition, grain, work.places)
    # A range that is one bucket need not ask each row for its bucket.
    whole = ranges == buckets
    grouped = range(2 if whole else 1, len(definition.key) + 1)
    return session.statement(
        "rollup.read_ranges" if ranges > 1 else "rollup.read_range",
        bucket=_low(apart=ranges > 1) if whole else bucket_of(session, grain, time),
        source=source,
        time=time,
        dimensions=_further(map(quoted, definition.dimensions)),
        values=COMMA.join(values.every_part(definition, work.places, finest=finest)),
        # By number, because a name would mean a column of the source before one of ours.
        # Grouped by nothing, there would be a row for no rows as well.
        groups=COMMA.join(map(sql.Literal, grouped)) if grouped else sql.SQL("() HAVING count(*) > 0"),
        where=condition(definition) if finest else sql.SQL(""),
    )


def _stored(definition: Definition) -> list[str]:
    return [part.column for part in definition.parts]


def _derived(definition: Definition) -> list[Measure]:
    return [measure for measure in definition.measures if measure.value]


def _further(pieces: Iterable[sql.Composable]) -> sql.Composed:
    """List pieces, each after a comma."""
    return sql.Composed([part for piece in pieces for part in (COMMA, piece)])


def _typed(value: sql.Composable, type_: str | None) -> sql.Composable:
    # PostgreSQL says best that a column is gone.
    return value if type_ is None else sql.SQL("{}::{}").format(value, operator_sql(type_))


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
