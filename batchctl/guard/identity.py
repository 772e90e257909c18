"""Which process a recorded number means: process id, start in kernel ticks, boot."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
STATE, PARENT, PROCESS_GROUP, SESSION, START_TICKS = 0, 1, 2, 3, 19
"""Places in /proc/PID/stat, counted from the field after the command's name (proc(5))."""


class ProcessIdentity(NamedTuple):
    """A process that a reused process id, a reboot or a clock that was set cannot be mistaken for.

    Ticks are counted by the kernel since boot, so they do not move when the wall clock does.
    """

    pid: int
    start_ticks: int
    boot_id: str


def boot_id() -> str:
    """Identify this boot of the machine; empty where the kernel does not tell."""
    try:
        return BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def stat_fields(pid: int) -> list[str] | None:
    """Read /proc/PID/stat behind the command's name, None if there is no such process or it is hidden."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    # The name stands in parentheses and may itself contain anything.
    return text.rpartition(")")[2].split()


def start_ticks(pid: int) -> int:
    """Return when a process started in kernel ticks since boot, 0 if that cannot be seen."""
    fields = stat_fields(pid)
    return int(fields[START_TICKS]) if fields else 0


def started_seconds_ago(ticks: int) -> float:
    """Turn a start in kernel ticks into how long ago it was, whatever the wall clock says."""
    up = float(Path("/proc/uptime").read_text(encoding="ascii").split()[0])
    return up - ticks / os.sysconf("SC_CLK_TCK")


def identify(pid: int) -> ProcessIdentity:
    """Describe a process that is known to be running."""
    return ProcessIdentity(pid, start_ticks(pid), boot_id())


def exists(pid: int) -> bool:
    """Tell whether a process has this id now, zombies included; not being allowed to ask means it has."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def alive(process: ProcessIdentity, *, hidden_counts: bool) -> bool:
    """Tell whether that very process still runs; a zombie, a reused id and another boot are dead.

    Args:
        process: What was recorded.
        hidden_counts: What to answer for an id that is in use but that /proc hides.
    """
    if process.boot_id != boot_id() or not exists(process.pid):
        return False
    fields = stat_fields(process.pid)
    if fields is None:
        return hidden_counts
    return fields[STATE] not in "ZX" and int(fields[START_TICKS]) == process.start_ticks


class Running(NamedTuple):
    """A process as /proc shows it, with what tells it from a later one of the same number."""

    pid: int
    parent: int
    process_group: int
    session: int
    start_ticks: int


def running() -> Iterator[Running]:
    """Go through the processes that /proc shows, zombies left out."""
    for name in os.listdir("/proc"):  # noqa: PTH208 - names are all that is wanted, of hundreds, often
        if not name.isdigit():
            continue
        fields = stat_fields(int(name))
        if fields and fields[STATE] not in "ZX":
            numbers = (int(fields[place]) for place in (PARENT, PROCESS_GROUP, SESSION, START_TICKS))
            yield Running(int(name), *numbers)


def ancestors() -> set[int]:
    """Return the ids of this process and of all above it."""
    found = set()
    pid = os.getpid()
    while pid > 0 and pid not in found:
        found.add(pid)
        fields = stat_fields(pid)
        pid = int(fields[PARENT]) if fields else 0
    return found


class Shown(NamedTuple):
    """What people recognise a process by."""

    command: str | None
    user: str | None


def describe(pid: int) -> Shown:
    """Name a process's program and user, None for what is hidden; never its arguments, which may hold a secret."""
    import psutil  # noqa: PLC0415 - its import costs, and most starts find nothing to name

    command = user = None
    with suppress(psutil.Error, OSError):
        process = psutil.Process(pid)
        # The user first: an end that comes in between is noticed by the name.
        user = process.username()
        command = process.name()
    return Shown(command, user)
