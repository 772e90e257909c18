"""Debian's cron, started for a test where it does not run."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import subprocess
from contextlib import contextmanager, suppress
from pathlib import Path

from support import wait_for

SPOOL = Path("/var/spool/cron/crontabs")
PID_FILE = Path("/run/crond.pid")
TOOLS = "/usr/sbin:/usr/bin:/sbin:/bin"


def command_line(pid: int | str) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""


def cron_pid() -> int | None:
    """The running daemon's, whoever started it; a zombie's command line is empty."""
    with suppress(OSError, ValueError):
        pid = int(PID_FILE.read_text())
        if re.match(r"(\S*/)?cron\b", command_line(pid)):
            return pid
    return None


@contextmanager
def cron_daemon():
    if cron_pid() is not None:
        yield
        return
    pid_file_was_there = PID_FILE.exists()
    subprocess.run([shutil.which("cron", path=TOOLS)], check=True, stdin=subprocess.DEVNULL)
    pid = None
    try:
        pid = wait_for(cron_pid, 10, "the start of cron")
        yield
    finally:
        if pid is not None:
            os.kill(pid, signal.SIGTERM)
            wait_for(lambda: cron_pid() is None, 10, f"the end of cron (pid {pid})")
        if not pid_file_was_there:
            PID_FILE.unlink(missing_ok=True)


def crontab(*arguments: str, text: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "PATH": TOOLS, "LC_ALL": "C"}
    return subprocess.run(["crontab", *arguments], input=text, capture_output=True, check=False, env=environment)


def installed_crontab() -> bytes | None:
    """The crontab of root, None if there is none, which is not the same as an empty one."""
    done = crontab("-l")
    if done.returncode and b"no crontab for" not in done.stderr:
        raise AssertionError(done)
    return None if done.returncode else done.stdout


def processes_naming(path: Path) -> list[str]:
    mine = str(os.getpid())
    lines = {entry.name: command_line(entry.name) for entry in Path("/proc").glob("[0-9]*") if entry.name != mine}
    return [f"{pid} {line}" for pid, line in lines.items() if str(path) in line]


@contextmanager
def crontab_of_root(text: bytes):
    """Give root this crontab for a block, and what was there before back."""
    before = installed_crontab()
    try:
        done = crontab("-", text=text)
        assert done.returncode == 0, done.stderr
        yield
    finally:
        crontab("-r") if before is None else crontab("-", text=before)
        assert installed_crontab() == before


@contextmanager
def cron_to_itself():
    """Keep other tests away from cron and from root's crontab for a block.

    SIGTERM unwinds it like Ctrl-C, so that no crontab, daemon or sendmail stays behind.
    """
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Where there is no cron, its directory's parent is there all the same.
    directory = os.open(SPOOL.parent if SPOOL.parent.is_dir() else SPOOL.parents[1], os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield
    finally:
        os.close(directory)
        signal.signal(signal.SIGTERM, previous)
