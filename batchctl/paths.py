"""Private directories and files: made for their owner alone, refused when they are somebody else's."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from batchctl.errors import ConfigurationError

GROUP_OR_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


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
    except OSError as error:
        raise ConfigurationError(
            f"cannot make the directory {path}: {error.strerror}; choose another state_dir or log_dir, or make it"
        ) from error
    return path


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
    else:
        return
    raise ConfigurationError(f"{path} {problem}")
