"""The schema: made by the first command that needs it, upgraded by `migrate`, refused when it does not fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from batchctl.errors import ConfigurationError
from batchctl.state.database import sql
from batchctl.state.driver_errors import MissingObjectError
from batchctl.state.sql import LATEST_VERSION, migrations

if TYPE_CHECKING:
    from batchctl.state.database import Session

VERSION = sql.SQL("SELECT max(version) AS version FROM {schema}.migration")


class WrongSchemaError(ConfigurationError):
    """The schema in the database is not of the version that this program knows."""


class Upgraded(NamedTuple):
    """The names of the upgrades that were applied, and the SQL that did it."""

    names: tuple[str, ...]
    statements: tuple[str, ...]


def require_schema(session: Session) -> None:
    """Check that the schema is the one this program knows; make it if there is none.

    Raises:
        WrongSchemaError: it is older or newer than this program.
    """
    try:
        with session.bounded():
            version = session.run(VERSION.format(schema=session.schema))[0].version
    except MissingObjectError:
        version = None
    if version is None:
        upgrade(session)
    elif version < LATEST_VERSION:
        raise WrongSchemaError(
            f"the schema in the database has version {version}, this program needs {LATEST_VERSION}; "
            "run `batchctl migrate`"
        )
    else:
        refuse_newer(version)


def refuse_newer(version: int) -> None:
    """Refuse a schema that a later program has upgraded."""
    if version > LATEST_VERSION:
        raise WrongSchemaError(
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


def upgrade(session: Session) -> Upgraded:
    """Apply the upgrades that the schema lacks and return them; safe when many do it at once."""
    name = session.schema_name
    with session.transaction():
        # Everybody who finds no schema comes here; one makes it, the others wait for the commit and find it made.
        session.run(
            # The lock is only ours, so a lock_timeout of the role must not cut the wait for it.
            sql.SQL(
                "SELECT set_config('lock_timeout', '0', true) AS unlimited, "
                "pg_advisory_xact_lock(hashtextextended('batchctl schema ' || %(name)s, 0)) AS locked"
            ),
            {"name": name},
        )
        found = session.run(
            sql.SQL(
                "SELECT to_regnamespace(quote_ident(%(name)s)) IS NOT NULL AS schema, "
                "to_regclass(quote_ident(%(name)s) || '.migration') IS NOT NULL AS tables"
            ),
            {"name": name},
        )[0]
        statements = []
        # A role that may not create schemas can still use one that was made for it.
        if not found.schema:
            statements.append(sql.SQL("CREATE SCHEMA {schema}").format(schema=session.schema))
        version = 0
        if found.tables:
            version = session.run(VERSION.format(schema=session.schema))[0].version or 0
        refuse_newer(version)
        pending = [migration for migration in migrations() if migration.version > version]
        for migration in pending:
            statements.append(sql.SQL(migration.text).format(schema=session.schema))
            statements.append(
                sql.SQL("INSERT INTO {schema}.migration (version, name) VALUES ({version}, {name})").format(
                    schema=session.schema, version=sql.Literal(migration.version), name=sql.Literal(migration.name)
                )
            )
        for statement in statements:
            session.run(statement)
    return Upgraded(
        tuple(f"{migration.version:04d} {migration.name}" for migration in pending),
        tuple(statement.as_string() for statement in statements),
    )
