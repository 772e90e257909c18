"""Real PostgreSQL servers and the installed command, for every tier that needs them.

Which tests run where is decided by marks, so that a new test is never left out by mistake:

* Integration tests run on each kind of server, the embedded one and the distribution's, but for those marked
  `one_server`, which do nothing to it that another does not. Acceptance tests run on the embedded one, because what
  they test does not depend on the server's version; those that do what no integration test does to a server (claims,
  the making of the schema, every statement of a command) are marked `each_server`.
* All tests run as root, and all but those marked `any_user` once more as an ordinary user (`.ci/run`). It marks what
  cannot depend on who calls: what is decided, computed and recorded in a database, what is printed, what the
  documentation says. Not marked is what is about files, modes, owners, processes, signals, cron or the embedded server.

`.ci/run` runs several tests at a time (pytest-xdist). One that starts a crowd of processes is marked `crowd` and has
the machine to itself, because others measure how long something takes.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import uuid
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from support import Command, short_directory, skip_or_fail

from batchctl.clock import SystemClock
from batchctl.state.embedded import EmbeddedServer

# What the machine is set to must not decide what the tests see; those that mean it set it themselves.
for name in [name for name in os.environ if name.startswith(("BATCHCTL_", "PG"))]:
    if name not in ("BATCHCTL_REQUIRE_ALL", "BATCHCTL_RETAIL_CSV", "BATCHCTL_RETAIL_ROWS", "BATCHCTL_TEST_SEED"):
        del os.environ[name]


# Whoever started the tests in the background may have had these ignored, and what is ignored is inherited.
for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)


def _installed_servers() -> list[Path]:
    """Name the newest PostgreSQL of the distribution, where one is installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    return [found[-1].parent.parent] if found else []


SERVERS = [
    pytest.param(None, id="embedded"),
    *(pytest.param(path, id=f"debian-{path.name}") for path in _installed_servers()),
]
if len(SERVERS) == 1:
    SERVERS.append(pytest.param("missing", id="debian"))


def pytest_addoption(parser):
    """Let the long tests be longer."""
    parser.addoption("--chaos-rounds", type=int, default=30, help="rounds of the chaos test (default 30)")
    parser.addoption("--start-rounds", type=int, default=50, help="rounds of simultaneous starts (default 50)")
    parser.addoption("--rollup-rounds", type=int, default=24, help="rounds of the rollup test (default 24)")


def pytest_generate_tests(metafunc):
    """Choose the servers of a test, as the docstring of this file says."""
    if "server" in metafunc.fixturenames:
        if "acceptance" in Path(metafunc.module.__file__).parts:
            one = metafunc.definition.get_closest_marker("each_server") is None
        else:
            one = metafunc.definition.get_closest_marker("one_server") is not None
        metafunc.parametrize("server", SERVERS[:1] if one else SERVERS, indirect=True, scope="session")


def pytest_collection_modifyitems(items):
    """Begin with those that want to be alone: later the others would have to wait for whatever takes longest."""
    items.sort(key=lambda item: item.get_closest_marker("crowd") is None)


@pytest.fixture(scope="session")
def servers():
    """The servers that run, each started when the first test asks for it."""
    with ExitStack() as stack:
        yield cache(lambda binaries: stack.enter_context(running_server(binaries)))


@pytest.fixture(scope="session")
def server(request, servers):
    """A running server of each kind; its parameters as libpq keywords."""
    if request.param == "missing":
        skip_or_fail("no PostgreSQL of the distribution in /usr/lib/postgresql")
    return servers(request.param)


@contextmanager
def running_server(binaries):
    """Run a server that is thrown away."""
    directory = short_directory()
    running = EmbeddedServer(directory / "postgresql", SystemClock(), binaries)
    try:
        running.start()
        with psycopg.connect(**running.connection_parameters(), autocommit=True) as connection:
            # The tests throw the server away; nothing of it has to survive a crash of the machine.
            for setting in ("fsync", "full_page_writes", "synchronous_commit"):
                connection.execute(f"ALTER SYSTEM SET {setting} = off")
            connection.execute("ALTER SYSTEM SET max_prepared_transactions = 10")
        # The last of them is read by a server that starts.
        running.stop()
        running.start()
        yield running
    finally:
        running.stop()
        shutil.rmtree(directory)


@pytest.fixture(autouse=True)
def _room(request, tmp_path_factory):
    """Let a test that is marked `crowd` wait for the other one that runs, and no other begin beside it."""
    shared = tmp_path_factory.getbasetemp().parent
    with (shared / "room.lock").open("w") as room:
        # Who wants to be alone keeps the door closed while it waits, or the others would go in and out for ever.
        with (shared / "door.lock").open("w") as door:
            fcntl.flock(door, fcntl.LOCK_EX)
            fcntl.flock(room, fcntl.LOCK_EX if request.node.get_closest_marker("crowd") else fcntl.LOCK_SH)
        yield


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


@pytest.fixture
def batchctl(tmp_path, database_url):
    """The program on a fresh database."""
    return Command(tmp_path, database_url)


@pytest.fixture
def own_server():
    """A server that the test may stop, with all its durability, at a path that is short enough for a socket."""
    directory = short_directory()
    server = EmbeddedServer(directory / "server", SystemClock())
    try:
        server.start()
        yield server
        server.stop()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def embedded_batchctl(tmp_path):
    """The program on an embedded database of its own."""
    command = Command(tmp_path, None)
    yield command
    EmbeddedServer(tmp_path / "state" / "postgresql", SystemClock()).stop()
