"""Cron itself: installed, running, allowed, and with the lines that the configuration asks for."""

from __future__ import annotations

import os
import re
import shlex
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from batchctl.doctor.finding import error, ok, raised, warning
from batchctl.doctor.patient import CRON_PATH, own_entry
from batchctl.errors import BatchctlError
from batchctl.guard.identity import exists, start_ticks, started_seconds_ago, stat_fields
from batchctl.schedule import crontab
from batchctl.schedule.crontab_lines import wanted
from batchctl.schedule.user_crontab import read

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from batchctl.clock import Clock
    from batchctl.config import Configuration
    from batchctl.doctor.finding import Finding

DAEMONS = {"cron", "crond", "fcron", "busybox-cron", "bcron-sched", "supercronic"}
PID_FILES = (Path("/run/crond.pid"), Path("/run/cron.pid"))
SYSTEM = Path("/etc")
STARTS = {"run-batch", "aggregate"}
INSTALL = "call `batchctl crontab install`"


@dataclass(frozen=True)
class Lines:
    """The crontab of this user, as far as it is about one configuration.

    Attributes:
        text: The whole crontab; None if there is none, or it could not be read.
        active: Its lines that start something of the configuration.
    """

    text: bytes | None
    active: tuple[str, ...]

    @property
    def programs(self) -> tuple[Path, ...]:
        """Name the programs that its lines start, as far as they are absolute."""
        words = (word for line in self.active for word in _words(line))
        return tuple(dict.fromkeys(Path(word) for word in words if word.startswith("/") and word.endswith("/batchctl")))

    def path(self, batch: str | None = None) -> str:
        """Return the PATH that cron will give a batch: its line's, the crontab's, cron's own."""
        for line in self.active:
            words = _words(line)
            if batch is not None and ("run-batch" not in words or batch not in words):
                continue
            for word in words:
                if word.startswith("PATH="):
                    return word.removeprefix("PATH=")
        found = re.findall(rb"^[ \t]*PATH[ \t]*=[ \t]*(.*?)[ \t]*$", self.text or b"", re.MULTILINE)
        return found[-1].decode(errors="replace").strip("\"'") if found else CRON_PATH


def read_lines(configuration: Path | None) -> Lines:
    """Read the crontab of this user; what is wrong with it is left to `check_crontab`."""
    try:
        text = read()
        if text is None or configuration is None:
            return Lines(text, ())
        compared = crontab.compare(text, configuration, ())
        return Lines(text, (*compared.extra, *(line for _, line in compared.elsewhere)))
    except BatchctlError:
        return Lines(None, ())


def check_cron(clock: Clock, system: Path = SYSTEM) -> Iterator[Finding]:
    """Check that cron runs, lets this user have a crontab, and knows the present time zone."""
    pid = daemon()
    if pid is None:
        seen = Path("/proc/1/comm").exists()
        yield (error if seen else warning)(
            "cron",
            "no cron daemon is running" if seen else "no cron daemon is to be seen, and /proc hides other processes",
            "start it (systemctl enable --now cron; in a container: cron), or install it (apt-get install cron)",
        )
    else:
        changed = _zone_changed_after(pid, clock)
        if changed:
            yield warning("cron", f"cron (pid {pid}) was started before the time zone was changed", "restart cron")
        else:
            yield ok("cron", f"running (pid {pid})")
    yield from _allowed(own_entry().pw_name, system)


def check_crontab(
    configuration: Configuration, program: Sequence[str], clock: Clock, system: Path = SYSTEM
) -> Iterator[Finding]:
    """Compare the crontab of this user with what the configuration asks for, and look at /etc/cron.d."""
    try:
        asked = wanted(configuration, program, search_path=os.environ.get("PATH", ""), now=clock.now())
        found = crontab.compare(read() or b"", configuration.path, asked.lines)
    except BatchctlError as problem:
        yield raised("crontab", problem)
        return
    elsewhere = list(_in_system(configuration.path, system))
    yield from (each for each in elsewhere if each.state != "ok")
    # What is not found is told with the steps.
    for text in asked.warnings:
        yield warning("crontab", text, "see to it in the configuration, then " + INSTALL)
    by_hand = [(number, line) for number, line in found.elsewhere if STARTS & set(_words(line))]
    for number, line in by_hand if found.state != "absent" else ():
        yield warning("crontab", f"line {number} starts the same outside the markers: {line}", "remove it (crontab -e)")
    if found.state == "current":
        yield ok("crontab", f"its lines are those of {configuration.path}")
    elif found.state == "different":
        apart = [f"missing: {line}" for line in found.missing] + [f"not asked for: {line}" for line in found.extra]
        yield warning("crontab", f"its lines are not those of {configuration.path}; {'; '.join(apart)}", INSTALL)
    elif by_hand or elsewhere:
        yield ok("crontab", f"lines written by hand name {configuration.path}; compare: batchctl crontab show")
    elif asked.lines:
        yield warning(
            "crontab", f"no line of this user's crontab names {configuration.path}, so nothing starts", INSTALL
        )
    else:
        yield ok("crontab", "nothing has a schedule, so cron has nothing to start")


def daemon() -> int | None:
    """Return the process id of a running cron, None if none is to be seen."""
    for path in PID_FILES:
        with suppress(OSError, ValueError):
            # The number in a file that a crash left may be anybody's by now; a hidden process keeps its name.
            pid = int(path.read_text())
            if exists(pid) and _name(pid) in {None, *DAEMONS}:
                return pid
    return next((int(entry.name) for entry in Path("/proc").glob("[0-9]*") if _name(int(entry.name)) in DAEMONS), None)


def zone_of_daemon() -> str | None:
    """Return the TZ of the running cron, None if it has none or may not be asked."""
    pid = daemon()
    with suppress(OSError):
        for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            if entry.startswith(b"TZ="):
                return os.fsdecode(entry[3:])
    return None


def _words(line: str) -> list[str]:
    try:
        return shlex.split(line.replace("\\%", "%").replace(";", " "))
    except ValueError:
        return line.split()


def _name(pid: int) -> str | None:
    """Name the program of a process: None if it is hidden or gone, empty if it has ended and nobody has noticed."""
    try:
        name = Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return None
    return "" if (stat_fields(pid) or ["Z"])[0] in ("Z", "X") else name


def _zone_changed_after(pid: int, clock: Clock) -> bool:
    ticks = start_ticks(pid)
    with suppress(OSError):
        changed = clock.now().timestamp() - Path("/etc/localtime").lstat().st_mtime
        return bool(ticks) and changed < started_seconds_ago(ticks)
    return False


def _allowed(user: str, system: Path) -> Iterator[Finding]:
    """Ask cron.allow, and where there is none cron.deny, as crontab(1) does; root always may."""
    if user == "root":
        return
    allow, deny = system / "cron.allow", system / "cron.deny"
    with suppress(OSError):
        if allow.exists():
            if user not in allow.read_text().split():
                yield error("cron", f"{user} is not in {allow}, so it may have no crontab", f"add {user} to {allow}")
        elif deny.exists() and user in deny.read_text().split():
            yield error("cron", f"{user} is in {deny}, so it may have no crontab", f"take {user} out of {deny}")


def _in_system(configuration: Path, system: Path) -> Iterator[Finding]:
    """Look at the files of the machine's own crontab that name a configuration."""
    with suppress(OSError):
        for path in (system / "crontab", *sorted((system / "cron.d").iterdir())):
            with suppress(OSError):
                text = path.read_text(errors="replace")
                if any(
                    str(configuration) in line and "batchctl" in line
                    for line in text.splitlines()
                    if not line.lstrip().startswith("#")
                ):
                    yield _in_file(path, text)


def _in_file(path: Path, text: str) -> Finding:
    found = path.stat()
    if path.parent.name == "cron.d" and re.fullmatch(r"[A-Za-z0-9_-]+", path.name) is None:
        return error(
            "crontab", f"{path}: Debian's cron passes over names with a dot", "rename it: letters, digits, - _"
        )
    if found.st_uid != 0 or found.st_mode & 0o022:
        return error(
            "crontab", f"{path} is not root's alone, so cron refuses it", f"chown root {path}; chmod 644 {path}"
        )
    if not text.endswith("\n"):
        return error(
            "crontab", f"{path}: the last line has no newline, so cron passes over it", "end it with a newline"
        )
    return ok("crontab", f"{path} names it")
