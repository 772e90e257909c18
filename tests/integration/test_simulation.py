"""The simulation against reality: the guards of a start, with the claim in a real server, over the same cron times.

Only the time is not real. The database's clock is a function of the same name, earlier on the search path of the
connection, so every statement is the program's own; the lock file is a real one, held while a run lasts.

    BATCHCTL_TEST_SEED=N pytest tests/integration/test_simulation.py    the same choices again
"""

from __future__ import annotations

import heapq
import json
import logging
import os
import random
import statistics
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import takewhile
from types import SimpleNamespace
from zoneinfo import ZoneInfo

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from batchctl.batch.guards import Guards, Skip, State
from batchctl.batch.interruption import Interruption
from batchctl.batch.plan import make_plan
from batchctl.batch.resume import Work
from batchctl.cli.session import Session
from batchctl.cli.simulate import _scenario
from batchctl.clock import SystemClock
from batchctl.guard.identity import identify
from batchctl.guard.lock import Holder, acquire, lock_path, read_holder
from batchctl.report import player
from batchctl.report.player import Length
from batchctl.report.scenario import Wish
from batchctl.schedule.cron import next_time
from batchctl.state.database import Database
from batchctl.state.host import Host
from batchctl.state.migrate import upgrade
from batchctl.state.store import Store

# The claim itself is tested on each server by test_gap_claim.py.
pytestmark = [pytest.mark.any_user, pytest.mark.one_server]

SEED = int(os.environ.get("BATCHCTL_TEST_SEED", "0")) or random.SystemRandom().randrange(1, 10**9)
COMBINATIONS = 210
FAKE_CLOCK = """
CREATE SCHEMA fake;
CREATE FUNCTION fake.clock_timestamp() RETURNS timestamptz LANGUAGE sql STABLE
AS $$ SELECT current_setting('fake.now')::timestamptz $$;
"""
LOG = logging.getLogger("test")
MINUTE = timedelta(minutes=1)
# Zones with the days around which their clocks change, and some where they do not.
PLACES = [
    ("UTC", ["2026-02-27"]),
    ("Asia/Seoul", ["2026-12-29"]),
    ("Europe/London", ["2026-03-29", "2026-10-25"]),
    ("America/New_York", ["2026-03-08", "2026-11-01"]),
    ("Australia/Lord_Howe", ["2026-04-05", "2026-10-04"]),
]


class Reality:
    """Starts a batch at given times, as cron would, and lets its runs end when they are told to."""

    def __init__(self, database_url):
        self.process = identify(os.getpid())
        with psycopg.connect(database_url, autocommit=True) as connection:
            connection.execute(FAKE_CLOCK)
        # Named first, before the schema of the system's own functions.
        parameters = {**conninfo_to_dict(database_url), "options": "-c search_path=fake,pg_catalog"}
        self.parts = {}
        self.database = Database(parameters, "batchctl", SystemClock())
        self.stack = ExitStack()
        self.store = Store(self.stack.enter_context(self.database.connect()))
        self.set_clock(datetime(2000, 1, 1, tzinfo=UTC))
        upgrade(self.store.session)

    def set_clock(self, now):
        self.store.session.connection.execute("SELECT set_config('fake.now', %s, false)", (now.isoformat(),))
        assert self.store.now() == now

    def play(self, configuration, name, lengths, zone, times):
        """Yield what becomes of each cron time: job, time, reason (None for a start), and until when it is refused."""
        batch = configuration.batches[name]
        path = lock_path(configuration.state_dir, f"batch.{name}")
        running, turns = None, {}
        for at, job in times:
            if running is not None and running.ends_at <= at:
                self.end(running)
                running = None
            clock = SimpleNamespace(now=lambda at=at: at, monotonic=lambda: 0.0, sleep=lambda _: None)
            guards = Guards(
                configuration=configuration, job=job, force_gap=False, zone=zone, clock=clock, log=LOG
            )  # fmt: skip
            lock = acquire(path, Holder("here", *self.process, at))
            if lock is None:
                skip = guards.held(read_holder(path, clock))
                yield job, at, skip.reason, None
                continue
            self.set_clock(at)
            number = turns.get(job, 0)
            run_id = f"{job}-{number}"
            work = Work(make_plan(name, batch, group=job.partition("/")[2] or None))
            state = State(None, None, Host("host", "here"))
            claimed = guards.claim(
                self.store, state, work, run_id=run_id, process=self.process, interruption=Interruption()
            )
            if isinstance(claimed, Skip):
                lock.release()
                yield job, at, claimed.reason, claimed.next_eligible_at
                continue
            turns[job] = number + 1
            assert claimed.now == at
            length = lengths[job][number % len(lengths[job])]
            running = Running(lock, claimed.run, work.plan.jobs, at + min(length.duration, batch.timeout), length)
            if length.duration > batch.timeout:
                running = replace(running, outcome="timeout")
            yield job, at, None, None
        if running is not None:
            self.end(running)

    def end(self, running):
        self.set_clock(running.ends_at)
        # What a run of the whole batch tells of groups that have not run alone.
        for group, seconds in self.parts.items() if running.run["batch"] == running.run["job"] else ():
            self.store.write(
                "step_finished",
                {"run_id": running.run["run_id"], "account": "default", "step": {"search": "31", "upload": "61"}[group],
                 "attempt": 1, "resumed": 0, "group": group, "at": None, "duration": timedelta(seconds=seconds),
                 "outcome": "success", "reason": None, "exit_code": 0, "signal": None, "quantity": 100, "log": "",
                 "config_hash": None},
            )  # fmt: skip
        values = {**running.run, "outcome": running.outcome, "reason": None, "jobs": list(running.jobs)}
        self.store.write("run_finished", {**values, "duration": running.ends_at - running.run["started_at"]})
        running.lock.release()


@dataclass(frozen=True)
class Running:
    """A run in progress."""

    lock: object
    run: dict
    jobs: tuple[str, ...]
    ends_at: datetime
    length: Length
    outcome: str = ""

    def __post_init__(self):
        if not self.outcome:
            object.__setattr__(self, "outcome", "success" if self.length.success else "partial")


@pytest.fixture
def reality(database_url):
    found = Reality(database_url)
    with found.stack:
        yield found


def a_schedule(choose):
    minute = choose.choice([0, 0, 30, 59])
    hour = choose.choice([0, 1, 1, 2, 2, 3, 9, 13, 23])
    return choose.choice(
        [
            f"{minute} {hour} * * *",
            f"{minute} {hour} * * *",
            f"{minute} {hour} * * *",
            f"{minute} {hour},{(hour + 12) % 24} * * *",
            f"{minute} 1,2,3 * * *",
            f"{minute} */{choose.choice([2, 3, 6])} * * *",
            f"*/30 {hour} * * *",
            f"{minute} {hour} * * 1-5",
            f"{minute} {hour} */2 * *",
        ]
    )


def some_lengths(choose):
    return tuple(
        Length(
            choose.choice([timedelta(hours=choose.randrange(1, 40)), choose.randrange(10, 2200) * MINUTE]),
            success=choose.random() < 0.9,
        )
        for _ in range(choose.choice([1, 1, 2, 3]))
    )


def a_configuration(choose, name, zone_name):
    """Write a batch with random schedules and gaps."""
    options = {
        "schedule": a_schedule(choose),
        "min_gap": choose.choice(["0s", "1h", "6h", "6h", "11h30m"]),
        "gap_factor": choose.choice([0, 0, 0.5, 1.2]),
        "every": choose.choice(["", "", "20h", "24h", "30h", "48h"]),
        "timeout": choose.choice(["30h", "30h", "24h30m", "12h"]),
        "hours": choose.choice(["", "", "", "0-6", "1,13", "20-23"]),
    }
    groups = choose.random() < 0.4
    if groups and choose.random() < 0.5:
        del options["schedule"]
    text = f'timezone = "{zone_name}"\nstate_dir = "state"\n[database]\nembedded = true\n[batch.{name}]\n'
    text += "".join(f"{key} = {json.dumps(value)}\n" for key, value in options.items())
    for step, group in (("31", "search"), ("61", "upload")):
        text += f'[[batch.{name}.step]]\nid = "{step}"\ncommand = ["true"]\ngroup = "{group}"\n'
    for group in ("search", "upload") if groups else ():
        own = {"schedule": a_schedule(choose)}
        for key, values in (("min_gap", ["0s", "9h"]), ("every", ["", "24h"]), ("hours", ["", "8-20"])):
            if choose.random() < 0.3:
                own[key] = choose.choice(values)
        text += f"[batch.{name}.group.{group}]\n"
        text += "".join(f"{key} = {json.dumps(value)}\n" for key, value in own.items())
    return text


def cron_times(jobs, begin, end, zone):
    """List the cron times of all jobs, by what `next` uses."""

    def of(number, job):
        at = begin - timedelta(microseconds=1)
        while (at := next_time(job.schedule, at, zone)) is not None:
            yield at, number, job.name

    merged = heapq.merge(*(of(number, job) for number, job in enumerate(jobs)))
    return [(at, name) for at, _, name in takewhile(lambda each: each[0] < end, merged)]


def measured_from_the_start(rule, *, last_completed_at, last_started_at, estimate):
    del last_completed_at
    return player_rule(
        rule, last_completed_at=last_started_at, last_started_at=last_started_at, estimate=estimate
    )  # fmt: skip


player_rule = player.earliest_start


def only_of_runs_alone(self, job):
    successes = self._successes[job.name]
    return timedelta(seconds=statistics.median(successes)) if successes else self._timeout


def test_the_simulation_decides_as_the_guards_do(reality, tmp_path, monkeypatch):
    print(f"BATCHCTL_TEST_SEED={SEED}")  # noqa: T201 - shown with a failure, to play it again
    choose = random.Random(SEED)
    seen, wrong_gap, wrong_part, wrong_zone = {}, 0, 0, 0
    for number in range(COMBINATIONS):
        zone_name, days = choose.choice(PLACES)
        zone, name = ZoneInfo(zone_name), f"b{number}"
        directory = tmp_path / name
        directory.mkdir()
        (directory / "batchctl.toml").write_text(a_configuration(choose, name, zone_name))
        session = Session(config=directory / "batchctl.toml")
        minutes = {None: (Length(MINUTE),)}
        scenario = _scenario(session, name, Wish(), minutes, None)
        lengths = {job: some_lengths(choose) for job in scenario.lengths}
        scenario = replace(scenario, lengths=lengths)
        middle = datetime.fromisoformat(choose.choice(days)).replace(tzinfo=zone)
        begin = (middle - timedelta(days=choose.randrange(2, 4))).astimezone(UTC)
        end = begin + timedelta(days=choose.randrange(5, 9))

        jobs, timeout = scenario.jobs(), scenario.batch.timeout
        times = cron_times(jobs, begin, end, zone)
        reality.parts = {job.name.partition("/")[2]: job.part for job in jobs if job.part is not None}
        real = list(reality.play(session.configuration, name, lengths, zone, times))

        def simulated(zone=zone, jobs=jobs, timeout=timeout, begin=begin, end=end):
            return [
                (event.job, event.scheduled_at, event.reason,
                 event.next_eligible_at if event.reason not in (None, "running") else None)
                for event in player.play(jobs, timeout, zone, begin, end)
            ]  # fmt: skip

        assert simulated() == real, f"{name}, seed {SEED}: {(directory / 'batchctl.toml').read_text()}{lengths}"
        for _, _, reason, _ in real:
            seen[reason] = seen.get(reason, 0) + 1
        with monkeypatch.context() as patch:
            patch.setattr(player, "earliest_start", measured_from_the_start)
            wrong_gap += simulated() != real
        with monkeypatch.context() as patch:
            patch.setattr(player.Player, "_estimate", only_of_runs_alone)
            wrong_part += simulated() != real
        wrong_zone += zone_name != "UTC" and simulated(zone=UTC) != real
    assert set(seen) == {None, "running", "gap", "not_due", "outside_hours"}, "each decision occurs"
    assert min(seen.values()) > 50, seen
    # The controls: a gap that counts from the start, a group that is not known before it ran alone, another zone.
    assert wrong_gap > COMBINATIONS / 4, wrong_gap
    assert wrong_part, "what the whole batch tells of a group decides now and then"
    assert wrong_zone > COMBINATIONS / 4, wrong_zone
