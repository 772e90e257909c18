"""Who else could change a path, and with it what cron runs."""

from __future__ import annotations

import os
import pwd
import stat
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path


def name_of(uid: int) -> str:
    """Name a user."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user id {uid}"


class Opening(NamedTuple):
    """Part of a path that somebody else could replace or change, who could, and what closes it."""

    part: Path
    who: str
    closed_by: str


def changeable(path: Path) -> Opening | None:
    """Return what of a path somebody else than root and this user could replace or change; None if nothing.

    A directory with the sticky bit, such as /tmp, lets nobody replace what belongs to another.
    """
    whole = path.absolute()
    for part in dict.fromkeys((whole, *whole.parents, *(real := whole.resolve(), *real.parents))):
        with suppress(OSError):
            found = part.stat()
            mode = stat.S_IMODE(found.st_mode)
            if found.st_uid not in (0, os.geteuid()):
                return Opening(part, f"it belongs to {name_of(found.st_uid)}", f"chown {name_of(os.geteuid())} {part}")
            if stat.S_ISDIR(found.st_mode) and mode & stat.S_ISVTX:
                continue
            if mode & stat.S_IWOTH:
                return Opening(part, f"anybody may write there (mode {mode:04o})", f"chmod o-w {part}")
            if mode & stat.S_IWGRP and found.st_gid not in _own_groups():
                return Opening(part, f"its group may write there (mode {mode:04o})", f"chmod g-w {part}")
    return None


def _own_groups() -> set[int]:
    # Many systems give each user a group of the same name, in which there is nobody else.
    with suppress(KeyError):
        return {0, pwd.getpwuid(os.geteuid()).pw_gid}
    return {0}
