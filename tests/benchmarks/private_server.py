"""A throw-away PostgreSQL server with default settings, databases on it, and what its statements took."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg.conninfo import make_conninfo

if TYPE_CHECKING:
    from collections.abc import Iterator

PROGRAM = Path(sys.executable).with_name("batchctl")
DURATION = re.compile(r"duration: ([\d.]+) ms  (parse|bind|execute|statement)\b")
SETTINGS = """
listen_addresses = ''
unix_socket_directories = '{directory}'
log_destination = 'stderr'
logging_collector = off
log_line_prefix = '%p '
"""


def find_binaries(given: Path | None) -> Path:
    """Return the directory of the server's programs and of pgbench; end the script without them."""
    places = [given.absolute()] if given else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    for place in places:
        if all((place / program).exists() for program in ("initdb", "pg_ctl", "psql", "pgbench")):
            return place
    sys.exit("no PostgreSQL server with pgbench found; name its bin directory with --binaries")


class PrivateServer:
    """A server of its own in a directory, reached through a socket there; under root it runs as `postgres`.

    Args:
        directory: An empty directory on the disk that is to be measured; removed by `close`.
        binaries: Where initdb, pg_ctl, psql and pgbench are.
    """

    def __init__(self, directory: Path, binaries: Path) -> None:
        """Initialise the cluster and start the server."""
        self.directory = directory
        self.binaries = binaries
        self._log = directory / "server.log"
        self._account: dict[str, Any] = {}
        if os.geteuid() == 0:
            self._account = {"user": "postgres", "group": "postgres", "extra_groups": [], "cwd": "/"}
            shutil.chown(directory, "postgres", "postgres")
        data = str(directory / "data")
        # Nobody else can enter the directory of the socket.
        self._control("initdb", "-D", data, "-A", "trust", "-U", "bench", "-E", "UTF8", "--locale=C.UTF-8")
        with (directory / "data" / "postgresql.conf").open("a") as settings:
            settings.write(SETTINGS.format(directory=directory))
        self._control("pg_ctl", "-D", data, "-l", str(self._log), "-w", "start")

    def _control(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [str(self.binaries / program), *arguments], check=True, stdout=subprocess.DEVNULL, **self._account
        )

    def close(self) -> None:
        """End the server and remove its directory."""
        try:
            if (self.directory / "data" / "postmaster.pid").exists():
                self.stop("immediate")
        finally:
            shutil.rmtree(self.directory, ignore_errors=True)

    def stop(self, mode: str = "fast") -> None:
        """End the server; its data stays."""
        self._control("pg_ctl", "-D", str(self.directory / "data"), "-m", mode, "-w", "stop")

    def single_user(self, database: str, statements: list[str], *wrapper: str) -> str:
        """Run statements on a copy of the data of a server that was ended, and return what was printed.

        Args:
            database: Where.
            statements: Each is a transaction; none holds a semicolon before an empty line.
            wrapper: A command that runs the server's program, such as a profiler's.
        """
        copy = self.directory / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        subprocess.run(["cp", "-a", str(self.directory / "data"), str(copy)], check=True)
        command = [*wrapper, str(self.binaries / "postgres"), "--single", "-j", "-D", str(copy), database]
        done = subprocess.run(
            command,
            check=False,
            input="".join(f"{statement};\n\n" for statement in statements),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **self._account,
        )
        if done.returncode or "ERROR:" in done.stdout:
            sys.exit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}")
        return done.stdout

    def site(self, name: str) -> Site:
        """Make a database, with a configuration of the program beside it."""
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"'.encode())
        directory = self.directory / name
        directory.mkdir(mode=0o700)
        return Site(self, name, directory)

    def url(self, database: str) -> str:
        """Return the connection string of a database."""
        return make_conninfo(host=str(self.directory), user="bench", dbname=database)

    @contextmanager
    def statements(self) -> Iterator[list[float]]:
        """Log what new sessions run inside the block; the list then holds each statement's milliseconds.

        Parsing, planning and running of a statement count as one.
        """
        taken: list[float] = []
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute("ALTER ROLE bench SET log_min_duration_statement = 0")
            begun = self._log.stat().st_size
            try:
                yield taken
            finally:
                connection.execute("ALTER ROLE bench RESET log_min_duration_statement")
        with self._log.open(errors="replace") as log:
            log.seek(begun)
            before = ""
            for milliseconds, phase in DURATION.findall(log.read()):
                if phase in ("parse", "statement") or not taken or (phase == "bind" and before != "parse"):
                    taken.append(0.0)
                taken[-1] += float(milliseconds)
                before = phase


class Site:
    """A database and the installed program on it.

    Args:
        server: Where it is.
        name: Of the database.
        directory: For the configuration and the state of the program.
    """

    def __init__(self, server: PrivateServer, name: str, directory: Path) -> None:
        """Remember the place."""
        self.server = server
        self.name = name
        self.directory = directory
        self.url = server.url(name)
        self._config = directory / "batchctl.toml"

    def configure(self, text: str) -> None:
        """Write the configuration; database and state directory are added in front."""
        self._config.write_text(f'state_dir = "state"\n[database]\nurl = {json.dumps(self.url)}\n{text}')

    def batchctl(self, *arguments: str) -> float:
        """Run the installed command and return its seconds; end the script when it fails."""
        return self._timed([str(PROGRAM), "--config", str(self._config), *arguments])

    def psql(self, *statements: str) -> float:
        """Run statements in one psql, each in its own transaction, and return its seconds."""
        commands = [part for statement in statements for part in ("-c", statement)]
        return self._timed(
            [str(self.server.binaries / "psql"), "-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", self.url, *commands]
        )

    def pgbench(self, script: str, *options: str, synchronous_commit: str = "on") -> float:
        """Run pgbench with prepared statements and return its transactions a second."""
        file = self.directory / "pgbench.sql"
        file.write_text(script)
        done = subprocess.run(
            [str(self.server.binaries / "pgbench"), "-n", "-M", "prepared", "-f", str(file), *options, self.name],
            check=True,
            capture_output=True,
            text=True,
            env={
                **os.environ,
                "PGHOST": str(self.server.directory),
                "PGUSER": "bench",
                "PGOPTIONS": f"-c synchronous_commit={synchronous_commit}",
            },
        )
        return float(re.search(r"tps = ([\d.]+)", done.stdout)[1])  # type: ignore[index]

    def value(self, query: str) -> Any:
        """Return the one value of a query."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            row = connection.execute(query.encode()).fetchone()
        assert row is not None
        return row[0]

    def _timed(self, command: list[str]) -> float:
        begun = time.monotonic()
        done = subprocess.run(command, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return time.monotonic() - begun
