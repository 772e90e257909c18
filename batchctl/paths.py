"""Private directories and files: made for their owner alone, refused when they are somebody else's."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from batchctl.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterable

GROUP_OR_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
UNUSABLE = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ENAMETOOLONG,
    errno.ENOTDIR, errno.ELOOP,
}  # fmt: skip
"""Errors that say that a path cannot be used as it is; any other error at a path of ours is a bug."""


def home_directory() -> Path:
    """Ask the passwd entry, because cron's environment may say something else."""
    import pwd  # noqa: PLC0415 - not every start needs it

    try:
        return Path(pwd.getpwuid(os.geteuid()).pw_dir)
    except KeyError:
        raise ConfigurationError(
            f"user id {os.geteuid()} has no passwd entry and so no home directory; "
            "pass --config and set state_dir, or run as a user that the system knows"
        ) from None


def private_directory(path: Path) -> Path:
    """Make a directory (0700, missing parents too) or check an existing one; never change a mode.

    Raises:
        ConfigurationError: it is a symbolic link, not a directory, belongs to another user, can be written by others,
            or cannot be made.
    """
    try:
        if not path.parent.exists():
            private_directory(path.parent)
        path.mkdir(mode=0o700)
    except FileExistsError:
        refuse_foreign(path, "directory")
    except PermissionError as error:
        raise ConfigurationError(f"cannot make the directory {path}: {refusal(path)}") from error
    except OSError as error:
        raise ConfigurationError(
            f"cannot make the directory {path}: {error.strerror}; choose another state_dir or log_dir, or make it"
        ) from error
    return path


def explained(error: BaseException | None, directories: Iterable[Path]) -> ConfigurationError | None:
    """Say what an error of the operating system below one of these directories means; None if it is another error.

    Args:
        error: Any error.
        directories: The state and log directories.
    """
    if not isinstance(error, OSError) or error.errno not in UNUSABLE or not isinstance(error.filename, str | bytes):
        return None
    path = Path(os.fsdecode(error.filename))
    if not any(path.is_relative_to(directory) for directory in directories):
        return None
    if isinstance(error, PermissionError):
        return ConfigurationError(f"{path} cannot be used: {refusal(path)}")
    return ConfigurationError(f"{path} cannot be used: {error.strerror}; choose another state_dir or log_dir")


def refusal(path: Path) -> str:
    """Say which directory keeps this user from a path (or that the path itself does), whose it is and what to do."""
    for refusing in (path, *path.parents):
        with suppress(OSError):
            found = refusing.lstat()
            break
    else:
        return "permission denied"
    what = "it" if refusing == path else str(refusing)
    mode = f"mode {stat.S_IMODE(found.st_mode):04o}"
    if found.st_uid == os.geteuid():
        rights = "rwx" if stat.S_ISDIR(found.st_mode) else "rw"
        return f"{what} is closed to its owner ({mode}); chmod u+{rights} it, or choose another state_dir or log_dir"
    owner = _user(found.st_uid)
    return (
        f"{what} belongs to {owner} ({mode}), but batchctl runs as {_user(os.geteuid())}; "
        f"run it as {owner}, or choose another state_dir or log_dir"
    )


def _user(number: int) -> str:
    import pwd  # noqa: PLC0415 - not every start needs it

    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user id {number}"


def refuse_foreign(path: Path, kind: str) -> None:
    """Refuse a state path that another user could have put there or can change.

    Args:
        path: An existing path.
        kind: "directory" or "file".

    Raises:
        ConfigurationError: it is a symbolic link, of another kind, foreign-owned, or writable by others.
    """
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode):
        problem = "is a symbolic link, which somebody else could point elsewhere; name the real path"
    elif kind == "directory" and not stat.S_ISDIR(found.st_mode):
        problem = "is not a directory"
    elif kind == "file" and not stat.S_ISREG(found.st_mode):
        problem = "is not a regular file"
    elif found.st_uid != os.geteuid():
        problem = (
            f"belongs to user id {found.st_uid}, but batchctl runs as {os.geteuid()}; "
            "run it as the owner or choose another path"
        )
    elif found.st_mode & GROUP_OR_OTHERS_WRITE:
        problem = f"can be written by others (mode {stat.S_IMODE(found.st_mode):04o}); chmod go-w it or choose another"
    elif kind == "directory" and os.geteuid() != 0 and found.st_mode & stat.S_IRWXU != stat.S_IRWXU:
        # Found out in the middle of a run, it would cost the run its output.
        problem = f"is closed to its owner (mode {stat.S_IMODE(found.st_mode):04o}); chmod u+rwx it"
    else:
        return
    raise ConfigurationError(f"{path} {problem}")
