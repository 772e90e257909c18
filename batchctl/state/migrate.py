"""The schema: made by the first command that needs it, upgraded by `migrate`, refused when it does not fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from batchctl.errors import ConfigurationError
from batchctl.state.database import MissingObjectError, sql
from batchctl.state.sql import LATEST_VERSION, migrations

if TYPE_CHECKING:
    from batchctl.state.database import Session

VERSION = sql.SQL("SELECT max(version) AS version FROM {schema}.migration")


class Applied(NamedTuple):
    """An upgrade that was applied: its name and its SQL."""

    name: str
    statement: str


def require_schema(session: Session) -> None:
    """Check that the schema is the one this program knows; make it if there is none.

    Raises:
        ConfigurationError: it is older or newer than this program.
    """
    version = schema_version(session)
    if version is None:
        upgrade(session)
    elif version < LATEST_VERSION:
        raise ConfigurationError(
            f"the schema in the database has version {version}, this program needs {LATEST_VERSION}; "
            "run `batchctl migrate`"
        )
    else:
        refuse_newer(version)


def refuse_newer(version: int) -> None:
    """Refuse a schema that a later program has upgraded."""
    if version > LATEST_VERSION:
        raise ConfigurationError(
            f"the schema in the database has version {version}, this program only knows {LATEST_VERSION}; "
            "install the batchctl that ran `batchctl migrate` there"
        )


def schema_version(session: Session) -> int | None:
    """Return the version of the schema, None if there is none."""
    try:
        rows = session.run(VERSION.format(schema=session.schema))
    except MissingObjectError:
        return None
    version: int | None = rows[0].version
    return version


def upgrade(session: Session) -> tuple[Applied, ...]:
    """Apply the upgrades that the schema lacks and return them; safe when many do it at once."""
    name = session.schema_name
    with session.transaction():
        # Everybody who finds no schema comes here; one makes it, the others wait for the commit and find it made.
        session.run(
            sql.SQL("SELECT pg_advisory_xact_lock(hashtextextended('batchctl schema ' || %(name)s, 0))"), {"name": name}
        )
        found = session.run(
            sql.SQL(
                "SELECT to_regnamespace(quote_ident(%(name)s)) IS NOT NULL AS schema, "
                "to_regclass(quote_ident(%(name)s) || '.migration') IS NOT NULL AS tables"
            ),
            {"name": name},
        )[0]
        # A role that may not create schemas can still use one that was made for it.
        if not found.schema:
            session.run(sql.SQL("CREATE SCHEMA {schema}").format(schema=session.schema))
        version = 0
        if found.tables:
            version = session.run(VERSION.format(schema=session.schema))[0].version or 0
        refuse_newer(version)
        pending = [migration for migration in migrations() if migration.version > version]
        applied = []
        for migration in pending:
            statement = sql.SQL(migration.text).format(schema=session.schema)
            session.run(statement)
            applied.append(Applied(f"{migration.version:04d} {migration.name}", statement.as_string()))
            session.run(
                sql.SQL("INSERT INTO {schema}.migration (version, name) VALUES (%(version)s, %(name)s)").format(
                    schema=session.schema
                ),
                {"version": migration.version, "name": migration.name},
            )
    return tuple(applied)
