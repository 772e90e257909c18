"""What a call with nothing to do costs, against a bare psycopg script, from one run.

    python tests/benchmarks/idle.py [--rounds 20] [--json]

Prints CPU seconds (user and system, children included) of the whole process: a script that imports psycopg, connects
and runs one query; an idle `aggregate` over three grains; a `run-batch` that the gap refuses. Runs alternate, medians
are compared, so a noisy machine moves both sides alike.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import psycopg
from psycopg.conninfo import make_conninfo

from batchctl.clock import SystemClock
from batchctl.state.embedded import EmbeddedServer

BARE = "import sys, psycopg; psycopg.connect(sys.argv[1]).execute('SELECT 1').fetchone()"
# An installed program has its modules compiled.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
CONFIGURATION = """
state_dir = "state"
[database]
url = {url}
[batch.daily]
[[batch.daily.step]]
id = "31"
command = ["true"]
[rollup.trend]
source = "fact_events"
time = "occurred_at"
[rollup.trend.measures]
events = "count(*)"
"""


def cpu_seconds(command: list[str], codes: tuple[int, ...]) -> float:
    """Run a command to its end and return the CPU time that it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, check=False, stdin=subprocess.DEVNULL, capture_output=True, env=ENVIRONMENT)
    if done.returncode not in codes:
        sys.exit(f"{command}: exit code {done.returncode}: {done.stderr.decode()}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(directory: Path, rounds: int) -> dict[str, float]:
    """Return the median CPU seconds of each side."""
    server = EmbeddedServer(directory / "server", SystemClock())
    server.start()
    try:
        url = make_conninfo(**server.connection_parameters())
        config = directory / "batchctl.toml"
        config.write_text(CONFIGURATION.format(url=json.dumps(url)))
        with psycopg.connect(url) as connection:
            connection.execute("CREATE TABLE fact_events (occurred_at timestamptz)")
        program = [sys.executable, "-m", "batchctl", "--config", str(config)]
        for command in (["migrate"], ["aggregate"], ["run-batch"]):
            subprocess.run([*program, *command], check=True, capture_output=True, env=ENVIRONMENT)
        sides = {
            "psycopg script": ([sys.executable, "-c", BARE, url], (0,)),
            "aggregate, idle": ([*program, "aggregate"], (0,)),
            "run-batch, refused by the gap": ([*program, "run-batch"], (75,)),
        }
        taken: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, (command, codes) in sides.items():
                taken[name].append(cpu_seconds(command, codes))
        return {name: statistics.median(seconds) for name, seconds in taken.items()}
    finally:
        server.stop()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        medians = measure(Path(directory), options.rounds)
    base = medians["psycopg script"]
    if options.json:
        print(
            json.dumps({name: {"cpu_seconds": seconds, "ratio": seconds / base} for name, seconds in medians.items()})
        )
        return
    for name, seconds in medians.items():
        print(f"{name:32} {seconds:6.3f} s CPU  {seconds / base:5.2f} x")


if __name__ == "__main__":
    main()
