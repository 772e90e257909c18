"""Who else could change a path, and with it what cron runs."""

from __future__ import annotations

import os
import pwd
import stat
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def name_of(uid: int) -> str:
    """Name a user."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user id {uid}"


def changeable(path: Path) -> tuple[Path, str] | None:
    """Return what of a path somebody else than root and this user could replace or change, and who could; else None.

    A directory with the sticky bit, such as /tmp, lets nobody replace what belongs to another.
    """
    whole = path.absolute()
    for part in dict.fromkeys((whole, *whole.parents, *(real := whole.resolve(), *real.parents))):
        with suppress(OSError):
            found = part.stat()
            mode = stat.S_IMODE(found.st_mode)
            if found.st_uid not in (0, os.geteuid()):
                return part, f"it belongs to {name_of(found.st_uid)}"
            if stat.S_ISDIR(found.st_mode) and mode & stat.S_ISVTX:
                continue
            if mode & stat.S_IWOTH:
                return part, f"anybody may write there (mode {mode:04o})"
            if mode & stat.S_IWGRP and found.st_gid not in _own_groups():
                return part, f"its group may write there (mode {mode:04o})"
    return None


def _own_groups() -> set[int]:
    # Many systems give each user a group of the same name, in which there is nobody else.
    with suppress(KeyError):
        return {0, pwd.getpwuid(os.geteuid()).pw_gid}
    return {0}
