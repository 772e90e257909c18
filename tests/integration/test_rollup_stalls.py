"""Who installs capture on a busy source, or takes it away, holds nobody up: measured by locks, not by the clock."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict
from rollup_source import DEFINITION, GRAINS, PARTITIONED, PLAIN, create_source, differences
from rollup_writers import CLOCK
from support import wait_for

from batchctl.rollup.apply import LOCK_MILLISECONDS
from batchctl.rollup.ddl import migrate
from batchctl.rollup.drop import drop
from batchctl.rollup.refresh import tick
from batchctl.state.database import Database
from batchctl.state.migrate import upgrade

pytestmark = pytest.mark.any_user

LOG = logging.getLogger("trend")
PATIENCE_MILLISECONDS = 10 * LOCK_MILLISECONDS
"""How long the application waits for a statement: much longer than it should, and much shorter than for ever."""
INSERT = "INSERT INTO fact_events (occurred_at, event_type, item) VALUES ('2025-11-13 06:51Z', 'view', 'a')"
BLOCKED = "SELECT pg_blocking_pids(%s)"
AT_THE_DOOR = """
SELECT pid FROM pg_locks WHERE NOT granted AND mode IN ('ShareRowExclusiveLock', 'AccessExclusiveLock') AND pid = %s
"""


@pytest.fixture
def connection(database_url):
    with psycopg.connect(database_url, autocommit=True) as connection:
        yield connection


@contextmanager
def connected(url):
    with Database(conninfo_to_dict(url), "batchctl", CLOCK).connect() as session:
        upgrade(session)
        yield session


@contextmanager
def beside(url, action):
    """Run an action in a session of its own beside the block; yield the server's process of that session."""
    pids, errors = [], []

    def work():
        try:
            with connected(url) as session:
                pids.append(session.connection.info.backend_pid)
                action(session)
        except Exception as error:  # noqa: BLE001 - looked at below
            errors.append(error)
            pids.append(0)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield wait_for(lambda: pids, what="a session")[0]
    finally:
        thread.join()
        assert errors == []


def write_while_it_waits(connection, url, pid, times):
    """Insert each time somebody waits for the source; return how often an insert had to wait behind it."""
    waited = 0
    with psycopg.connect(url, autocommit=True) as application, ThreadPoolExecutor(1) as pool:
        application.execute(f"SET statement_timeout = {PATIENCE_MILLISECONDS}")
        for _ in range(times):
            wait_for(lambda: connection.execute(AT_THE_DOOR, [pid]).fetchone(), what="a wait for the source")
            writing = pool.submit(application.execute, INSERT)
            behind = False
            while not writing.done():
                behind |= pid in connection.execute(BLOCKED, [application.info.backend_pid]).fetchone()[0]
            waited += behind
            writing.result()
    return waited


@pytest.mark.parametrize("source", [pytest.param(PLAIN, id="plain"), pytest.param(PARTITIONED, id="partitioned")])
def test_a_migrate_behind_a_long_transaction_stalls_no_writer(connection, database_url, source):
    create_source(connection, source)
    with psycopg.connect(database_url) as long:
        long.execute(INSERT)
        with beside(database_url, lambda session: migrate(session, [DEFINITION], CLOCK)) as pid:
            assert write_while_it_waits(connection, database_url, pid, 3) > 0
            long.commit()
    with connected(database_url) as session:
        connection.execute(INSERT)
        for grain in GRAINS:
            tick(session, DEFINITION, grain, CLOCK, LOG)
    assert differences(connection) == []
    assert connection.execute("SELECT events FROM agg_1h").fetchall() == [(5,)]


def test_a_drop_behind_a_long_query_stalls_no_writer(connection, database_url):
    create_source(connection)
    with connected(database_url) as session:
        migrate(session, [DEFINITION], CLOCK)
    with psycopg.connect(database_url) as reader:
        reader.execute("SELECT FROM fact_events")
        with beside(database_url, lambda session: drop(session, "trend", CLOCK)) as pid:
            assert write_while_it_waits(connection, database_url, pid, 2) > 0
            reader.commit()
    assert connection.execute("SELECT to_regclass('agg_1m')").fetchone() == (None,)


def test_the_same_check_catches_a_trigger_that_is_made_without_a_limit(connection, database_url):
    """A negative control: who waits for the source without an end makes every writer wait."""
    create_source(connection)
    connection.execute("CREATE FUNCTION mine() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'")
    naive = "CREATE TRIGGER mine AFTER INSERT ON fact_events EXECUTE FUNCTION mine()"
    with psycopg.connect(database_url) as long:
        long.execute(INSERT)
        with beside(database_url, lambda session: session.connection.execute(naive)) as pid:
            with pytest.raises(psycopg.errors.QueryCanceled):
                write_while_it_waits(connection, database_url, pid, 1)
            long.commit()
