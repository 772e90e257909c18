"""Turns measures into pieces of SQL: what is computed, merged, shown and compared."""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchctl.rollup.compose import literally, operator_sql, quoted
from batchctl.rollup.measure import DOUBLE
from batchctl.state.database import sql

if TYPE_CHECKING:
    from collections.abc import Iterator

    from batchctl.rollup.definition import Definition, Places
    from batchctl.rollup.measure import Measure, Part

# All of it is for statements that are run with parameters.


def computed(measure: Measure, part: Part, places: Places) -> sql.Composed:
    """Write what makes a column from rows of the source."""
    wide = places.types.get(measure.name) == DOUBLE and part.form.wide
    return literally(wide or part.form.computed).format(
        x=operator_sql(part.expression), extension=_schema(measure, places)
    )


def merged(measure: Measure, part: Part, places: Places) -> sql.Composed:
    """Write what makes a column from rows of finer buckets."""
    return literally(part.form.merged).format(column=quoted(part.column), extension=_schema(measure, places))


def shown(measure: Measure, places: Places) -> sql.Composed:
    """Write the value of a measure in terms of its columns."""
    parts = {part.column.removeprefix(measure.name).lstrip("_"): quoted(part.column) for part in measure.parts}
    if not measure.value:
        return sql.Composed([quoted(measure.name)])
    return literally(measure.value).format(
        **parts,
        type=operator_sql(places.types[measure.name]),
        fraction=literally(measure.fraction),
        extension=_schema(measure, places),
    )


def compared(measure: Measure, part: Part, places: Places) -> sql.Composed | None:
    """Write what tells two values of a column apart, None for the column itself."""
    if not part.form.compared:
        return None
    return literally(part.form.compared).format(column=quoted(part.column), extension=_schema(measure, places))


def every_part(definition: Definition, places: Places, *, finest: bool) -> Iterator[sql.Composed]:
    """List what makes the computed columns, from the source or from finer buckets."""
    for measure in definition.measures:
        for part in measure.parts:
            yield (computed if finest else merged)(measure, part, places)


def _schema(measure: Measure, places: Places) -> sql.Composable:
    return quoted(places.extensions[measure.extension]) if measure.extension else sql.SQL("")
