"""Short connections to one database, and statements by name."""

from __future__ import annotations

import logging
import os
import re
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import namedtuple_row

from batchctl.errors import ConfigurationError, DatabaseUnavailableError
from batchctl.state.driver_errors import translate
from batchctl.state.sql import named_queries

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import LiteralString

    from batchctl.clock import Clock
    from batchctl.config import Configuration
    from batchctl.state.embedded import EmbeddedServer

__all__ = ["Database", "Session", "open_database", "sql"]

CONNECT_SECONDS = 4
FIRST_WITH_TRANSACTION_TIMEOUT = 170_000
CANCEL_SECONDS = 2
LEADING_ELSEWHERE = {"PGHOST", "PGHOSTADDR", "PGPORT", "PGDATABASE", "PGUSER", "PGSERVICE", "PGOPTIONS"}

BOUNDS = sql.SQL(
    "SHOW synchronous_commit; "
    "SET LOCAL extra_float_digits = 1; "
    "SET LOCAL lock_timeout = {lock}; "
    "SET LOCAL statement_timeout = {statement}; "
    "SET LOCAL idle_in_transaction_session_timeout = '20s'{unlimited}"
)
"""What holds in a transaction of ours, whatever the role's defaults are: nothing waits for long, neither for a lock nor
holding one for a client that is gone, and numbers come in all their digits also as text."""
DURABLE = sql.SQL("SET LOCAL synchronous_commit = on")
"""Nor is what was committed lost in a crash of the server."""

# A client that vanished must not keep locks, and a server that vanished must not keep the client.
CONNECTION_DEFAULTS: Mapping[str, Any] = {
    "application_name": "batchctl",
    "connect_timeout": CONNECT_SECONDS,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,
}

# What goes wrong comes as an error; what the driver says besides would stand among our lines in a form of its own.
logging.getLogger("psycopg").setLevel(logging.CRITICAL)


class Session:
    """One open connection; each statement commits by itself unless a transaction is open."""

    def __init__(self, connection: psycopg.Connection[Any], schema: str, place: str) -> None:
        self.connection = connection
        self.schema_name = schema
        self.schema = sql.Identifier(schema)
        self._place = place
        self._queries: dict[str, dict[str, LiteralString]] = {}

    @property
    def unlimited(self) -> sql.SQL:
        """Write that a transaction may take as long as its statements, whatever the role has set, where that exists."""
        since = self.connection.info.server_version >= FIRST_WITH_TRANSACTION_TIMEOUT
        return sql.SQL("; SET LOCAL transaction_timeout = 0" if since else "")

    def statement(self, name: str, /, **parts: sql.Composable) -> sql.Composed:
        """Compose a statement of a file: `run.claim` is the statement `claim` of run.sql.

        Args:
            name: File and name of the statement.
            parts: Identifiers or other composed text for the places in braces; `schema` is always filled in.
        """
        file, _, key = name.partition(".")
        if file not in self._queries:
            self._queries[file] = named_queries(f"{file}.sql")
        return sql.SQL(self._queries[file][key]).format(schema=self.schema, **parts)

    def run(self, statement: sql.SQL | sql.Composed, parameters: Mapping[str, Any] | None = None) -> list[Any]:
        """Execute a composed statement and return its rows as named tuples (none for a statement without a result).

        A percent sign in the statement is a parameter's only if parameters are given.
        """
        try:
            # In binary an instant is the same whatever DateStyle and TimeZone the role or the database has set;
            # without parameters a statement may be several, which only the text protocol takes.
            cursor = self.connection.execute(statement, parameters, binary=parameters is not None)
            return cursor.fetchall() if cursor.description else []
        except psycopg.Error as error:
            raise translate(error, self._place) from error

    def run_at_once(self, statement: sql.SQL | sql.Composed, parameters: Mapping[str, Any]) -> list[Any]:
        """Execute a statement that returns no instants, with its values written into it.

        The server then parses, plans and runs it in one go: it copies nothing for a second use, a tenth of the time.
        """
        try:
            text: Any = psycopg.ClientCursor(self.connection).mogrify(statement, parameters)
        except psycopg.Error as error:
            raise translate(error, self._place) from error
        return self.run(sql.SQL(text))

    def fetch(self, name: str, /, **parameters: Any) -> list[Any]:
        """Execute a statement by its name and return its rows as named tuples."""
        return self.run(self.statement(name), parameters)

    def fetch_one(self, name: str, /, **parameters: Any) -> Any:
        """Execute a statement by its name and return its only row, or None."""
        rows = self.fetch(name, **parameters)
        return rows[0] if rows else None

    def cancel(self) -> None:
        """Ask the server to end the statement that another thread runs in this session, if there is one."""
        # Who cancels gives up anyhow: a server that cannot be reached ends the statement by itself.
        with suppress(psycopg.Error):
            self.connection.cancel_safe(timeout=CANCEL_SECONDS)

    @contextmanager
    def bounded(self, *, lock: str = "10s", statement: str = "15s") -> Iterator[None]:
        """Commit the block's statements together, and durably; none of them waits longer than that.

        Args:
            lock: For a lock that somebody holds.
            statement: In all.
        """
        with self.transaction():
            bounds = {"lock": sql.Literal(lock), "statement": sql.Literal(statement), "unlimited": self.unlimited}
            kept = self.run(BOUNDS.format(**bounds))[0]
            if kept.synchronous_commit == "off":
                self.run(DURABLE)
            yield

    @contextmanager
    def transaction(self, *, discard: bool = False) -> Iterator[None]:
        """Commit the block's statements together, or none of them.

        Args:
            discard: None of them in any case: the block only wants to know what would happen.
        """
        with ExitStack() as stack:
            try:
                stack.enter_context(self.connection.transaction(force_rollback=discard))
            except psycopg.errors.FeatureNotSupported as error:
                # Beginning to write is what a standby does not support.
                raise DatabaseUnavailableError(f"{self._place} is a standby, which cannot write") from error
            yield


class Database:
    """Where to connect, and which schema is ours."""

    def __init__(
        self, parameters: Mapping[str, Any], schema: str, clock: Clock, server: EmbeddedServer | None = None
    ) -> None:
        # Names and messages may hold any letter.
        self.parameters = {**CONNECTION_DEFAULTS, **parameters, "client_encoding": "UTF8"}
        self.schema = schema
        self.place = _place(parameters) if server is None else "the embedded database"
        """Name of the database for messages, without secrets."""
        self._clock = clock
        self._server = server

    @property
    def embedded(self) -> bool:
        """Tell whether this is the embedded database."""
        return self._server is not None

    @contextmanager
    def connect(
        self, *, patience: float = 0, limit: float | None = None, start_server: bool = True
    ) -> Iterator[Session]:
        """Open a connection for the block, starting the embedded server if it is down.

        Args:
            start_server: False to do without a server that is down rather than to wait for its start.
            patience: Seconds during which a refused connection is tried again (a server that restarts).
            limit: Seconds that connecting may take, if not the usual ones.

        Raises:
            DatabaseUnavailableError: the server cannot be reached, or was lost in the middle.
            ConfigurationError: the server refused a statement for want of a right.
            DatabaseRefusedError: the server refused a statement for another reason.
        """
        try:
            with self._open(patience, limit, start_server=start_server) as connection:
                yield Session(connection, self.schema, self.place)
        except psycopg.Error as error:
            raise translate(error, self.place) from error

    def _open(self, patience: float, limit: float | None, *, start_server: bool) -> psycopg.Connection[Any]:
        parameters = dict(self.parameters)
        if limit is not None:
            parameters["connect_timeout"] = max(int(limit), 1)
        give_up = self._clock.monotonic() + patience
        while True:
            try:
                return self._connect(parameters)
            except psycopg.OperationalError:
                if self._server is not None and start_server:
                    self._server.start()
                    # Only a directory that exists can be named by a descriptor.
                    return self._connect({**parameters, **self._server.connection_parameters()})
                if self._clock.monotonic() >= give_up:
                    raise
                self._clock.sleep(0.5)

    def _connect(self, parameters: dict[str, Any]) -> psycopg.Connection[Any]:
        # Statements are never prepared: a transaction pooler gives each transaction another server session.
        connection = psycopg.connect(**parameters, autocommit=True, prepare_threshold=None, row_factory=namedtuple_row)
        # The claim and the refresh count on seeing what others have committed, whatever the role's default is.
        connection.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
        connection.read_only = False
        return connection


def open_database(configuration: Configuration, clock: Clock) -> Database:
    """Name the configured database; nothing is connected yet.

    Raises:
        ConfigurationError: the URL is not one that libpq understands.
    """
    # What decides which state is used must not depend on an environment that cron does not have. Passwords, their
    # files, and certificates may still come from there, as libpq has it.
    for name in LEADING_ELSEWHERE & os.environ.keys():
        del os.environ[name]
    chosen = configuration.database
    if chosen.url is not None:
        return Database(_url_parameters(chosen.url), chosen.schema, clock)
    from batchctl.state.embedded import EmbeddedServer  # noqa: PLC0415 - only where there is no other database

    server = EmbeddedServer(configuration.state_dir / "postgresql", clock)
    # The role and our schema share a name, so "$user" in the search path would put the user's tables among ours.
    own: dict[str, Any] = {**server.connection_parameters(), "options": "-c search_path=public"}
    return Database(own, chosen.schema, clock, server)


def _url_parameters(url: str) -> dict[str, Any]:
    # Neither libpq's message nor the text itself is shown: a password may stand anywhere in it.
    wrong = ConfigurationError(
        "the database url (database.url or $BATCHCTL_DATABASE_URL) is not one that libpq understands; expected "
        "postgresql://USER@HOST:PORT/DATABASE, with %40 for an @ and %2F for a / inside a name or password"
    )
    try:
        parameters = conninfo_to_dict(url)
    except psycopg.ProgrammingError:
        raise wrong from None
    # An @ or / of a password that was not escaped ends up in the host or the database.
    for key in ("host", "hostaddr", "port", "dbname", "service"):
        if re.fullmatch(r"[\w.:,/%\[\]+ -]*", str(parameters.get(key) or "")) is None:
            raise wrong
    if "://" in url and "/" in str(parameters.get("dbname") or ""):
        raise wrong
    return parameters


def _place(parameters: Mapping[str, Any]) -> str:
    host = parameters.get("host") or parameters.get("hostaddr") or parameters.get("service")
    name = parameters.get("dbname")
    return f"the database{f' {name!r}' if name else ''}{f' on {host}' if host else ''}"
