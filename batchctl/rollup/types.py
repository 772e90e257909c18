"""Fits measures to a database: what they need of it, and the types of their columns."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from batchctl.errors import BatchctlError, ConfigurationError, DatabaseUnavailableError
from batchctl.rollup import compose, values
from batchctl.rollup.measure import DISTINCT

if TYPE_CHECKING:
    from batchctl.rollup.definition import Definition, Places
    from batchctl.rollup.measure import Measure
    from batchctl.state.database import Session, sql


def measured(session: Session, definition: Definition, places: Places) -> Places:
    """Add what the measures need: the types of their values, the schemas of their extensions.

    Raises:
        ConfigurationError: an extension is missing, or PostgreSQL does not compile an expression.
    """
    extensions, types = {}, {}
    for measure in definition.measures:
        if measure.extension and measure.extension not in extensions:
            extensions[measure.extension] = _extension_schema(session, measure, _place(definition, measure))
        if measure.value:
            own = compose.operator_sql(measure.call)
            types[measure.name] = measure.type or _type(session, own, places, definition, measure)
        if measure.function == DISTINCT:
            statement = session.statement(
                "measure.hashable",
                x=compose.operator_sql(measure.expression),
                source=compose.quoted(*places.source),
            )
            compiled(session, statement, _place(definition, measure), str(measure))
    return replace(places, types=types, extensions=extensions)


def measure_columns(session: Session, definition: Definition, places: Places) -> dict[str, str]:
    """Let PostgreSQL compile the measures and say what each column will hold."""
    found = {}
    for measure in definition.measures:
        for part in measure.parts:
            found[part.column] = _type(session, values.computed(measure, part, places), places, definition, measure)
        if measure.value:
            found[measure.name] = places.types[measure.name]
    return found


def compiled(session: Session, statement: sql.Composed, place: str, text: str) -> list[Any]:
    """Run a statement that the operator's SQL is part of.

    Raises:
        ConfigurationError: PostgreSQL refuses it; names the key and what was found.
    """
    try:
        return session.run(statement, {})
    except DatabaseUnavailableError:
        raise
    except BatchctlError as error:
        raise ConfigurationError(f"{place}: found {text!r}: {error}") from error


def _extension_schema(session: Session, measure: Measure, place: str) -> str:
    name = measure.extension
    found = session.fetch_one("measure.find_extension", extension=name)
    if found.schema is None:
        if found.available:
            lacks, install = "is not created in this database", ""
        else:
            package = f"postgresql-{found.major}-{name}"
            lacks, install = "this server does not have", f"install it (on Debian: the package {package}), then "
        raise ConfigurationError(
            f"{place}: found {str(measure)!r}, which needs the extension {name}, which {lacks}; {install}"
            f"run `CREATE EXTENSION {name}` in this database as a superuser"
        )
    schema: str = found.schema
    return schema


def _type(session: Session, call: sql.Composable, places: Places, definition: Definition, measure: Measure) -> str:
    statement = session.statement("rollup.measure_type", call=call, source=compose.quoted(*places.source))
    kind: str = compiled(session, statement, _place(definition, measure), str(measure))[0].type
    return kind


def _place(definition: Definition, measure: Measure) -> str:
    return f"rollup.{definition.name}.measures.{measure.name}"
