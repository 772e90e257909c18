"""Sources whose old rows are purged: what the rollup has of them stays."""

from __future__ import annotations

import logging
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict
from rollup_source import DEFINITION, create_source, differences

from batchctl.clock import SystemClock
from batchctl.rollup.ddl import migrate
from batchctl.rollup.queue import rebuild
from batchctl.rollup.refresh import tick
from batchctl.state.database import Database
from batchctl.state.migrate import upgrade

pytestmark = pytest.mark.any_user

CLOCK = SystemClock()
DAY = 86400.0
KEEPING = replace(DEFINITION, retention_seconds=30 * DAY)
AGES = ("40 days", "35 days", "20 days", "10 days", "1 hour")
OLD = "occurred_at < now() - interval '30 days'"


@pytest.fixture(params=["indexed", "unindexed"])
def session(request, database_url):
    with Database(conninfo_to_dict(database_url), "batchctl", CLOCK).connect() as session:
        create_source(session.connection)
        if request.param == "unindexed":
            session.connection.execute("DROP INDEX fact_events_occurred_at_idx")
        upgrade(session)
        yield session


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.DEBUG, "trend")
    return logging.getLogger("trend")


def execute(session, text):
    return session.connection.execute(text)


def insert(session, *ages):
    for age in ages:
        execute(
            session,
            "INSERT INTO fact_events (occurred_at, event_type, item, value) "
            f"VALUES (now() - interval '{age}', 'view', 'a', 1)",
        )


def ticks(session, log, definition):
    results = [tick(session, definition, grain.name, CLOCK, log) for grain in definition.grains]
    assert {result.outcome for result in results} <= {"success", "empty"}
    return results


def totals(session):
    rows = (execute(session, f"SELECT sum(events) FROM agg_{grain}").fetchone() for grain in ("1m", "5m", "1h"))
    return [row[0] or 0 for row in rows]


def filled(session, log, definition):
    """A rollup that has seen all ages while nothing was too old yet."""
    migrate(session, [definition], CLOCK)
    insert(session, *AGES)
    ticks(session, log, replace(definition, retention_seconds=0.0))
    assert totals(session) == [5, 5, 5]


def ignored(session):
    return execute(session, "SELECT ignored_buckets FROM batchctl.state WHERE job = 'trend/1m'").fetchone()[0]


PURGES = {
    "delete": f"DELETE FROM fact_events WHERE {OLD}",
    "truncate": f"""
        BEGIN; CREATE TEMP TABLE kept ON COMMIT DROP AS SELECT * FROM fact_events WHERE NOT ({OLD});
        TRUNCATE fact_events; INSERT INTO fact_events SELECT * FROM kept; COMMIT
    """,
}


@pytest.mark.parametrize("purge", PURGES)
@pytest.mark.parametrize("definition", [KEEPING, DEFINITION], ids=["retention", "control"])
def test_a_purge_leaves_what_is_below_the_floor(session, log, caplog, purge, definition):
    filled(session, log, definition)
    execute(session, PURGES[purge])
    results = ticks(session, log, definition)
    # The control does what deletes do, and is equal to the source again.
    assert totals(session) == ([5, 5, 5] if definition is KEEPING else [3, 3, 3])
    assert (differences(session.connection) == []) == (definition is DEFINITION)
    assert (results[0].ignored_buckets, ignored(session)) == (0, 0)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("definition", [KEEPING, DEFINITION], ids=["retention", "control"])
def test_a_row_that_comes_too_late_is_counted_and_not_aggregated(session, log, caplog, definition):
    filled(session, log, definition)
    insert(session, "33 days", "40 days", "5 days")
    results = ticks(session, log, definition)
    keeps = definition is KEEPING
    assert totals(session) == ([6, 6, 6] if keeps else [8, 8, 8])
    assert [result.ignored_buckets for result in results] == [2 if keeps else 0, 0, 0]
    assert ignored(session) == (2 if keeps else 0)
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == keeps
    if keeps:
        assert "1m: 2 buckets older than source_retention changed and are not recomputed: " in warned[0]
    assert ticks(session, log, definition)[0].outcome == "empty"
    insert(session, "34 days")
    ticks(session, log, definition)
    assert ignored(session) == (3 if keeps else 0)


@pytest.mark.parametrize("definition", [KEEPING, DEFINITION], ids=["retention", "control"])
def test_a_rebuild_leaves_what_is_below_the_floor(session, log, caplog, definition):
    filled(session, log, definition)
    execute(session, f"ALTER TABLE fact_events DISABLE TRIGGER USER; DELETE FROM fact_events WHERE {OLD}")
    now = datetime.now(UTC)
    queued = [
        rebuild(session, definition, grain.name, now - timedelta(days=60), now, log=log) for grain in definition.grains
    ]
    assert queued == ([3, 5, 5] if definition is KEEPING else [5, 5, 5])
    ticks(session, log, definition)
    assert totals(session) == ([5, 5, 5] if definition is KEEPING else [3, 3, 3])
    assert ("1m: source_retention keeps buckets before" in caplog.text) == (definition is KEEPING)


def test_the_history_is_queued_from_the_floor_on(session, log):
    insert(session, *AGES)
    migrate(session, [KEEPING], CLOCK)
    assert ticks(session, log, KEEPING)[0].ignored_buckets == 0
    assert totals(session) == [3, 3, 3]
    # Tracking that was missing queues everything once more.
    execute(session, f"DROP TRIGGER {trigger(session)} ON fact_events; DELETE FROM fact_events")
    insert(session, "40 days")
    migrate(session, [KEEPING], CLOCK)
    ticks(session, log, KEEPING)
    assert totals(session) == [0, 0, 0]


def test_tracking_that_was_missing_empties_nothing_below_the_floor(session, log):
    filled(session, log, KEEPING)
    execute(session, f"DROP TRIGGER {trigger(session)} ON fact_events; DELETE FROM fact_events")
    migrate(session, [KEEPING], CLOCK)
    ticks(session, log, KEEPING)
    assert totals(session) == [2, 2, 2]


def trigger(session):
    return execute(
        session, "SELECT tgname FROM pg_trigger WHERE tgrelid = 'fact_events'::regclass AND tgname LIKE '%delete%'"
    ).fetchone()[0]


def test_what_waited_in_the_queue_too_long_is_counted_once(session, log):
    migrate(session, [KEEPING], CLOCK)
    ticks(session, log, KEEPING)
    insert(session, "20 days")
    with psycopg.connect(session.connection.info.dsn, autocommit=True) as other:
        other.execute(
            "INSERT INTO batchctl.queued_bucket "
            "SELECT 'trend', '1m', date_bin('1 minute', occurred_at, '2000-01-01Z') FROM fact_events; "
            "UPDATE batchctl.state SET queued_from = '2000-01-01Z' WHERE job = 'trend/1m'"
        )
    # As if the tick came ten days later.
    later = replace(KEEPING, retention_seconds=10 * DAY)
    result = ticks(session, log, later)[0]
    assert (result.outcome, result.ignored_buckets, result.remaining_buckets) == ("empty", 1, 0)
    assert totals(session) == [0, 0, 0]
    assert ticks(session, log, later)[0].ignored_buckets == 0
