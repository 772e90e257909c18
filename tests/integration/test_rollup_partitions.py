"""Partitions that are attached, detached and dropped, which fires no trigger, are followed exactly."""

from __future__ import annotations

import logging
import os
import random
import threading
import uuid
from dataclasses import replace

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from rollup_source import DEFINITION, create_source, differences
from support import wait_for

from batchctl.clock import SystemClock
from batchctl.rollup import chunk, partitions, refresh
from batchctl.rollup.ddl import migrate
from batchctl.rollup.drop import drop
from batchctl.rollup.refresh import tick
from batchctl.state.database import Database
from batchctl.state.migrate import upgrade

pytestmark = pytest.mark.any_user

CLOCK = SystemClock()
SEED = int(os.environ.get("BATCHCTL_TEST_SEED") or random.SystemRandom().randrange(10**6))
COLUMNS = """
id bigint NOT NULL DEFAULT 1, owner integer NOT NULL DEFAULT 0, occurred_at timestamptz, event_type text, item text,
value numeric, weight double precision
"""
RANGES = f"""
CREATE TABLE fact_events ({COLUMNS}) PARTITION BY RANGE (occurred_at);
CREATE INDEX ON fact_events (occurred_at);
CREATE TABLE day_11 PARTITION OF fact_events FOR VALUES FROM ('2025-11-11Z') TO ('2025-11-12Z');
CREATE TABLE day_12 PARTITION OF fact_events FOR VALUES FROM ('2025-11-12Z') TO ('2025-11-13Z');
CREATE TABLE day_13 PARTITION OF fact_events FOR VALUES FROM ('2025-11-13Z') TO ('2025-11-14Z')
    PARTITION BY LIST (item);
CREATE TABLE day_13_a PARTITION OF day_13 FOR VALUES IN ('a');
CREATE TABLE day_13_b PARTITION OF day_13 FOR VALUES IN ('b');
CREATE TABLE other PARTITION OF fact_events DEFAULT;
"""
FILL = """
INSERT INTO {} (occurred_at, event_type, item, value)
SELECT '{}Z'::timestamptz + minute * interval '7 minutes', 'view', CASE minute % 2 WHEN 0 THEN 'a' ELSE 'b' END, minute
FROM generate_series(0, 9) AS minute
"""
DAYS = ("2025-11-11", "2025-11-12", "2025-11-13")


@pytest.fixture
def session(database_url):
    with Database(conninfo_to_dict(database_url), "batchctl", CLOCK).connect() as session:
        create_source(session.connection, RANGES)
        upgrade(session)
        for day in DAYS:
            execute(session, FILL.format("fact_events", day))
        yield session


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.DEBUG, "trend")
    return logging.getLogger("trend")


@pytest.fixture(params=["followed", "control"])
def followed(request, monkeypatch):
    """False in the control, whose ticks do not look at partitions."""
    if request.param == "control":
        monkeypatch.setattr(refresh, "_search", lambda *_: False)
    return request.param == "followed"


def execute(session, text):
    return session.connection.execute(text)


def ticks(session, log, definition=DEFINITION):
    results = [tick(session, definition, grain.name, CLOCK, log) for grain in definition.grains]
    assert {result.outcome for result in results} <= {"success", "empty"}
    return results


def start(session, log, definition=DEFINITION):
    migrate(session, [definition], CLOCK)
    ticks(session, log, definition)
    assert differences(session.connection) == []
    assert {result.outcome for result in ticks(session, log, definition)} == {"empty"}


def free_table(session, name, day):
    execute(session, f"CREATE TABLE {name} ({COLUMNS})")
    execute(session, FILL.format(name, day))


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_a_filled_table_that_is_attached_is_aggregated_and_watched(session, log, followed):
    start(session, log)
    free_table(session, "day_14", "2025-11-14")
    execute(
        session, "ALTER TABLE fact_events ATTACH PARTITION day_14 FOR VALUES FROM ('2025-11-14Z') TO ('2025-11-15Z')"
    )
    result = ticks(session, log)[0]
    assert (differences(session.connection) == []) == followed
    assert result.buckets == (10 if followed else 0)
    execute(session, "UPDATE day_14 SET value = value + 1")
    ticks(session, log)
    assert (differences(session.connection) == []) == followed
    assert ticks(session, log)[0].outcome == "empty"


AGAIN = "ALTER TABLE fact_events ATTACH PARTITION day_12 FOR VALUES FROM ('2025-11-12Z') TO ('2025-11-13Z')"
GONE = {
    "detach": "ALTER TABLE fact_events DETACH PARTITION day_12",
    "drop": "DROP TABLE day_12",
    "drop a leaf of a leaf": "DROP TABLE day_13_b",
    "detach a tree": "ALTER TABLE fact_events DETACH PARTITION day_13",
    "drop and make again": """
        DROP TABLE day_12;
        CREATE TABLE day_12 PARTITION OF fact_events FOR VALUES FROM ('2025-11-12Z') TO ('2025-11-13Z')
    """,
    "the whole source anew": f"DROP TABLE fact_events; {RANGES}",
}
TOUCHED = {"the whole source anew": 30}


@pytest.mark.parametrize("change", GONE)
def test_what_a_partition_that_is_gone_held_leaves_the_rollup(session, log, followed, change):
    start(session, log)
    execute(session, GONE[change])
    result = ticks(session, log)[0]
    assert (differences(session.connection) == []) == followed
    # No more than the time that it covered.
    assert result.buckets == (TOUCHED.get(change, 10) if followed else 0)
    assert ticks(session, log)[0].outcome == "empty"
    if followed:
        execute(session, FILL.format("fact_events", "2025-11-12"))
        ticks(session, log)
        assert differences(session.connection) == []


def test_a_default_partition_that_is_dropped_may_have_held_anything(session, log, followed):
    execute(session, FILL.format("fact_events", "1999-01-01"))
    start(session, log)
    execute(session, "DROP TABLE other")
    assert ticks(session, log)[0].buckets == (40 if followed else 0)
    assert (differences(session.connection) == []) == followed


def test_other_bounds_of_the_same_table_are_remembered(session, log, followed):
    start(session, log)
    execute(
        session,
        "ALTER TABLE fact_events DETACH PARTITION day_12; ALTER TABLE fact_events DETACH PARTITION day_11; "
        "INSERT INTO day_12 SELECT * FROM day_11; DROP TABLE day_11; "
        "ALTER TABLE fact_events ATTACH PARTITION day_12 FOR VALUES FROM ('2025-11-11Z') TO ('2025-11-13Z')",
    )
    ticks(session, log)
    # The triggers of the day noted what was written to it while it was detached.
    assert differences(session.connection) == []
    execute(session, "DROP TABLE day_12")
    ticks(session, log)
    assert (differences(session.connection) == []) == followed


def test_with_a_retention_old_partitions_are_dropped_and_their_buckets_stay(session, log):
    keeping = replace(DEFINITION, retention_seconds=30 * 86400.0)
    migrate(session, [keeping], CLOCK)
    ticks(session, log)
    before = execute(session, "SELECT sum(events) FROM agg_1h").fetchone()[0]
    assert before == 30
    execute(session, "DROP TABLE day_11")
    execute(session, "CREATE TABLE now_on PARTITION OF fact_events FOR VALUES FROM ('2026-01-01Z') TO ('2200-01-01Z')")
    execute(session, "INSERT INTO fact_events (occurred_at) VALUES (now() - interval '1 day')")
    result = ticks(session, log, replace(keeping, retention_seconds=9 * 86400.0))[0]
    assert (result.buckets, result.ignored_buckets) == (1, 0)
    assert execute(session, "SELECT sum(events) FROM agg_1h").fetchone()[0] == before + 1


def test_a_locked_partition_is_aggregated_and_gets_its_triggers_later(session, log, caplog, database_url):
    start(session, log)
    free_table(session, "day_14", "2025-11-14")
    execute(
        session, "ALTER TABLE fact_events ATTACH PARTITION day_14 FOR VALUES FROM ('2025-11-14Z') TO ('2025-11-15Z')"
    )
    with psycopg.connect(database_url) as other:
        other.execute("INSERT INTO day_14 (occurred_at, value) VALUES ('2025-11-14 06:00Z', 5)")
        assert ticks(session, log)[0].buckets == 10
        assert differences(session.connection) == []
        assert ticks(session, log)[0].outcome == "empty"
    (first, second) = warnings(caplog)
    assert first == second
    assert first.endswith("it is locked by a long transaction; the next call tries again")
    # Written before there were triggers, and yet found.
    assert differences(session.connection) != []
    assert ticks(session, log)[0].buckets == 11
    assert differences(session.connection) == []
    assert len(warnings(caplog)) == 2
    assert ticks(session, log)[0].outcome == "empty"


@pytest.mark.parametrize("bounds", ["FOR VALUES FROM ('2025-11-14Z') TO ('2025-11-15Z')", "DEFAULT"])
def test_rows_that_left_a_partition_before_it_had_triggers_leave_the_rollup(session, log, bounds, database_url):
    execute(session, "DROP TABLE other")
    start(session, log)
    free_table(session, "more", "2025-11-14")
    execute(session, f"ALTER TABLE fact_events ATTACH PARTITION more {bounds}")
    with psycopg.connect(database_url) as other:
        # Neither seen, nor noted, nor in the partition when it gets its triggers.
        other.execute("DELETE FROM more WHERE value >= 5")
        assert ticks(session, log)[0].buckets == 10
    assert differences(session.connection) != []
    ticks(session, log)
    assert differences(session.connection) == []
    assert ticks(session, log)[0].outcome == "empty"


def test_rows_that_were_read_before_a_partition_was_noticed_may_have_left_it(session, log):
    start(session, log)
    free_table(session, "day_14", "2025-11-14")
    execute(
        session, "ALTER TABLE fact_events ATTACH PARTITION day_14 FOR VALUES FROM ('2025-11-14Z') TO ('2025-11-15Z')"
    )
    # A tick that looked for partitions just before comes to a bucket that it shares with the new one.
    execute(
        session,
        "INSERT INTO batchctl.dirty_bucket (rollup, grain, bucket) VALUES ('trend', '1m', '2025-11-14 00:07Z')",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refresh, "_search", lambda *_: False)
        ticks(session, log)
    execute(session, "DELETE FROM day_14 WHERE occurred_at = '2025-11-14 00:07Z'")
    ticks(session, log)
    assert differences(session.connection) == []


def test_a_role_that_may_create_no_trigger_is_told(session, log, caplog, database_url):
    start(session, log)
    name = f"trend_{uuid.uuid4().hex[:8]}"
    execute(
        session,
        f"CREATE ROLE {name}; GRANT ALL ON SCHEMA batchctl TO {name}; GRANT ALL ON ALL TABLES IN SCHEMA batchctl TO "
        f"{name}; GRANT ALL ON agg_1m, agg_5m, agg_1h TO {name}; GRANT SELECT ON fact_events TO {name}",
    )
    try:
        free_table(session, "day_14", "2025-11-14")
        execute(
            session,
            f"GRANT SELECT ON day_14 TO {name}; ALTER TABLE fact_events ATTACH PARTITION day_14 "
            "FOR VALUES FROM ('2025-11-14Z') TO ('2025-11-15Z')",
        )
        url = make_conninfo(database_url, options=f"-c role={name}")
        with Database(conninfo_to_dict(url), "batchctl", CLOCK).connect() as weak:
            assert ticks(weak, log)[0].buckets == 10
        assert differences(session.connection) == []
        (warning,) = warnings(caplog)
        assert "new partition public.day_14 has no triggers yet" in warning
        assert "run `batchctl migrate` as a role that may create them" in warning
        execute(session, "INSERT INTO day_14 (occurred_at, value) VALUES ('2025-11-14 06:00Z', 5)")
        migrate(session, [DEFINITION], CLOCK)
        ticks(session, log)
        assert differences(session.connection) == []
    finally:
        execute(session, f"DROP OWNED BY {name} CASCADE; DROP ROLE {name}")


def test_a_partition_that_is_being_detached_is_gone(session, log, followed, database_url):
    execute(session, "DROP TABLE other")
    start(session, log)

    def detach():
        with psycopg.connect(database_url, autocommit=True) as connection:
            connection.execute("ALTER TABLE fact_events DETACH PARTITION day_12 CONCURRENTLY")

    with psycopg.connect(database_url) as reader:
        reader.execute("SELECT count(*) FROM fact_events")
        thread = threading.Thread(target=detach)
        thread.start()
        wait_for(lambda: execute(session, "SELECT FROM pg_inherits WHERE inhdetachpending").fetchall())
        ticks(session, log)
        assert (differences(session.connection) == []) == followed
    thread.join()
    ticks(session, log)
    assert (differences(session.connection) == []) == followed
    assert ticks(session, log)[0].outcome == "empty"


def test_the_triggers_are_taken_away_with_the_rollup_and_plain_sources_remember_nothing(session, log):
    start(session, log)
    free_table(session, "day_14", "2025-11-14")
    execute(
        session, "ALTER TABLE fact_events ATTACH PARTITION day_14 FOR VALUES FROM ('2025-11-14Z') TO ('2025-11-15Z')"
    )
    ticks(session, log)
    remembered = "SELECT count(*), bool_and(tracked AND queued) FROM batchctl.source_partition"
    assert tuple(execute(session, remembered).fetchone()) == (8, True)
    assert migrate(session, [DEFINITION], CLOCK).statements == ()
    drop(session, "trend", CLOCK)
    assert execute(session, remembered).fetchone()[0] == 0
    assert execute(session, "SELECT count(*) FROM pg_trigger WHERE tgrelid = 'day_14'::regclass").fetchone()[0] == 0
    execute(session, f"DROP TABLE fact_events; CREATE TABLE fact_events ({COLUMNS})")
    migrate(session, [DEFINITION], CLOCK)
    assert execute(session, remembered).fetchone()[0] == 0


@pytest.mark.parametrize("style", ["SQL, DMY", "German", "Postgres, MDY"])
def test_bounds_are_read_whatever_the_session_shows_dates_like(session, log, style):
    start(session, log)
    execute(session, f"SET DateStyle = '{style}'; SET TimeZone = 'Asia/Seoul'")
    assert ticks(session, log)[0].outcome == "empty"
    execute(session, "DROP TABLE day_11")
    assert ticks(session, log)[0].buckets == 10
    assert differences(session.connection) == []


def test_partitions_that_come_and_go_at_random(session, log, followed):
    """Many changes of partitions and rows, with ticks in between."""
    print(f"BATCHCTL_TEST_SEED={SEED}")  # noqa: T201 - shown if the test fails
    choices = random.Random(SEED)
    start(session, log)
    attached, free, wrong = {11: "day_11", 12: "day_12", 13: "day_13"}, {}, 0
    for number in range(60):
        day = choices.randint(10, 15)
        bounds = f"FOR VALUES FROM ('2025-11-{day}Z') TO ('2025-11-{day + 1}Z')"
        # The default partition may not hold what another one is to hold.
        execute(session, f"DELETE FROM other WHERE occurred_at >= '2025-11-{day}Z'")
        if day in attached:
            table = attached[day]
            kind = choices.choice(["detach", "drop", "write", "write"])
            if kind == "write":
                execute(session, FILL.format(choices.choice([table, "fact_events"]), f"2025-11-{day}"))
            else:
                del attached[day]
                execute(
                    session,
                    f"DROP TABLE {table}" if kind == "drop" else f"ALTER TABLE fact_events DETACH PARTITION {table}",
                )
                if kind == "detach":
                    free[day] = table
        else:
            table = free.pop(day, None)
            if table is None:
                table = f"made_{number}"
                free_table(session, table, f"2025-11-{day}")
            elif choices.random() < 0.5:
                execute(session, f"UPDATE {table} SET value = value + 1")
            attached[day] = table
            execute(session, f"ALTER TABLE fact_events ATTACH PARTITION {table} {bounds}")
        if choices.random() < 0.4:
            ticks(session, log)
            wrong += differences(session.connection) != []
    ticks(session, log)
    wrong += differences(session.connection) != []
    assert (wrong == 0) == followed


RETURNING = {
    "detach": ("ALTER TABLE fact_events DETACH PARTITION day_12", AGAIN),
    "detach a tree": (
        "ALTER TABLE fact_events DETACH PARTITION day_13",
        "ALTER TABLE fact_events ATTACH PARTITION day_13 FOR VALUES FROM ('2025-11-13Z') TO ('2025-11-14Z')",
    ),
    "drop": ("DROP TABLE day_12", f"CREATE TABLE day_12 ({COLUMNS}); {FILL.format('day_12', '2025-11-12')}; {AGAIN}"),
}


def during(monkeypatch, url, text):
    """Run a statement between a tick's look at the partitions and its reading of the source, once."""
    real = chunk._compute

    def compute(*arguments, **options):
        monkeypatch.setattr(chunk, "_compute", real)
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(text)
        return real(*arguments, **options)

    monkeypatch.setattr(chunk, "_compute", compute)


@pytest.mark.parametrize("way", RETURNING)
def test_a_partition_that_was_away_while_a_tick_read_is_counted_again(session, log, monkeypatch, database_url, way):
    start(session, log)
    leave, come_back = RETURNING[way]
    execute(session, "UPDATE fact_events SET value = value + 1")
    during(monkeypatch, database_url, leave)
    ticks(session, log)
    execute(session, come_back)
    # A control: now the rollup lacks what the tick did not see.
    assert differences(session.connection) != []
    ticks(session, log)
    assert differences(session.connection) == []


@pytest.mark.parametrize("witnessed", [True, False], ids=["", "control"])
def test_a_partition_that_was_there_only_while_a_tick_read_leaves_the_rollup(
    session, log, monkeypatch, database_url, witnessed
):
    if not witnessed:
        monkeypatch.setattr(partitions, "witness", lambda _: None)
    start(session, log)
    free_table(session, "day_14", "2025-11-14")
    execute(
        session,
        "CREATE TABLE day_14_before PARTITION OF fact_events FOR VALUES FROM ('2025-11-14Z') TO ('2025-11-15Z')",
    )
    ticks(session, log)
    execute(
        session, FILL.format("fact_events", "2025-11-14") + "; ALTER TABLE fact_events DETACH PARTITION day_14_before"
    )
    during(
        monkeypatch,
        database_url,
        "ALTER TABLE fact_events ATTACH PARTITION day_14 FOR VALUES FROM ('2025-11-14Z') TO ('2025-11-15Z')",
    )
    ticks(session, log)
    execute(session, "ALTER TABLE fact_events DETACH PARTITION day_14")
    ticks(session, log)
    assert (differences(session.connection) == []) == witnessed


@pytest.mark.parametrize("named", [True, False], ids=["all actions named", "as documented otherwise"])
def test_a_merge_that_moves_rows_is_noticed_if_it_names_all_actions(session, log, named):
    start(session, log)
    more = "WHEN MATCHED AND false THEN DELETE WHEN NOT MATCHED AND false THEN INSERT DEFAULT VALUES"
    execute(
        session,
        "MERGE INTO fact_events AS kept USING (VALUES ('2025-11-11Z'::timestamptz)) AS given (moment)"
        " ON kept.occurred_at = given.moment"
        f" {more if named else ''} WHEN MATCHED THEN UPDATE SET occurred_at = kept.occurred_at + interval '1 day'",
    )
    ticks(session, log)
    assert (differences(session.connection) == []) == named
