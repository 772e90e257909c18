"""Two hosts that aggregate the same rollup at once, in every combination of grains, while writers write."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from rollup_source import CONFIGURATION, GRAINS, PARTITIONED, PLAIN, create_source, differences
from rollup_writers import CLOCK, Writer
from support import Command

pytestmark = pytest.mark.any_user

SEED = int(os.environ.get("BATCHCTL_TEST_SEED", "0")) or random.SystemRandom().randrange(1, 10**9)
SECONDS = 8
PATIENCE_SECONDS = 60
"""How long they may take to be in each other's way, where the machine lets few calls run at once."""
MET = {"success", "running", "running_elsewhere"}
WRITERS = 3
PAUSE_SECONDS = 0.05
HISTORY = """
INSERT INTO fact_events (owner, occurred_at, event_type, item, value)
SELECT -1, timestamptz '2025-11-13Z' - i * interval '1 s', 'view', 'a', i FROM generate_series(1, 150000) AS i
"""
# What each of the callers asks for: the same as another, or other grains, on the same or another host.
# And each of some works several chunks off at a time.
CALLERS = (
    ("one", (), 1),
    ("two", (), 3),
    ("one", (GRAINS[0],), 2),
    ("two", (GRAINS[1],), 1),
    ("two", (GRAINS[2], GRAINS[0]), 2),
)


@pytest.mark.each_server
@pytest.mark.parametrize("source", [pytest.param(PLAIN, id="plain"), pytest.param(PARTITIONED, id="partitioned")])
def test_hosts_that_aggregate_at_once_neither_fail_nor_differ(tmp_path, database_url, source):
    print(f"BATCHCTL_TEST_SEED={SEED}")  # noqa: T201 - shown with a failure, to play it again
    with psycopg.connect(database_url, autocommit=True) as connection:
        create_source(connection, source)
        # A history that takes some ticks' time, so that they meet.
        connection.execute(HISTORY)
        hosts = {name: Command(tmp_path / name, database_url) for name in ("one", "two")}
        for host in hosts.values():
            host.directory.mkdir()
            # Without an end the calls would go on as long as the writers do.
            host.configure(CONFIGURATION.replace('settle = "0s"', 'settle = "0s"\nbudget = "1s"'))
        hosts["one"]("migrate")
        begun = CLOCK.monotonic()
        partitioned = source == PARTITIONED
        writers = [
            Writer(database_url, number, random.Random(f"{SEED}/{number}"), partitioned) for number in range(WRITERS)
        ]
        seen: Counter[str] = Counter()

        def going_on():
            age = CLOCK.monotonic() - begun
            return age < SECONDS or (age < PATIENCE_SECONDS and not seen.keys() >= MET)

        def write(writer):
            while going_on():
                writer.play(5)
                CLOCK.sleep(PAUSE_SECONDS)

        def call(name, grains, jobs):
            while going_on():
                asked = (f"--grain={grain}" for grain in grains)
                process = hosts[name].start("aggregate", "--json", f"--jobs={jobs}", *asked)
                stdout, stderr = process.communicate(timeout=60)
                assert process.returncode in (0, 75), (process.returncode, stdout, stderr)
                seen.update(grain["reason"] or grain["outcome"] for grain in json.loads(stdout)["rollups"])

        try:
            with ThreadPoolExecutor(len(writers) + len(CALLERS)) as pool:
                working = [pool.submit(write, writer) for writer in writers]
                working += [pool.submit(call, *caller) for caller in CALLERS]
            for work in working:
                work.result()
        finally:
            for writer in writers:
                writer.connection.close()
        print(f"calls: {dict(seen)}")  # noqa: T201 - shown with a failure
        # They were in each other's way, on one host by its lock, and beyond by that of the database.
        assert seen.keys() >= MET
        assert seen.keys() <= {"success", "empty", "running", "running_elsewhere"}
        hosts["two"].configure(CONFIGURATION)
        last = hosts["two"].json("aggregate")["rollups"]
        assert [grain["remaining_buckets"] for grain in last] == [0] * len(GRAINS)
        assert differences(connection) == []
        for host in hosts.values():
            assert "ERROR" not in host.log
            assert "deadlock" not in host.log
        deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
        assert connection.execute(deadlocks).fetchone() == (0,)
