"""The embedded PostgreSQL: a server of one's own that outlives the command that started it.

Under root the server is another user, who cannot reach a data directory below root's private ones by path, and their
modes stay as they are. So it is handed the directory itself, as an open descriptor: `-D /proc/self/fd/N`.
"""

from __future__ import annotations

import os
import re
import signal
import stat
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from batchctl.errors import ConfigurationError, DatabaseUnavailableError
from batchctl.paths import private_directory
from batchctl.state.binaries import PACKAGE as PACKAGE  # noqa: PLC0414  # the demo finds psql in it
from batchctl.state.binaries import choose, reachable_for
from batchctl.state.server_account import LIMIT, OWN_URL, alone, as_server, find_account, run, telling, until

if TYPE_CHECKING:
    from collections.abc import Iterable
    from subprocess import CompletedProcess

    from batchctl.clock import Clock
    from batchctl.state.server_account import Account

NAME = "batchctl"  # of the role and of the database
PORT = "5432"
SOCKET = f".s.PGSQL.{PORT}"
LONGEST_SOCKET_PATH = 107  # bytes
FIRST_WITH_BUILTIN_LOCALE = 17
ORPHANS_LIMIT = 10.0  # seconds
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
# batchctl: "$user" is the role batchctl, whose own schema has that name and is no place for the user's tables
search_path = 'public'
"""
_held: dict[tuple[int, int], int] = {}  # never closed: a cancel request opens the socket's path again, however late


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
        try:
            # First, because a server that runs for somebody else lets nobody else in, and does not say why.
            private_directory(self._directory)
            if self._ready():
                return
            with alone(self._directory, self._clock) as lock:
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
            with alone(self._directory, self._clock):
                pid = self._postmaster()
                if pid is None:
                    return
                os.kill(pid, signal.SIGINT)
                if not until(self._clock, LIMIT, lambda: not _processes(self._data)):
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
        until(self._clock, ORPHANS_LIMIT, lambda: self.running() or not _processes(self._data))
        until(self._clock, LIMIT, lambda: self._ready() or not self.running())
        until(self._clock, ORPHANS_LIMIT, lambda: self._ready() or not _processes(self._data))
        if self._ready():
            return True
        if left := _processes(self._data):
            raise DatabaseUnavailableError(
                f"the embedded database is not ready, but its processes {', '.join(map(str, left))} still run in "
                f"{self._data} ({self._last_words()}); wait for them or end them, then try again"
            )
        return False

    def _launch(self, lock: int) -> None:
        import subprocess  # noqa: PLC0415  # as in server_account.run

        binaries = choose(self._binaries, self._data)
        account = find_account(self._data, self._clock)
        prefix = reachable_for(account, binaries, self._clock)
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
            with as_server(self._data, account) as (place, how):
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
        until(self._clock, LIMIT, lambda: process.poll() is not None or self._ready())
        if process.poll() is not None:
            raise DatabaseUnavailableError(f"the embedded database does not start: {self._last_words()}")
        process.returncode = 0  # it is meant to outlive this process, which Popen would warn of
        if not self._ready():
            raise DatabaseUnavailableError(
                f"the embedded database is not ready after {LIMIT:.0f} s and goes on starting "
                f"({self._last_words()}); try again later"
            )

    def _initialise(self, prefix: Path, major: int, account: Account) -> None:
        import shutil  # noqa: PLC0415  # as in server_account.run

        new = self._directory / "data.new"
        if os.path.lexists(new):
            for pid in _processes(new):  # of a killed start, and still writing
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            until(self._clock, ORPHANS_LIMIT, lambda: not _processes(new))
            shutil.rmtree(new)
        new.mkdir(mode=0o700)
        os.chown(new, account.uid, account.gid)
        builtin = ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        locale = ["--locale=C", *(builtin if major >= FIRST_WITH_BUILTIN_LOCALE else [])]
        options = ["-U", NAME, "--auth=peer", "--encoding=UTF8", "--no-instructions", *locale]
        with as_server(new, account) as (place, how):
            initdb = run([prefix / "bin/initdb", "-D", place, *options], **how)
            _expect(initdb)
            create = f"CREATE DATABASE {NAME};\n".encode()
            _expect(run([prefix / "bin/postgres", "--single", "-D", place, "postgres"], input=create, **how))
        client = account.client.replace('"', '""')
        _write(new / "pg_hba.conf", ACCESS, os.O_TRUNC)
        _write(new / "pg_ident.conf", f'# batchctl: the owner of its state\n{NAME} "{client}" {NAME}\n', os.O_TRUNC)
        _write(new / "postgresql.conf", SETTINGS, os.O_APPEND)
        new.rename(self._data)

    def _last_words(self) -> str:
        started, logs = self._directory / "start.log", self._data / "log"
        with suppress(OSError, ValueError):
            # It says why the server did not even get as far as its own log, else only where that is.
            words = telling(started.read_text(errors="replace"))
            if words and "HINT:" not in words:
                return words
            newest = max(logs.glob("*.log"), key=lambda log: log.stat().st_mtime)
            # Its last lines alone: the day's earlier errors are not of this start.
            if words := telling("\n".join(newest.read_text(errors="replace").splitlines()[-5:])):
                return words
        return f"see {started} and {logs}"


def _open_directory(directory: Path) -> int:
    return os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def _expect(run: CompletedProcess[bytes]) -> None:
    output = run.stdout.decode(errors="replace")
    if run.returncode or "ERROR:" in output:  # which a single-user server survives
        raise DatabaseUnavailableError(
            f"cannot initialise the embedded database: {telling(output) or f'status {run.returncode}'}; or {OWN_URL}"
        )


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
        shown = run(look, user=here.st_uid, group=here.st_gid, extra_groups=[]).stdout.decode()
        found += map(int, re.findall(rf"^{here.st_dev}:{here.st_ino}:/proc/(\d+)/", shown, re.MULTILINE))
    return found
