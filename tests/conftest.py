"""Real PostgreSQL servers and the installed command, for every tier that needs them."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from batchctl.clock import SystemClock
from batchctl.state.embedded import EmbeddedServer

# What the machine is set to must not decide what the tests see; those that mean it set it themselves.
for name in [name for name in os.environ if name.startswith(("BATCHCTL_", "PG"))]:
    if name not in ("BATCHCTL_REQUIRE_ALL", "BATCHCTL_RETAIL_CSV", "BATCHCTL_RETAIL_ROWS", "BATCHCTL_TEST_SEED"):
        del os.environ[name]

REQUIRE_ALL = os.environ.get("BATCHCTL_REQUIRE_ALL") == "1"


def skip_or_fail(reason: str) -> None:
    """Skip aloud where something is not installed; fail where everything has to be tested."""
    if REQUIRE_ALL:
        pytest.fail(f"BATCHCTL_REQUIRE_ALL=1, but {reason}")
    pytest.skip(reason)


def _installed_servers() -> list[Path]:
    """Name the newest PostgreSQL of the distribution, where one is installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    return [found[-1].parent.parent] if found else []


SERVERS = [pytest.param(None, id="embedded"), *(pytest.param(path, id=f"debian-{path.name}") for path in _installed_servers())]
if len(SERVERS) == 1:
    SERVERS.append(pytest.param("missing", id="debian"))


@pytest.fixture(scope="session", params=SERVERS)
def server(request, tmp_path_factory):
    """A running server of each kind; its parameters as libpq keywords."""
    if request.param == "missing":
        skip_or_fail("no PostgreSQL of the distribution in /usr/lib/postgresql")
    running = EmbeddedServer(tmp_path_factory.mktemp("server") / "postgresql", SystemClock(), request.param)
    try:
        running.start()
        with psycopg.connect(**running.connection_parameters(), autocommit=True) as connection:
            # The tests throw the server away; nothing of it has to survive a crash of the machine.
            for setting in ("fsync", "full_page_writes", "synchronous_commit"):
                connection.execute(f"ALTER SYSTEM SET {setting} = off")
            connection.execute("ALTER SYSTEM SET max_prepared_transactions = 10")
            connection.execute("SELECT pg_reload_conf()")
        yield running
    finally:
        running.stop()


@pytest.fixture
def database_url(server):
    """A fresh database, gone after the test."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    parameters = server.connection_parameters()
    with psycopg.connect(**parameters, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    try:
        yield make_conninfo(**{**parameters, "dbname": name})
    finally:
        with psycopg.connect(**parameters, autocommit=True) as connection:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@dataclass
class Command:
    """The program on one configuration, as a crontab line would call it."""

    directory: Path
    url: str | None
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def config(self) -> Path:
        return self.directory / "batchctl.toml"

    def configure(self, text: str) -> None:
        """Write the configuration; the database and the state directory are added in front."""
        database = "embedded = true" if self.url is None else f"url = {json.dumps(self.url)}"
        self.config.write_text(f'timezone = "UTC"\nstate_dir = "state"\n[database]\n{database}\n{text}')

    def start(self, *arguments: str, **options) -> subprocess.Popen:
        """Start a command and leave it running."""
        return subprocess.Popen(
            [str(Path(sys.executable).with_name("batchctl")), "--config", str(self.config), *arguments],
            **{
                "stdin": subprocess.DEVNULL,
                "stdout": subprocess.PIPE,
                "stderr": subprocess.PIPE,
                "text": True,
                "cwd": self.directory,
                # Cron's environment: nearly empty.
                "env": {"PATH": "/usr/bin:/bin", "HOME": str(self.directory), **self.environment},
                **options,
            },
        )

    def __call__(self, *arguments: str, code: int | None = 0, timeout: float = 60) -> subprocess.CompletedProcess:
        """Run a command to its end and check its exit code."""
        process = self.start(*arguments)
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        finally:
            process.kill()
        done = subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
        assert code is None or done.returncode == code, done
        return done

    def json(self, *arguments: str, code: int | None = 0):
        """Run a command with --json and decode what it printed."""
        done = self(*arguments, "--json", code=code)
        assert done.stdout.count("\n") == 1, done
        return json.loads(done.stdout)

    @property
    def log(self) -> str:
        return "".join(path.read_text() for path in sorted((self.directory / "state" / "log").glob("*.log")))


@pytest.fixture
def batchctl(tmp_path, database_url):
    """The program on a fresh database."""
    return Command(tmp_path, database_url)


@pytest.fixture
def embedded_batchctl(tmp_path):
    """The program on an embedded database of its own."""
    command = Command(tmp_path, None)
    yield command
    EmbeddedServer(tmp_path / "state" / "postgresql", SystemClock()).stop()


@pytest.fixture
def counter():
    """Numbers that never repeat within a test."""
    return itertools.count(1)


def url_parameters(url: str) -> dict[str, str]:
    """Split a connection string into libpq's keywords."""
    return conninfo_to_dict(url)
