"""The database as a job would meet it: reached, of a version that fits, with the rights it needs, on the same time."""

from __future__ import annotations

import os
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from batchctl.doctor.finding import Finding, error, ok, raised, warning
from batchctl.errors import BatchctlError, ExitCode
from batchctl.paths import home_directory
from batchctl.state.migrate import refuse_newer, schema_version
from batchctl.state.sql import LATEST_VERSION

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from batchctl.clock import Clock
    from batchctl.state.database import Database, Session

OLDEST_SERVER = 15
LETS_IN = ("PGPASSWORD", "PGPASSFILE", "PGSERVICEFILE", "PGSSLCERT", "PGSSLKEY", "PGSSLROOTCERT", "PGSSLMODE")
"""Variables that libpq reads, that let us in, and that cron does not set."""
CLOCKS_APART, CLOCKS_FAR_APART = timedelta(seconds=5), timedelta(minutes=1)
REACH = "see that the server runs and that this host and user may connect (psql with the same URL)"


@contextmanager
def only_what_cron_sets() -> Iterator[tuple[str, ...]]:
    """Take the variables that let us in out of the environment for the block; name those that were set."""
    kept = {name: os.environ.pop(name) for name in LETS_IN if os.environ.get(name)}
    try:
        yield tuple(kept)
    finally:
        os.environ.update(kept)


def check_reachable(database: Database) -> Iterator[Finding]:
    """Connect as a job under cron would, starting the embedded server if it is down."""
    with only_what_cron_sets() as taken:
        problem = _try(database)
    if problem is None:
        yield from _passfile(database)
    elif taken and _try(database) is None:
        needed = ", ".join(f"${name}" for name in taken)
        yield error(
            "database",
            f"{database.place} lets us in only with {needed}, which cron does not set",
            "keep the password in ~/.pgpass (chmod 600), or the rest in a service file (~/.pg_service.conf)",
            ExitCode.DATABASE_UNREACHABLE,
        )
    else:
        yield raised("database", problem, REACH)


def check_server(session: Session, place: str, clock: Clock) -> Iterator[Finding]:
    """Check the server: its version, whether it can be written to, its clock."""
    before = clock.now()
    server = session.fetch_one("doctor.server")
    after = clock.now()
    what = f"{place}: PostgreSQL {server.version}, as {server.role}"
    if server.number < OLDEST_SERVER * 10_000:
        yield error("database", f"{what} is too old", f"batchctl needs {OLDEST_SERVER} or later")
    elif server.standby:
        yield error(
            "database",
            f"{what} is a standby, which cannot write",
            "name the primary in the URL (target_session_attrs=read-write)",
            ExitCode.DATABASE_UNREACHABLE,
        )
    else:
        yield ok("database", what)
    yield _clocks(server.now, before, after)


def check_schema(session: Session) -> Iterator[Finding]:
    """Check the version of the schema, and the rights of the role to it."""
    name = session.schema_name
    may = session.fetch_one("doctor.rights", schema_name=name)
    if may.made and not may.may_use:
        yield error(
            "database",
            f"the role may not use the schema {name}",
            f"GRANT USAGE ON SCHEMA {name}",
            ExitCode.CONFIGURATION,
        )
        return
    version = schema_version(session)
    if version is None:
        if may.made or may.may_make:
            yield ok("database", f"the schema {name} is not there yet; the first job makes it")
        else:
            yield error(
                "database",
                f"there is no schema {name}, and the role may not make one",
                f"CREATE SCHEMA {name} AUTHORIZATION the role, or GRANT CREATE ON DATABASE",
                ExitCode.CONFIGURATION,
            )
        return
    if version < LATEST_VERSION:
        yield error(
            "database",
            f"the schema {name} has version {version}, this program needs {LATEST_VERSION}",
            "call `batchctl migrate`",
            ExitCode.CONFIGURATION,
        )
        return
    refuse_newer(version)
    if may.closed:
        yield error(
            "database",
            f"the role may not read and write {', '.join(may.closed)} in the schema {name}",
            "GRANT SELECT, INSERT, UPDATE, DELETE on them, or connect as their owner",
            ExitCode.CONFIGURATION,
        )
    else:
        yield ok("database", f"the schema {name} has version {version}")


def check_journals(own: Path, *, reached: bool) -> Iterator[Finding]:
    """Name what waits to be recorded: for this database, and for others that nobody connects to any more.

    Args:
        own: The journal of the configured database; others are beside it.
        reached: Whether that database can be reached.
    """
    found = []
    for path in sorted(own.parent.glob("*")) if os.access(own.parent, os.R_OK | os.X_OK) else ():
        if path.suffix not in (".jsonl", ".replaying", ".refused") or not path.stat().st_size:
            continue
        count = path.read_bytes().count(b"\n")
        records = f"{count} record{'s' * (count != 1)}"
        if path.suffix == ".refused":
            found.append(
                warning("journal", f"{path}: {records} that the database refused", "read it, then remove the file")
            )
        elif path.stem != own.stem:
            found.append(
                warning(
                    "journal",
                    f"{path}: {records} wait for another database: host, port, name or schema have changed",
                    "call `batchctl status` once with the former URL, or remove the file if that database is gone",
                )
            )
        elif not reached:
            found.append(warning("journal", f"{records} wait for the database", "make it reachable; nothing is lost"))
        else:
            found.append(ok("journal", f"{records} wait for the next command"))
    yield from found or [ok("journal", "nothing waits to be recorded")]


def _try(database: Database) -> BatchctlError | None:
    try:
        with database.connect():
            return None
    except BatchctlError as problem:
        return problem


def _passfile(database: Database) -> Iterator[Finding]:
    if database.embedded or database.parameters.get("password"):
        return
    path = home_directory() / ".pgpass"
    if path.is_file() and path.stat().st_mode & 0o077:
        yield warning("database", f"{path} is open to others, so libpq passes over it", f"chmod 600 {path}")


def _clocks(theirs: datetime, before: datetime, after: datetime) -> Finding:
    # The answer was written at some time between the two.
    apart = max(before - theirs, theirs - after, timedelta(0))
    text = f"this host and the database are {apart.total_seconds():.0f} s apart"
    if apart <= CLOCKS_APART:
        return ok("clock", text)
    why = f"{text}: cron starts by the one, gaps and closed buckets are counted by the other"
    return (error if apart > CLOCKS_FAR_APART else warning)("clock", why, "keep both on time (timedatectl, chrony)")
