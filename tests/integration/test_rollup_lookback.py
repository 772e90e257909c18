"""Rollups without triggers: each tick computes the last stretch of time anew, and knows nothing of what is older."""

from __future__ import annotations

import logging
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict
from rollup_source import DEFINITION, PARTITIONED, create_source, differences

from batchctl.clock import SystemClock
from batchctl.errors import ConfigurationError
from batchctl.rollup import refresh
from batchctl.rollup.ddl import migrate
from batchctl.rollup.look import look_at
from batchctl.rollup.queue import rebuild
from batchctl.rollup.refresh import tick
from batchctl.state.database import Database
from batchctl.state.migrate import upgrade

pytestmark = pytest.mark.any_user

CLOCK = SystemClock()
LOG = logging.getLogger("trend")
HOURS = 3600.0
LOOKING_BACK = replace(DEFINITION, lookback_seconds=2 * HOURS)
OURS = """
SELECT tgname FROM pg_trigger WHERE NOT tgisinternal
UNION ALL SELECT proname FROM pg_proc WHERE proname LIKE 'capture%'
UNION ALL SELECT relation::text FROM batchctl.source_partition
"""


@pytest.fixture
def session(database_url):
    with Database(conninfo_to_dict(database_url), "batchctl", CLOCK).connect() as session:
        create_source(session.connection)
        upgrade(session)
        yield session


def execute(session, text):
    return session.connection.execute(text)


def insert(session, *ages):
    for age in ages:
        execute(
            session,
            "INSERT INTO fact_events (occurred_at, event_type, item, value) "
            f"VALUES (now() - interval '{age}', 'view', 'a', 1)",
        )


def ticks(session, definition=LOOKING_BACK):
    results = [tick(session, definition, grain.name, CLOCK, LOG) for grain in definition.grains]
    assert {result.outcome for result in results} <= {"success", "empty"}
    return results


def counted(session):
    return execute(session, "SELECT coalesce(sum(events), 0) FROM agg_1m").fetchone()[0]


def started(session, *ages, definition=LOOKING_BACK):
    """A rollup that has counted rows of some ages."""
    insert(session, *ages)
    migrate(session, [definition], CLOCK)
    ticks(session, definition)
    assert counted(session) == len(ages)


def rebuild_all(session, definition=LOOKING_BACK):
    now = datetime.now(UTC)
    rebuild(session, definition, "1m", now - timedelta(days=9), now)
    ticks(session, definition)


def registered(session):
    return execute(session, "SELECT definition ->> 'capture' FROM batchctl.rollup").fetchall()


def test_counts_what_is_late_by_less_than_the_lookback_and_nothing_older(session):
    started(session, "5 days", "1 hour")
    assert execute(session, OURS).fetchall() == []
    insert(session, "90 minutes", "4 hours")
    execute(session, "UPDATE fact_events SET value = 7 WHERE occurred_at < now() - interval '4 days'")
    finest, *_ = ticks(session)
    assert finest.outcome == "success"
    assert counted(session) == 3
    assert differences(session.connection), "what is older than the lookback was noticed"
    rebuild_all(session)
    assert differences(session.connection) == []


def test_writes_nothing_where_nothing_is_new(session):
    started(session, "1 hour", "70 minutes", "80 minutes")
    finest, *coarser = ticks(session)
    assert (finest.outcome, finest.buckets, finest.source_rows) == ("success", 3, 3)
    assert (finest.rows_written, finest.rows_deleted) == (0, 0)
    assert {result.outcome for result in coarser} == {"empty"}


def test_is_empty_where_the_lookback_holds_no_bucket(session):
    started(session, "5 hours")
    assert ticks(session)[0].outcome == "empty"


def test_empties_buckets_whose_rows_are_gone(session):
    started(session, "1 hour", "5 hours")
    execute(session, "DELETE FROM fact_events")
    finest, *_ = ticks(session)
    assert finest.rows_deleted == 1
    assert counted(session) == 1, "the row outside of the lookback was noticed"
    rebuild_all(session)
    assert differences(session.connection) == []


def test_looks_back_from_the_last_tick_however_long_ago_that_was(session):
    started(session, "1 hour")
    execute(session, "UPDATE batchctl.state SET aggregated_until = now() - interval '3 days'")
    insert(session, "2 days", "73 hours", "75 hours")
    ticks(session)
    assert counted(session) == 3


def test_a_long_look_back_does_not_skip_what_closed_meanwhile(session, monkeypatch):
    started(session, "10 minutes")
    looks = []

    def look_later(*arguments):
        look, work = look_at(*arguments)
        looks.append(look.until)
        return look._replace(until=look.until + (len(looks) - 1) * HOURS), work

    monkeypatch.setattr(refresh, "look_at", look_later)
    tick(session, LOOKING_BACK, "1m", CLOCK, LOG)
    assert len(looks) == 2
    (until,) = execute(
        session, "SELECT extract(epoch FROM aggregated_until)::float8 FROM batchctl.state WHERE job = 'trend/1m'"
    ).fetchone()
    assert until == looks[0]


def test_leaves_buckets_below_the_retention_as_they_are(session):
    keeping = replace(LOOKING_BACK, retention_seconds=1.5 * HOURS)
    insert(session, "70 minutes", "105 minutes")
    migrate(session, [LOOKING_BACK], CLOCK)
    ticks(session)
    execute(session, "DELETE FROM fact_events")
    ticks(session, keeping)
    assert counted(session) == 1


@pytest.mark.parametrize("kind", ["view", "partition"])
def test_reads_what_cannot_have_triggers_that_see_everything(session, kind):
    if kind == "view":
        execute(session, "CREATE VIEW seen AS SELECT * FROM fact_events")
    else:
        execute(session, "DROP TABLE fact_events; DROP SEQUENCE fact_ids")
        execute(session, PARTITIONED)
        execute(session, "ALTER TABLE views_a RENAME TO seen")
    with pytest.raises(ConfigurationError, match=r"'seen' is a .*set `lookback`"):
        migrate(session, [replace(DEFINITION, source="seen")], CLOCK)
    definition = replace(LOOKING_BACK, source="seen")
    insert(session, "1 hour", "5 hours")
    made = migrate(session, [definition], CLOCK)
    assert not [text for text in made.warnings if "no index" in text]
    ticks(session, definition)
    insert(session, "30 minutes")
    ticks(session, definition)
    assert counted(session) == 3
    changed = replace(definition, measures=definition.measures[:2])
    assert migrate(session, [changed], CLOCK).changed == ("trend",)
    insert(session, "40 minutes")
    ticks(session, changed)
    assert counted(session) == 4
    assert execute(session, OURS).fetchall() == []
    assert migrate(session, [changed], CLOCK).statements == ()


def test_reads_a_materialized_view(session):
    insert(session, "1 hour")
    execute(session, "CREATE MATERIALIZED VIEW seen AS SELECT * FROM fact_events")
    definition = replace(LOOKING_BACK, source="seen")
    migrate(session, [definition], CLOCK)
    ticks(session, definition)
    insert(session, "30 minutes")
    execute(session, "REFRESH MATERIALIZED VIEW seen")
    ticks(session, definition)
    assert counted(session) == 2


@pytest.mark.parametrize("source", ["plain", "partitioned"])
def test_migrate_switches_between_triggers_and_lookback(session, source):
    if source == "partitioned":
        execute(session, "DROP TABLE fact_events; DROP SEQUENCE fact_ids")
        execute(session, PARTITIONED)
    started(session, "1 hour", "5 hours", definition=DEFINITION)
    assert execute(session, OURS).fetchall()
    oid = execute(session, "SELECT 'agg_1m'::regclass::oid").fetchone()

    with pytest.raises(ConfigurationError, match="lookback"):
        tick(session, LOOKING_BACK, "1m", CLOCK, LOG)
    made = migrate(session, [LOOKING_BACK], CLOCK)
    assert made.changed == ()
    assert (execute(session, OURS).fetchall(), registered(session)) == ([], [("lookback",)])
    assert migrate(session, [LOOKING_BACK], CLOCK).statements == ()
    longer = replace(LOOKING_BACK, lookback_seconds=3 * HOURS)
    assert migrate(session, [longer], CLOCK).statements == ()
    insert(session, "70 minutes", "6 hours")
    ticks(session)
    assert counted(session) == 3

    with pytest.raises(ConfigurationError, match="lookback"):
        tick(session, DEFINITION, "1m", CLOCK, LOG)
    assert migrate(session, [DEFINITION], CLOCK).changed == ()
    assert registered(session) == [(None,)]
    assert migrate(session, [DEFINITION], CLOCK).statements == ()
    ticks(session, DEFINITION)
    assert differences(session.connection) == []
    insert(session, "9 days")
    ticks(session, DEFINITION)
    assert differences(session.connection) == []
    assert execute(session, "SELECT 'agg_1m'::regclass::oid").fetchone() == oid, "the tables were built anew"


def test_refuses_to_switch_together_with_another_change(session):
    started(session, "1 hour", definition=DEFINITION)
    both = replace(LOOKING_BACK, measures=DEFINITION.measures[:2])
    with pytest.raises(ConfigurationError, match="together with another change"):
        migrate(session, [both], CLOCK)
    assert registered(session) == [(None,)]
    assert execute(session, OURS).fetchall()


def test_a_tick_that_does_not_get_the_job_is_skipped(session, database_url):
    started(session, "1 hour")
    with psycopg.connect(database_url) as other:
        other.execute("SELECT FROM batchctl.state WHERE job = 'trend/1m' FOR UPDATE")
        result = tick(session, LOOKING_BACK, "1m", CLOCK, LOG)
    assert (result.outcome, result.reason) == ("skipped", "running_elsewhere")
