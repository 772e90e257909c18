"""Gap, gap_factor and every as the claim decides them, in its transaction, by the database's clock."""

from __future__ import annotations

import json
import logging
import os
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
from support import batch

from batchctl import config_file
from batchctl.batch.guards import Guards, Skip, State
from batchctl.batch.interruption import Interruption
from batchctl.batch.plan import make_plan
from batchctl.batch.resume import Work
from batchctl.clock import SystemClock
from batchctl.guard.identity import identify
from batchctl.state.database import open_database
from batchctl.state.host import this_host
from batchctl.state.journal import Journal
from batchctl.state.store import open_store

pytestmark = pytest.mark.any_user

HOUR = timedelta(hours=1)
GROUPS = [("31", "true", 'group = "search"'), ("61", "true", 'group = "upload"')]


class WrongClock(SystemClock):
    """A host whose clock is years behind: it must decide nothing."""

    def now(self):
        return datetime(2001, 1, 1, tzinfo=UTC)


class Host:
    """A host with a history, which asks for claims."""

    def __init__(self, directory, url):
        self.directory, self.url, self.number = directory, url, 0
        with self.store(""):
            pass

    def configuration(self, options, steps=GROUPS):
        path = self.directory / "batchctl.toml"
        database = f'timezone = "UTC"\nstate_dir = "state"\n[database]\nurl = {json.dumps(self.url)}\n'
        path.write_text(database + batch(steps, options))
        return config_file.load(path, {})

    @contextmanager
    def store(self, options, steps=GROUPS):
        configuration = self.configuration(options, steps)
        database = open_database(configuration, SystemClock())
        with open_store(database, Journal(configuration.state_dir, database, SystemClock())) as store:
            yield store

    def ran(self, job, started, lasted, outcome="success", *, steps=(), groups=("search", "upload")):
        """Record a run that started so long ago and lasted so long; steps as (id, quantity, duration)."""
        self.number += 1
        name, _, group = job.partition("/")
        groups = [group] if group else list(groups)
        run_id = f"run{self.number}"
        host = this_host(self.directory / "state").host_id
        with psycopg.connect(self.url) as connection:
            connection.execute(
                "INSERT INTO batchctl.run (run_id, batch, job, groups, host, hostname, boot_id, pid, pid_start_ticks,"
                " started_at, claimed_until, finished_at, outcome, whole, config_hash, duration)"
                " VALUES (%s, %s, %s, %s, %s, 'h', 'b', 1, 1, now() - %s, now() + interval '1 day',"
                " CASE WHEN %s::text IS NOT NULL THEN now() - %s + %s END, %s, true, '', %s)",
                [run_id, name, job, groups, host, started, outcome, started, lasted, outcome, lasted],
            )
            for of_state in (name, *(f"{name}/{each}" for each in groups)):
                connection.execute(
                    "INSERT INTO batchctl.state (job, last_started_at, last_completed_at, last_outcome, last_run_id)"
                    " VALUES (%s, now() - %s, CASE WHEN %s::text IS NOT NULL THEN now() - %s + %s END, %s, %s)"
                    " ON CONFLICT (job) DO UPDATE SET last_started_at = EXCLUDED.last_started_at,"
                    " last_completed_at = coalesce(EXCLUDED.last_completed_at, state.last_completed_at),"
                    " last_outcome = EXCLUDED.last_outcome, last_run_id = EXCLUDED.last_run_id",
                    [of_state, started, outcome, started, lasted, outcome, run_id],
                )
            for step, quantity, duration in steps:
                connection.execute(
                    "INSERT INTO batchctl.step_run (run_id, account, step, attempt, started_at, finished_at, outcome,"
                    " quantity, log) VALUES (%s, 'default', %s, 1, now() - %s, now() - %s + %s, 'success', %s, '')",
                    [run_id, step, started, started, duration, quantity],
                )

    def claim(self, options, group=None, *, steps=GROUPS, force_gap=False):
        """Ask for a claim; return the skip, or None if it was granted (and is given up again)."""
        configuration = self.configuration(options, steps)
        job = "daily" if group is None else f"daily/{group}"
        guards = Guards(configuration, job, force_gap, UTC, WrongClock(), logging.getLogger("test"))
        work = Work(make_plan("daily", configuration.batches["daily"], group=group))
        self.number += 1
        run_id = f"run{self.number}"
        with self.store(options, steps) as store:
            state = State(self.store, None, this_host(configuration.state_dir))
            claim = guards.claim(
                store, state, work, run_id=run_id, process=identify(os.getpid()), interruption=Interruption()
            )
        if isinstance(claim, Skip):
            return claim
        assert claim.run["run_id"] == run_id
        return None


@pytest.fixture
def host(tmp_path, database_url):
    (tmp_path / "state").mkdir(mode=0o700)
    return Host(tmp_path, database_url)


def reason(skip):
    return skip and skip.reason


def left(skip):
    """Return how long the refusal still holds, in hours."""
    return round((skip.next_eligible_at - datetime.now(UTC)) / HOUR, 1)


def test_the_gap_grows_with_an_estimate_that_follows_the_quantity(host):
    steps = [("31", "true")]
    host.ran("daily", 24 * HOUR, 10 * HOUR, steps=[("31", 100, 10 * HOUR)], groups=())
    options = 'min_gap = "0s"\ngap_factor = 1\nquantity = {}'
    skip = host.claim(options.format(200), steps=steps)
    assert (skip.reason, left(skip)) == ("gap", 6.0), "20 hours after a completion 14 hours ago"
    assert skip.message.startswith("Completed 14h0m ago, at least 20h apart. Skipped; next possible start ")
    assert host.claim(options.format(100), steps=steps) is None, "10 hours"


def test_a_job_that_never_succeeded_is_taken_to_need_its_timeout(host):
    host.ran("daily", 8 * HOUR, 1 * HOUR, "failed")
    assert left(host.claim('gap_factor = 1\ntimeout = "9h"')) == 2.0
    assert host.claim('gap_factor = 0\ntimeout = "9h"') is None, "six hours are over"


def test_the_estimate_of_a_group_is_its_own(host):
    host.ran("daily", 60 * HOUR, 30 * HOUR)
    host.ran("daily/search", 6 * HOUR, 2 * HOUR)
    options = 'min_gap = "0s"\ngap_factor = 1.5'
    assert left(host.claim(options)) == 41.0, "45 hours after a completion 4 hours ago"
    assert host.claim(options, "search") is None, "3 hours"


def test_until_then_it_comes_from_its_steps_in_runs_of_the_whole_batch(host):
    took = [("31", 100, 4 * HOUR), ("61", 100, 1 * HOUR)]
    host.ran("daily", 8 * HOUR, 5 * HOUR, steps=took)
    options = 'min_gap = "0s"\ngap_factor = 2'
    assert left(host.claim(options, "search")) == 5.0, "8 hours after a completion 3 hours ago, not 60"
    assert host.claim(options, "upload") is None, "2 hours"
    assert left(host.claim(options)) == 7.0, "the whole batch"
    # With the first run alone that of the whole batch counts no more.
    host.ran("daily/search", 5 * HOUR, 2 * HOUR, steps=took[:1])
    assert left(host.claim(options, "search")) == 1.0, "4 hours after a completion 3 hours ago"


def test_a_group_looks_at_its_own_runs_and_those_of_the_batch(host):
    host.ran("daily", 40 * HOUR, 30 * HOUR)
    host.ran("daily/search", 3 * HOUR, 1 * HOUR)
    assert left(host.claim("", "search")) == 4.0
    assert left(host.claim("")) == 4.0, "anything in it"
    assert left(host.claim('min_gap = "20h"', "upload")) == 10.0, "from the whole batch"
    own = '[batch.daily.group.upload]\nmin_gap = "1h"\n'
    steps = [GROUPS[0], ("61", "true", f'group = "upload"\n{own}')]
    assert host.claim('min_gap = "20h"', "upload", steps=steps) is None


def test_every_counts_starts_as_the_gap_counts_completions(host):
    host.ran("daily", 100 * HOUR, HOUR)
    host.ran("daily/search", 10 * HOUR, HOUR)
    options = 'min_gap = "0s"\nevery = "48h"'
    skip = host.claim(options)
    assert (skip.reason, left(skip)) == ("not_due", 38.0)
    assert reason(host.claim(options, "search")) == "not_due"
    assert host.claim(options, "upload") is None


@pytest.mark.parametrize(("seconds", "expected"), [(90, "not_due"), (30, None)])
def test_every_forgives_cron_a_minute(host, seconds, expected):
    host.ran("daily", timedelta(days=2) - timedelta(seconds=seconds), HOUR)
    assert reason(host.claim('every = "48h"')) == expected


@pytest.mark.parametrize(("outcome", "expected"), [(None, None), ("failed", "not_due"), ("stopped", "not_due")])
def test_a_start_that_crashed_does_not_count(host, outcome, expected):
    """Without an outcome it is a run of this host whose processes are gone, as after a reboot."""
    host.ran("daily", 50 * HOUR, HOUR)
    host.ran("daily", 2 * HOUR, HOUR, outcome)
    assert reason(host.claim('every = "48h"\nmin_gap = "1m"')) == expected
    if outcome is None:
        with psycopg.connect(host.url) as connection:
            assert (
                connection.execute("SELECT outcome FROM batchctl.run WHERE run_id = 'run2'").fetchone()[0] == "crashed"
            )


def test_a_crashed_start_leaves_the_earlier_one_and_the_gap_in_force(host):
    host.ran("daily", 20 * HOUR, 17 * HOUR)
    host.ran("daily", 2 * HOUR, HOUR, None)
    assert reason(host.claim('every = "48h"\nmin_gap = "1m"')) == "not_due"
    assert left(host.claim("")) == 3.0


def test_force_gap_lifts_gap_and_every_and_nothing_else(host):
    host.ran("daily", 3 * HOUR, HOUR)
    options = 'every = "48h"\n'
    assert reason(host.claim(options)) == "not_due"
    hour = (datetime.now(UTC).hour + 12) % 24
    for more, expected in (("enabled = false", "disabled"), (f'hours = "{hour}"', "outside_hours")):
        assert reason(host.claim(options + more, force_gap=True)) == expected
    with psycopg.connect(host.url) as connection:
        connection.execute("UPDATE batchctl.state SET paused = true WHERE job = 'daily'")
    assert reason(host.claim(options, force_gap=True)) == "paused"
    with psycopg.connect(host.url) as connection:
        connection.execute("UPDATE batchctl.state SET paused = false")
    assert host.claim(options, force_gap=True) is None
