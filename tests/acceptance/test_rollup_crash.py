"""The server dies between ticks and within them, and takes back what writers were told was committed.

Writers that do not wait for the disk lose their last transactions in a crash, and the ids of these are given out once
more. Whatever the source then holds, one more call has to be enough.
"""

from __future__ import annotations

import os
import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Self

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from rollup_source import CONFIGURATION, GRAINS, create_source, differences
from rollup_writers import CLOCK, Writer
from support import Command, kill_server

pytestmark = pytest.mark.any_user

SEED = int(os.environ.get("BATCHCTL_TEST_SEED", "0")) or random.SystemRandom().randrange(1, 10**9)
CRASHES = 4
WRITERS = 3
PAUSE_SECONDS = 0.02
MARK = "INSERT INTO fact_events (owner, occurred_at, item) VALUES (-1, '2025-11-13 06:51Z', %s)"
COUNT = "SELECT count(*) FROM fact_events WHERE owner = -1 AND item = %s"


class Application:
    """Writers that go on until their server is gone, and one transaction that is open then."""

    def __init__(self, url: str, chances: random.Random) -> None:
        """Connect."""
        self.over = False
        self.writers = [Writer(url, number, random.Random(chances.getrandbits(64))) for number in range(WRITERS)]
        self.open_one = Writer(url, WRITERS, random.Random(chances.getrandbits(64)))

    def write(self, writer: Writer) -> None:
        """Write until the server is gone, or the test has failed."""
        try:
            while not self.over:
                writer.play(1)
                CLOCK.sleep(PAUSE_SECONDS)
        except psycopg.OperationalError:
            pass
        finally:
            writer.connection.close()

    def __enter__(self) -> Self:
        """Begin."""
        self.open_one.begin()
        self.pool = ThreadPoolExecutor(WRITERS)
        self.working = [self.pool.submit(self.write, writer) for writer in self.writers]
        return self

    def __exit__(self, *exception: object) -> None:
        """Wait until all have noticed that the server is gone."""
        self.over = True
        self.pool.shutdown()
        self.open_one.connection.close()
        for work in self.working:
            work.result()


def crash(server, host, url, chances, name):
    """Kill the server while writers write and a call may be at work; return whether commits were lost."""
    call = None
    with Application(url, chances), closing(psycopg.connect(url, autocommit=True)) as connection:
        CLOCK.sleep(chances.uniform(0, 0.3))
        host("aggregate", code=0)
        for _ in range(3):
            connection.execute(MARK, [name])
        if chances.random() < 0.5:
            call = host.start("aggregate")
            CLOCK.sleep(chances.uniform(0, 0.8))
        # Only what is told to be committed after the last tick can be lost: a tick's own commit takes all to the disk.
        for _ in range(3):
            connection.execute(MARK, [name])
        kill_server(server._data)
    if call is not None:
        stdout, stderr = call.communicate(timeout=60)
        assert "Traceback" not in stderr, (stdout, stderr)
        assert call.returncode in (0, 69), (call.returncode, stdout, stderr)
    server.start()
    with psycopg.connect(url) as connection:
        return connection.execute(COUNT, [name]).fetchone()[0] < 6


def test_after_a_crash_one_call_brings_every_grain_to_what_the_source_then_holds(tmp_path, own_server):
    print(f"BATCHCTL_TEST_SEED={SEED}")  # noqa: T201 - shown with a failure, to play it again
    chances = random.Random(SEED)
    parameters = own_server.connection_parameters()
    url = make_conninfo(**parameters)
    with psycopg.connect(url, autocommit=True) as connection:
        # Nobody takes the end of the log to the disk but a commit that waits for it.
        connection.execute("ALTER SYSTEM SET wal_writer_delay = '10s'")
        connection.execute("SELECT pg_reload_conf()")
        create_source(connection)
        connection.execute(f"ALTER DATABASE {connection.info.dbname} SET synchronous_commit = off")
    host = Command(tmp_path, url)
    host.configure(CONFIGURATION.replace('settle = "0s"', 'settle = "0s"\nbudget = "2s"'))
    host("migrate")
    lost = 0
    for number in range(CRASHES):
        lost += crash(own_server, host, url, chances, f"crash {number}")
        with closing(psycopg.connect(url, autocommit=True)) as connection:
            writing = chances.random() < 0.5
            if writing:
                # These get the ids of transactions that were lost.
                for _ in range(5):
                    connection.execute(MARK, ["afterwards"])
            grains = host.json("aggregate")["rollups"]
            assert [grain["remaining_buckets"] for grain in grains] == [0] * len(GRAINS)
            assert differences(connection) == [], f"crash {number}"
            connection.execute(MARK, ["afterwards"])
            host("aggregate")
            assert differences(connection) == [], f"crash {number}"
    # Otherwise the server was killed for nothing.
    assert lost > 0
