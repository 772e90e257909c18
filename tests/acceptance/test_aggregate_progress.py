"""aggregate with a long backlog: what a terminal shows, and what a signal ends."""

from __future__ import annotations

import os
import signal

import psycopg
import pytest
from psycopg.rows import namedtuple_row
from support import ROLLUP, wait_for
from terminal import Terminal

from batchctl.clock import SystemClock

pytestmark = pytest.mark.any_user

CLOCK = SystemClock()
BUCKETS = 360
CURSOR_OFF, CURSOR_ON = "\x1b[?25l", "\x1b[?25h"
# Each row takes some time, as wide ones do.
SOURCE = f"""
CREATE TABLE slowness (factor float8);
INSERT INTO slowness VALUES (0);
CREATE TABLE fact_events (occurred_at timestamptz);
CREATE INDEX ON fact_events (occurred_at);
INSERT INTO fact_events SELECT now() - i * interval '1 minute' FROM generate_series(10, {BUCKETS + 9}) AS i;
CREATE FUNCTION slow(seconds float8) RETURNS boolean LANGUAGE sql VOLATILE
AS $$ SELECT pg_sleep(seconds * s.factor) IS NOT NULL FROM slowness AS s $$;
"""
SESSIONS = (
    "SELECT count(*) FILTER (WHERE wait_event = 'PgSleep') AS reading, count(*) FILTER (WHERE state <> 'idle') AS busy "
    "FROM pg_stat_activity WHERE application_name = 'batchctl' AND datname = current_database()"
)


@pytest.fixture
def slow(batchctl):
    """A backlog whose rows take a hundredth of a second each, times a factor that the test sets."""
    batchctl.configure(ROLLUP.replace("[rollup.trend.measures]", 'where = "slow(0.01)"\n[rollup.trend.measures]'))
    with psycopg.connect(batchctl.url, autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {connection.info.dbname} SET search_path = public")
        connection.execute("SET search_path = public")
        connection.execute(SOURCE)
        batchctl("migrate")
        yield lambda factor: connection.execute("UPDATE slowness SET factor = %s", [factor])


def sessions(batchctl):
    with psycopg.connect(batchctl.url, row_factory=namedtuple_row) as connection:
        return connection.execute(SESSIONS).fetchone()


def done(batchctl):
    with psycopg.connect(batchctl.url) as connection:
        return connection.execute("SELECT sum(events) FROM public.agg_1m").fetchone()[0]


def test_a_terminal_shows_how_far_a_long_backlog_is(batchctl, slow):
    slow(1)
    code, shown = Terminal(batchctl, "aggregate").finish()
    assert code == 0, shown
    assert f"0 of {BUCKETS} buckets" in shown
    assert f"240 of {BUCKETS} buckets" in shown
    assert "rows/s" in shown
    # Then the lines are gone, the cursor is back and the result stands there.
    assert shown.rindex(CURSOR_ON) > shown.rindex(CURSOR_OFF)
    assert "success" in shown[shown.rindex(CURSOR_ON) :]
    assert "buckets  rows read" in shown[shown.rindex(CURSOR_ON) :]


@pytest.mark.parametrize("option", ["-q", "--json"])
def test_a_terminal_shows_no_progress(batchctl, slow, option):
    slow(1)
    code, shown = Terminal(batchctl, "aggregate", option).finish()
    assert code == 0, shown
    assert CURSOR_OFF not in shown
    assert "of 360" not in shown


def test_without_a_terminal_nothing_is_shown(batchctl, slow):
    slow(1)
    ended = batchctl("aggregate")
    assert (ended.stdout, ended.stderr) == ("", "")


@pytest.mark.parametrize("jobs", [1, 4])
def test_ctrl_c_ends_a_call_and_what_the_server_does_for_it(batchctl, slow, jobs):
    slow(100)
    terminal = Terminal(batchctl, "aggregate", "--jobs", str(jobs))
    wait_for(lambda: CURSOR_OFF in terminal.output.decode() and sessions(batchctl).reading, what="the progress")
    begun = CLOCK.monotonic()
    os.write(terminal.master, b"\x03")
    code, shown = terminal.finish()
    assert code == 128 + signal.SIGINT, shown
    assert CLOCK.monotonic() - begun < 5
    assert "Traceback" not in shown
    assert shown.rindex(CURSOR_ON) > shown.rindex(CURSOR_OFF)
    assert "Ended by SIGINT" in " ".join(shown.split())
    assert sessions(batchctl).busy == 0
    slow(0)
    batchctl("aggregate")
    assert done(batchctl) == BUCKETS


def test_a_terminal_that_hangs_up_twice_leaves_nothing_at_work_in_the_server(batchctl, slow):
    slow(100)
    process = batchctl.start("aggregate", "--jobs", "2")
    wait_for(lambda: sessions(batchctl).reading == 2, what="sessions at work")
    process.send_signal(signal.SIGHUP)
    CLOCK.sleep(0.01)
    process.send_signal(signal.SIGHUP)
    _, stderr = process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGHUP, stderr
    assert "Ended by SIGHUP" in stderr
    assert sessions(batchctl).busy == 0


@pytest.mark.parametrize("jobs", [1, 3])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL, the control"])
def test_sigterm_leaves_nothing_at_work_in_the_server(batchctl, slow, jobs, number):
    slow(100)
    process = batchctl.start("aggregate", "--jobs", str(jobs))
    # There are two chunks, so a third session has nothing to do.
    wait_for(lambda: sessions(batchctl).reading == min(jobs, 2), what="sessions at work")
    process.send_signal(number)
    _, stderr = process.communicate(timeout=10)
    if number == signal.SIGKILL:
        # The server goes on with a statement whose client is gone: what looks for such a session finds it.
        assert sessions(batchctl).reading > 0
        return
    assert process.returncode == 128 + number, stderr
    assert "Ended by SIGTERM" in stderr
    assert sessions(batchctl).busy == 0
    slow(0)
    batchctl("aggregate")
    assert done(batchctl) == BUCKETS
