"""As whom the embedded server runs: the owner of its state or, under root, a system user; and how to run things so."""

from __future__ import annotations

import fcntl
import os
import re
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from batchctl.errors import ConfigurationError, DatabaseUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from subprocess import CompletedProcess

    from batchctl.clock import Clock

USERS_DIRECTORY = Path("/etc")
SERVER_USER = "batchctl-db"
LIMIT = 60.0  # seconds; a crash recovery takes longer than a start
ADDING_LIMIT = 10.0
PROGRAM_LIMIT = 300.0
POLL = 0.05
ENVIRONMENT = {
    # Nothing of the caller's: PGOPTIONS, PGDATA or TZ would change the server, and cron's PATH lacks useradd.
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL": "C",
}
OWN_URL = "set [database] url to a PostgreSQL server of your own"


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


def find_account(data: Path, clock: Clock) -> Account:
    """Return the account for a server whose data are there or will be; under root, add that user where it is missing.

    Raises:
        ConfigurationError: the caller has no name, or root's system user cannot be added.
    """
    import pwd  # noqa: PLC0415  # see run

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
            problem = telling(run([*command, SERVER_USER]).stdout.decode(errors="replace"))
        except OSError as error:
            problem = f"useradd: {error.strerror}"
        return False

    # Of two useradd that begin at once, the second would give the user of the first another number.
    with alone(USERS_DIRECTORY, clock):
        until(clock, ADDING_LIMIT, exists)
    try:
        found = pwd.getpwnam(SERVER_USER)
    except KeyError:
        raise ConfigurationError(
            f"PostgreSQL does not run as root, and its user {SERVER_USER} cannot be added ({problem}); add that "
            f"system user, run batchctl as an ordinary user, or {OWN_URL}"
        ) from None
    return Account(found.pw_uid, found.pw_gid, client)


@contextmanager
def as_server(directory: Path, account: Account) -> Iterator[tuple[str, dict[str, Any]]]:
    """Lend a directory as the -D of a process of the server's, with the arguments for Popen."""
    descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    # The working directory marks what belongs to this server before PostgreSQL goes there itself.
    how: dict[str, Any] = {"cwd": directory, "pass_fds": [descriptor], "env": ENVIRONMENT, "umask": 0o077}
    if account.uid != os.geteuid():
        how |= {"user": account.uid, "group": account.gid, "extra_groups": []}
    try:
        yield f"/proc/self/fd/{descriptor}", how
    finally:
        os.close(descriptor)


def run(command: Sequence[str | Path], **how: Any) -> CompletedProcess[bytes]:
    """Run a program to its end, with nothing of the caller's environment; `how` is for subprocess.run.

    Raises:
        DatabaseUnavailableError: it has not ended after 300 seconds.
    """
    import subprocess  # noqa: PLC0415  # 10 ms, which commands that find the server running never pay

    usual = {"input": b"", "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "timeout": PROGRAM_LIMIT}
    try:
        return subprocess.run(command, check=False, **{"env": ENVIRONMENT, **usual, **how})
    except subprocess.TimeoutExpired as error:
        raise DatabaseUnavailableError(
            f"{command[0]} has not ended after {PROGRAM_LIMIT:.0f} s and was ended; try again, or {OWN_URL}"
        ) from error


def telling(output: str) -> str:
    """Return the first line that says what went wrong, else the last one."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.search("FATAL:|PANIC:|ERROR:|error:", line)]
    return (errors or lines[-1:] or [""])[0]


def until(clock: Clock, limit: float, condition: Callable[[], object]) -> bool:
    """Poll until a condition holds; tell whether it came to that within the limit, in seconds."""
    end = clock.monotonic() + limit
    while not condition():
        if clock.monotonic() >= end:
            return False
        clock.sleep(POLL)
    return True


@contextmanager
def alone(directory: Path, clock: Clock) -> Iterator[int]:
    """Keep others from starting, stopping or copying in a directory meanwhile; lend its descriptor.

    Raises:
        DatabaseUnavailableError: another process has been at it for 60 seconds.
    """

    def locked() -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    # Close-on-exec: a server that inherited it would hold the lock for ever.
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not until(clock, LIMIT, locked):
            raise DatabaseUnavailableError(
                f"another process has been starting or stopping the database in {directory} for {LIMIT:.0f} s; "
                "try again later"
            )
        yield descriptor
    finally:
        os.close(descriptor)
