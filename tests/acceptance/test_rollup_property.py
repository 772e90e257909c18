"""Random rounds: whatever writers do while aggregate runs and is killed, every grain equals GROUP BY over the source.

    pytest tests/acceptance/test_rollup_property.py                      the rounds of the suite
    pytest tests/acceptance/test_rollup_property.py --rollup-rounds 100  more
    BATCHCTL_TEST_SEED=N pytest tests/acceptance/test_rollup_property.py the same choices again

Half of the rounds have a plain source, half a partitioned one. In each round writers insert, copy, update, delete, take
back and truncate, while one or two hosts call aggregate and some of these calls are killed. A transaction that lives
for several rounds, and some that were prepared, wait meanwhile. After the writers of a round one call must be enough.
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import psycopg
import pytest
from rollup_source import CONFIGURATION, GRAINS, PARTITIONED, PLAIN, create_source, differences
from rollup_writers import CLOCK, KINDS, HighWaterMark, Prepared, Writer
from support import Command, wait_for

if TYPE_CHECKING:
    from pathlib import Path

SEED = int(os.environ.get("BATCHCTL_TEST_SEED", "0")) or random.SystemRandom().randrange(1, 10**9)
WRITERS = 4
TRANSACTIONS = 8
QUIET_EVERY = 5
"""In each such round nothing from earlier rounds is open, so that a truncate goes through."""
ENOUGH_ROUNDS = 20
"""From here on, for one kind of source, everything has surely happened."""


@dataclass
class Cron(threading.Thread):
    """Calls aggregate on one host again and again, and kills some of the calls.

    Args:
        host: The host.
        random: Makes its choices.
        url: Where it looks for a session that is at work.
    """

    host: Command
    random: random.Random
    url: str
    ended: threading.Event = field(default_factory=threading.Event)
    seen: Counter[str] = field(default_factory=Counter)
    error: Exception | None = None

    def __post_init__(self) -> None:
        """Be a thread."""
        super().__init__()

    def __hash__(self) -> int:
        """Be one of a kind."""
        return id(self)

    def run(self) -> None:
        """Call until it is ended."""
        try:
            with psycopg.connect(self.url, autocommit=True) as connection:
                while not self.ended.is_set():
                    self._call(connection)
        except Exception as error:  # noqa: BLE001 - the round looks at it
            self.error = error

    def _call(self, connection: psycopg.Connection) -> None:
        grains = self.random.sample(GRAINS, self.random.choice([0, 0, 1, 2]))
        asked = [f"--jobs={self.random.choice([1, 1, 2, 3])}", *(f"--grain={grain}" for grain in grains)]
        process = self.host.start("aggregate", "--json", *asked)
        kill = self.random.random() < 0.5
        if kill:
            self._strike(process, connection)
        stdout, stderr = process.communicate(timeout=60)
        assert "Traceback" not in stderr, stderr
        if process.returncode == -signal.SIGKILL:
            assert kill
            self.seen["killed"] += 1
            return
        assert process.returncode in (0, 75), (process.returncode, stdout, stderr)
        for grain in json.loads(stdout)["rollups"]:
            assert grain["outcome"] in ("success", "empty", "skipped"), grain
            self.seen[grain["reason"] or grain["outcome"]] += 1

    def _strike(self, process, connection: psycopg.Connection) -> None:
        """Kill a call: somewhere, or soon after some session began to work."""
        if self.random.random() < 0.7:
            at_work = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'batchctl' AND xact_start < now()"
            while process.poll() is None and not connection.execute(at_work).fetchone()[0]:
                CLOCK.sleep(0.005)
            CLOCK.sleep(self.random.choice([0, self.random.uniform(0, 0.05)]))
            self.seen["struck at work"] += process.poll() is None
        else:
            CLOCK.sleep(self.random.uniform(0, 0.8))
        with suppress(ProcessLookupError):
            process.kill()


class Rounds:
    """A database, its writers, its hosts, and rounds of all that."""

    def __init__(self, directory: Path, url: str, source: str) -> None:
        """Make them."""
        print(f"BATCHCTL_TEST_SEED={SEED}")  # noqa: T201 - shown with a failure, to play it again
        partitioned = source == PARTITIONED
        self.url, self.random = url, random.Random(f"{SEED}/{partitioned}")
        with psycopg.connect(url, autocommit=True) as connection:
            create_source(connection, source)
        self.hosts = [Command(directory / name, url) for name in ("one", "two")]
        for host in self.hosts:
            host.directory.mkdir()
            host.configure(CONFIGURATION)
        self.hosts[0]("migrate")
        self.connection = psycopg.connect(url, autocommit=True)
        self.writers = [Writer(url, number, self._choices(), partitioned) for number in range(WRITERS)]
        self.long, self.long_rounds = Writer(url, WRITERS, self._choices(), partitioned), 0
        self.prepared = Prepared(url, WRITERS + 1, self._choices(), partitioned)
        self.mark = HighWaterMark(url)
        self.calls: Counter[str] = Counter()

    def _choices(self) -> random.Random:
        return random.Random(self.random.getrandbits(64))

    def close(self) -> None:
        """End what is open."""
        for writer in (*self.writers, self.long):
            writer.connection.close()
        self.prepared.finish()
        self.connection.close()
        self.mark.connection.close()

    def play(self, number: int) -> None:
        """Play a round, and compare."""
        quiet = number % QUIET_EVERY == QUIET_EVERY - 1
        self._straddle(quiet)
        crons = [
            Cron(host, self._choices(), self.url)
            for host in (self.hosts if self.random.random() < 0.5 else self.random.sample(self.hosts, 1))
        ]
        for cron in crons:
            cron.start()
        try:
            with ThreadPoolExecutor(WRITERS) as pool:
                working = [pool.submit(writer.play, TRANSACTIONS) for writer in self.writers[1:]]
                if quiet or self.random.random() < 0.05:
                    self.writers[0].truncate()
                working.append(pool.submit(self.writers[0].play, TRANSACTIONS))
                while not all(work.done() for work in working):
                    self.mark.advance()
                    CLOCK.sleep(0.01)
            for work in working:
                work.result()
        finally:
            for cron in crons:
                cron.ended.set()
            for cron in crons:
                cron.join()
        for cron in crons:
            assert cron.error is None, cron.error
            self.calls.update(cron.seen)
        self.compare(number)

    def _straddle(self, quiet: bool) -> None:
        """Let the long transaction and the prepared ones go on, begin or end."""
        self.prepared.finish(1.0 if quiet else 0.3)
        if self.long_rounds == 0 and not quiet:
            self.long_rounds = self.random.randint(2, 6)
        if self.long_rounds:
            self.long.begin()
            self.long_rounds -= 1
            if quiet or not self.long_rounds:
                self.long.end(commit=self.random.random() < 0.8)
                self.long.committed["long"] += 1
                self.long_rounds = 0
        if not quiet:
            self.prepared.prepare()

    def compare(self, number: int) -> None:
        """Call aggregate once, when nobody writes, and compare."""
        host = self.random.choice(self.hosts)

        def settled():
            # The session of a call that was killed may hold a grain until the server notices.
            grains = host.json("aggregate", code=None)["rollups"]
            return grains if all(grain["outcome"] != "skipped" for grain in grains) else None

        grains = wait_for(settled, what="an aggregate that nobody is in the way of")
        assert {grain["outcome"] for grain in grains} <= {"success", "empty"}, grains
        assert [grain["remaining_buckets"] for grain in grains] == [0] * len(GRAINS)
        assert differences(self.connection) == [], f"round {number}"
        self.mark.advance()
        self.mark.count_losses()

    @property
    def happened(self) -> Counter[str]:
        """Count what took effect in the source."""
        return sum((writer.committed for writer in (*self.writers, self.long)), self.prepared.committed)


@pytest.mark.parametrize("source", [pytest.param(PLAIN, id="plain"), pytest.param(PARTITIONED, id="partitioned")])
def test_every_grain_equals_its_source_whatever_happens(tmp_path, database_url, source, request):
    rounds = -(-request.config.getoption("rollup_rounds") // 2)
    with closing(Rounds(tmp_path, database_url, source)) as played:
        for number in range(rounds):
            played.play(number)
        played.prepared.finish()
        played.long.end(commit=True)
        played.compare(rounds)
        print(f"{rounds} rounds; calls: {dict(played.calls)}; changes: {dict(played.happened)}")  # noqa: T201
        print(f"an aggregation by the highest id lost {len(played.mark.lost)} rows")  # noqa: T201
        waiting = played.hosts[0].json("aggregate", "--dry-run")["rollups"]
        assert [grain["remaining_buckets"] for grain in waiting] == [0] * len(GRAINS)
        for host in played.hosts:
            assert "ERROR" not in host.log
        # Nothing of this shows much unless it happened.
        assert played.connection.execute("SELECT count(*) FROM fact_events").fetchone()[0] > 50
        expected = {*KINDS, "rollback", "truncate", "savepoint, inner back", "savepoint, outer back", "long"}
        expected |= {"commit prepared", "rollback prepared", *(["in a leaf"] if source == PARTITIONED else [])}
        if rounds >= ENOUGH_ROUNDS:
            assert expected - played.happened.keys() == set()
            assert {"killed", "struck at work", "success", "empty"} <= played.calls.keys()
        # The control: the same writers, read by the highest id, lose rows for good.
        assert len(played.mark.lost) > 0
        # And what compares does see a row that is off by one.
        played.connection.execute("UPDATE agg_1h SET events = events + 1 WHERE ctid = (SELECT min(ctid) FROM agg_1h)")
        assert len(differences(played.connection)) == 2
