"""What tests of all tiers share: the installed command, waiting for real processes, what may be missing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psycopg
import pytest

from batchctl.clock import SystemClock
from batchctl.state.embedded import EmbeddedServer

PROGRAM = Path(sys.executable).with_name("batchctl")
NOWHERE = "postgresql://nobody@127.0.0.1:1/none"
"""A database that cannot be reached."""
ROLLUP = """
[rollup.trend]
source = "fact_events"
time = "occurred_at"
[rollup.trend.measures]
events = "count(*)"
"""
MEMORY = Path("/dev/shm")
ROOM = 4 << 30  # bytes, for all servers of all workers; a container has 64 MB
REQUIRE_ALL = os.environ.get("BATCHCTL_REQUIRE_ALL") == "1"


def skip_or_fail(reason: str) -> None:
    """Skip aloud where something is not installed; fail where everything has to be tested."""
    if REQUIRE_ALL:
        pytest.fail(f"BATCHCTL_REQUIRE_ALL=1, but {reason}")
    pytest.skip(reason)


def short_directory() -> Path:
    """Make a directory whose path is short enough for a socket that other processes are to find.

    In memory where there is room: a server makes some 300 files for each database, and syncs 40 MB when it is made.
    """
    roomy = MEMORY.is_dir() and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > ROOM
    return Path(tempfile.mkdtemp(prefix="bc-", dir=MEMORY if roomy else "/tmp"))


def wait_for(condition, seconds=30.0, what="condition"):
    """Poll until something real has happened."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError(f"{what} did not come true within {seconds}s")


def gone(pid):
    """Tell whether a process has ended; a zombie that nobody reaps has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def server_processes(data: Path) -> list[int]:
    """Return the process ids of the server that has its data there: the postmaster and all it has started."""
    here = data.stat()
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and os.path.samestat((entry / "cwd").stat(), here):
                found.append(int(entry.name))
    return found


def kill_server(data: Path) -> None:
    """Kill a server and all its sessions at once, as a crash of the machine would, and wait until they are gone."""
    pids = server_processes(data)
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    # One that is being killed still looks alive, and its socket still takes connections.
    wait_for(lambda: all(map(gone, pids)), what="the end of a server that was killed")


def batch(steps, options="", name="daily"):
    """Write a batch: steps as (id, shell line, further keys)."""
    text = f"[batch.{name}]\n{options}\n"
    for step, line, *more in steps:
        keys = "\n".join(more)
        text += f'[[batch.{name}.step]]\nid = "{step}"\ncommand = ["sh", "-c", {json.dumps(line)}]\n{keys}\n'
    return text


@dataclass
class Command:
    """The program on one configuration, as a crontab line would call it."""

    directory: Path
    url: str | None
    environment: dict[str, str] = field(default_factory=dict)
    program: tuple[str, ...] = (str(PROGRAM),)

    @property
    def config(self) -> Path:
        return self.directory / "batchctl.toml"

    def configure(self, text: str) -> None:
        """Write the configuration; the database and the state directory are added in front."""
        database = "embedded = true" if self.url is None else f"url = {json.dumps(self.url)}"
        self.config.write_text(f'timezone = "UTC"\nstate_dir = "state"\n[database]\n{database}\n{text}')

    def start(self, *arguments: str, **options) -> subprocess.Popen:
        """Start a command and leave it running."""
        return subprocess.Popen(
            [*self.program, "--config", str(self.config), *arguments],
            **{
                "stdin": subprocess.DEVNULL,
                "stdout": subprocess.PIPE,
                "stderr": subprocess.PIPE,
                "text": True,
                "cwd": self.directory,
                # Cron's environment: nearly empty.
                "env": {"PATH": "/usr/bin:/bin", "HOME": str(self.directory), **self.environment},
                **options,
            },
        )

    def __call__(self, *arguments: str, code: int | None = 0, timeout: float = 60) -> subprocess.CompletedProcess:
        """Run a command to its end and check its exit code."""
        process = self.start(*arguments)
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        finally:
            process.kill()
        done = subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
        assert code is None or done.returncode == code, done
        return done

    def json(self, *arguments: str, code: int | None = 0):
        """Run a command with --json and decode what it printed."""
        done = self(*arguments, "--json", code=code)
        assert done.stdout.count("\n") == 1, done
        return json.loads(done.stdout)

    def pid(self, name: str = "step.pid") -> int:
        """Wait until a step has written a process id into a file, and return it."""
        path = self.directory / name
        return int(wait_for(lambda: path.exists() and path.read_text().strip(), what=name))

    @property
    def log(self) -> str:
        return "".join(path.read_text() for path in sorted((self.directory / "state" / "log").glob("*.log")))


def embedded_connection(directory):
    """Connect to the embedded database of a configuration's directory, however long its path is."""
    server = EmbeddedServer(directory / "state" / "postgresql", SystemClock())
    return psycopg.connect(**server.connection_parameters())


CRONTAB_EXAMPLE = Path(__file__).resolve().parents[1] / "crontab.example"
# What a batch and a rollup of crontab.example need.
CRONTAB_CONFIGURATION = """\
state_dir = "state"
[database]
embedded = true
[batch.daily]
schedule = "0 1 * * *"
[[batch.daily.step]]
id = "31"
command = ["echo", "what a step prints goes to its log"]
[rollup.trend]
source = "fact_events"
time = "occurred_at"
dimensions = ["event_type", "item"]
[rollup.trend.measures]
events = "count(*)"
value_sum = "sum(value)"
"""
FACT_EVENTS = """
CREATE TABLE fact_events (occurred_at timestamptz, event_type text, item text, value integer);
CREATE INDEX ON fact_events (occurred_at);
"""
