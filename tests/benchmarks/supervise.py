"""What supervising costs: a step that sleeps, and 200 steps that end at once, against doing it by hand.

    python tests/benchmarks/supervise.py [--sleep 600] [--steps 200] [--rounds 5] [--json]

Prints CPU seconds (user and system, the steps included) of a run whose step sleeps and of one whose step is /bin/true,
which is all start-up; the peak of batchctl's memory; and the time for each step of /bin/true, supervised and spawned
by a script that does nothing else. Short runs alternate and medians are compared, so a noisy machine moves both sides
alike. The server keeps what it has committed (fsync), as a real one does.

Targets: the sleep costs less than 0.2 s of CPU and 45 MiB, a step less than 30 ms above the script.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import select
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from psycopg.conninfo import make_conninfo

from batchctl.clock import SystemClock
from batchctl.state.embedded import EmbeddedServer

if TYPE_CHECKING:
    import resource

BY_HAND = """\
import subprocess, sys
for number in range(int(sys.argv[1])):
    with open(f"{sys.argv[2]}/{number}.log", "ab") as log:
        subprocess.Popen(
            ["/bin/true"], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        ).wait()
"""
WATCH_SECONDS = 0.2


class Cost(NamedTuple):
    """What a process took, its children included except in the memory."""

    cpu_seconds: float
    seconds: float
    peak_mib: float


def cost(command: list[str], directory: Path) -> Cost:
    """Run a command to its end as cron would, and say what it took."""
    began = time.monotonic()
    with (directory / "output").open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env={"PATH": "/usr/bin:/bin"}
        )
    peak_kib, ended = 0, 0
    while not ended:
        with suppress(OSError):
            found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())
            peak_kib = int(found[1]) if found else peak_kib
        # The end is waited for, not polled: the time of short runs is compared.
        ended, status, usage = wait(process.pid, WATCH_SECONDS)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{command}: exit code {process.returncode}: {(directory / 'output').read_text()}")
    return Cost(usage.ru_utime + usage.ru_stime, time.monotonic() - began, peak_kib / 1024)


def wait(pid: int, seconds: float) -> tuple[int, int, resource.struct_rusage]:
    """Wait for the end of a child, but no longer than that; return 0 for its id if it still runs."""
    descriptor = os.pidfd_open(pid)
    try:
        select.select([descriptor], [], [], seconds)
    finally:
        os.close(descriptor)
    return os.wait4(pid, os.WNOHANG)


class Bench:
    """A configuration for each kind of run, on one server."""

    def __init__(self, directory: Path, url: str) -> None:
        self.directory = directory
        self.url = url
        (directory / "logs").mkdir()

    def supervised(self, name: str, commands: list[list[str]]) -> Cost:
        """Run a batch of these commands."""
        config = self.directory / f"{name}.toml"
        text = f'state_dir = "state"\n[database]\nurl = {json.dumps(self.url)}\n[batch.{name}]\n'
        for number, command in enumerate(commands):
            text += f'[[batch.{name}.step]]\nid = "{number}"\ncommand = {json.dumps(command)}\n'
        config.write_text(text)
        program = [sys.executable, "-m", "batchctl", "--config", str(config), "run-batch", "--force-gap"]
        return cost(program, self.directory)

    def by_hand(self, steps: int) -> Cost:
        """Spawn /bin/true that often from one script."""
        return cost([sys.executable, "-c", BY_HAND, str(steps), str(self.directory / "logs")], self.directory)


def measure(bench: Bench, sleep: float, steps: int, rounds: int) -> dict[str, float]:
    """Measure both comparisons; medians of the short runs."""
    true = ["/bin/true"]
    bench.supervised("one", [true])  # makes the schema
    sides = {
        "supervised one": lambda: bench.supervised("one", [true]),
        "supervised many": lambda: bench.supervised("many", [true] * steps),
        "by hand one": lambda: bench.by_hand(1),
        "by hand many": lambda: bench.by_hand(steps),
    }
    taken: dict[str, list[Cost]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            taken[name].append(run())
    seconds = {name: statistics.median(each.seconds for each in costs) for name, costs in taken.items()}
    cpu = {name: statistics.median(each.cpu_seconds for each in costs) for name, costs in taken.items()}
    asleep = bench.supervised("asleep", [["/bin/sleep", str(sleep)]])
    supervised = (seconds["supervised many"] - seconds["supervised one"]) / (steps - 1)
    spawned = (seconds["by hand many"] - seconds["by hand one"]) / (steps - 1)
    return {
        "sleep_seconds": sleep,
        "sleep_cpu_seconds": asleep.cpu_seconds,
        "true_cpu_seconds": cpu["supervised one"],
        "sleep_cpu_beyond_start_up_seconds": asleep.cpu_seconds - cpu["supervised one"],
        "peak_mib": asleep.peak_mib,
        "steps": steps,
        "supervised_step_seconds": supervised,
        "supervised_step_cpu_seconds": (cpu["supervised many"] - cpu["supervised one"]) / (steps - 1),
        "by_hand_step_seconds": spawned,
        "step_above_by_hand_seconds": supervised - spawned,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sleep", type=float, default=600, help="seconds that the long step sleeps")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    # Below the longest path of a socket, or every connection would take a detour.
    with tempfile.TemporaryDirectory(prefix="bc-", dir="/tmp") as name:
        server = EmbeddedServer(Path(name) / "server", SystemClock())
        server.start()
        try:
            bench = Bench(Path(name), make_conninfo(**server.connection_parameters()))
            found = measure(bench, options.sleep, options.steps, options.rounds)
        finally:
            server.stop()
    if options.json:
        print(json.dumps(found))
        return
    print(f"a step that sleeps {found['sleep_seconds']:g} s    {found['sleep_cpu_seconds']:7.3f} s CPU")
    print(f"a step of /bin/true (start-up) {found['true_cpu_seconds']:7.3f} s CPU")
    print(f"supervising the sleep          {found['sleep_cpu_beyond_start_up_seconds']:7.3f} s CPU   (target 0.2)")
    print(f"peak memory of batchctl        {found['peak_mib']:7.1f} MiB     (target 45)")
    print(
        f"{found['steps']} steps of /bin/true, each: supervised {found['supervised_step_seconds'] * 1000:.1f} ms "
        f"({found['supervised_step_cpu_seconds'] * 1000:.1f} ms CPU), "
        f"by hand {found['by_hand_step_seconds'] * 1000:.1f} ms, "
        f"above it {found['step_above_by_hand_seconds'] * 1000:.1f} ms (target 30)"
    )


if __name__ == "__main__":
    main()
