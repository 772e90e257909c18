"""Debian's cron, started for a test where it does not run."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from contextlib import contextmanager, suppress
from pathlib import Path

from support import wait_for

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
