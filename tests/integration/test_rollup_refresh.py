from __future__ import annotations

import logging
import re
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from batchctl.clock import SystemClock
from batchctl.config import Rollup, parse_duration
from batchctl.errors import DatabaseUnavailableError
from batchctl.rollup.ddl import migrate
from batchctl.rollup.definition import read_definition
from batchctl.rollup.queue import rebuild as queue_range
from batchctl.rollup.refresh import Limits, tick
from batchctl.state.database import Database, sql
from batchctl.state.migrate import upgrade

pytestmark = pytest.mark.any_user

CLOCK = SystemClock()
GRAINS = {"1m": "1 minute", "5m": "5 minutes", "1h": "1 hour"}
MEASURES = {
    "events": "count(*)",
    "valued": "count(value)",
    "value_sum": "sum(value)",
    "value_min": "min(value)",
    "value_max": "max(value)",
    "value_avg": "avg(value)",
    "price_sum": "sum(price * value)",
}
TRUTH = """
SELECT date_bin('{width}', occurred_at, '2000-01-01Z') AS bucket, event_type, item,
    count(*) AS events, count(value) AS valued, sum(value) AS value_sum, min(value) AS value_min,
    max(value) AS value_max, avg(value) AS value_avg, sum(price * value) AS price_sum
FROM fact_events WHERE isfinite(occurred_at) AND {where} GROUP BY 1, 2, 3
"""
KEPT = """
SELECT bucket, event_type, item, events, valued, value_sum, value_min, value_max, value_avg, price_sum FROM agg_{grain}
"""


class SteppingClock(SystemClock):
    """Each look at it takes a second."""

    def __init__(self):
        self.seconds = 0.0

    def monotonic(self):
        self.seconds += 1
        return self.seconds


def define(**keys):
    keys = {
        "source": "fact_events",
        "time": "occurred_at",
        "measures": MEASURES,
        "dimensions": ("event_type", "item"),
    } | keys
    return read_definition("trend", Rollup(**keys), Path("batchctl.toml"))


@pytest.fixture
def session(database_url):
    # A server's role may be called like our schema, which would then come first on its path.
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {connection.info.dbname} SET search_path = public")
        connection.execute(
            "CREATE TABLE fact_events (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, occurred_at timestamptz, "
            "event_type text, item text, value integer, price numeric(10, 2)); "
            "CREATE INDEX ON fact_events (occurred_at)"
        )
    with Database(conninfo_to_dict(database_url), "batchctl", CLOCK).connect() as session:
        upgrade(session)
        yield session


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.DEBUG, "trend")
    return logging.getLogger("trend")


def execute(session, text, *parameters):
    return session.connection.execute(text, parameters or None)


def query(session, text):
    return [tuple(row) for row in execute(session, text).fetchall()]


def insert(session, *rows):
    with session.connection.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO fact_events (occurred_at, event_type, item, value, price) VALUES (%s, %s, %s, %s, 0.10)", rows
        )


def ticks(session, log, definition=None, **options):
    definition = definition or define()
    return [tick(session, definition, grain.name, CLOCK, log, **options) for grain in definition.grains]


def differences(session, where="true"):
    found = []
    for grain, width in GRAINS.items():
        truth, kept = TRUTH.format(width=width, where=where), KEPT.format(grain=grain)
        found += query(session, f"({truth}) EXCEPT ALL ({kept})") + query(session, f"({kept}) EXCEPT ALL ({truth})")
    return found


def queue(session, grain="1m"):
    return [
        bucket
        for (bucket,) in query(
            session,
            f"SELECT bucket::text FROM batchctl.dirty_bucket WHERE grain = '{grain}' "
            f"UNION SELECT bucket::text FROM batchctl.queued_bucket WHERE grain = '{grain}' ORDER BY 1",
        )
    ]


def outcomes(results):
    return [result.outcome for result in results]


@pytest.fixture
def migrated(session, log):
    execute(session, "SET TimeZone = 'UTC'")
    migrate(session, [define()], CLOCK)
    assert outcomes(ticks(session, log)) == ["empty", "empty", "empty"]
    return session


START = (
    "('2025-11-13 06:51:07Z', 'view', 'a', 1, 1), ('2025-11-13 06:51:09Z', 'view', 'b', 2, 1), "
    "('2025-11-13 06:53:00Z', 'sale', 'a', 3, 1), ('2025-11-13 08:00:00Z', NULL, NULL, NULL, 1)"
)


@pytest.mark.parametrize(
    ("statement", "dirty"),
    [
        ("INSERT INTO fact_events (occurred_at, value) VALUES ('2025-11-13 06:51:30Z', 1)", ["06:51"]),
        (
            """INSERT INTO fact_events (occurred_at, value)
               VALUES ('2025-11-13 06:10Z', 1), ('2025-11-13 06:10:59Z', 1), ('2025-11-13 07:20Z', 1)""",
            ["06:10", "07:20"],
        ),
        ("UPDATE fact_events SET value = value + 5 WHERE item = 'a'", ["06:51", "06:53"]),
        ("UPDATE fact_events SET occurred_at = '2025-11-13 09:00Z' WHERE item = 'b'", ["06:51", "09:00"]),
        ("UPDATE fact_events SET occurred_at = NULL WHERE item = 'b'", ["06:51"]),
        ("UPDATE fact_events SET item = 'c' WHERE item = 'b'", ["06:51"]),
        ("DELETE FROM fact_events WHERE value = 3", ["06:53"]),
        ("DELETE FROM fact_events WHERE item IS NULL", ["08:00"]),
        ("DELETE FROM fact_events", ["06:51", "06:53", "08:00"]),
        ("DELETE FROM fact_events WHERE false", []),
        (
            """MERGE INTO fact_events USING (VALUES ('a'), ('z')) AS new (item) ON fact_events.item = new.item
               WHEN MATCHED AND value = 1 THEN DELETE WHEN MATCHED THEN UPDATE SET value = 7
               WHEN NOT MATCHED THEN INSERT (occurred_at, item) VALUES ('2025-11-13 10:00Z', new.item)""",
            ["06:51", "06:53", "10:00"],
        ),
        ("BEGIN; DELETE FROM fact_events; ROLLBACK", []),
        (
            """BEGIN; SAVEPOINT one; DELETE FROM fact_events; ROLLBACK TO one;
               UPDATE fact_events SET value = 9 WHERE item = 'b'; COMMIT""",
            ["06:51"],
        ),
        ("SET session_replication_role = origin; UPDATE fact_events SET price = 2 WHERE value = 3", ["06:53"]),
    ],
)
def test_every_kind_of_change_is_captured_exactly(migrated, log, statement, dirty):
    execute(migrated, f"INSERT INTO fact_events (occurred_at, event_type, item, value, price) VALUES {START}")
    assert outcomes(ticks(migrated, log)) == ["success"] * 3
    execute(migrated, statement)
    assert queue(migrated) == [f"2025-11-13 {minute}:00+00" for minute in dirty]
    assert differences(migrated) != [] or not dirty
    ticks(migrated, log)
    assert differences(migrated) == []


def test_truncate_empties_every_grain_and_keeps_what_comes_after(migrated, log):
    execute(migrated, f"INSERT INTO fact_events (occurred_at, event_type, item, value, price) VALUES {START}")
    ticks(migrated, log)
    execute(
        migrated,
        "BEGIN; TRUNCATE fact_events; INSERT INTO fact_events (occurred_at) VALUES ('2025-11-13 05:00Z'); COMMIT",
    )
    assert "-infinity" in queue(migrated)
    results = ticks(migrated, log)
    assert (results[0].rows_written, results[0].rows_deleted) == (1, 4)
    assert differences(migrated) == []
    assert query(migrated, "SELECT count(*) FROM agg_1h") == [(1,)]
    assert queue(migrated) == []


def test_truncate_of_an_empty_table_is_empty(migrated, log):
    execute(migrated, "TRUNCATE fact_events")
    assert outcomes(ticks(migrated, log)) == ["empty"] * 3
    assert queue(migrated) == []


def test_copy_is_captured(migrated, log):
    with migrated.connection.cursor().copy("COPY fact_events (occurred_at, item, value) FROM STDIN") as copy:
        for second in range(0, 7200, 7):
            copy.write_row((datetime(2025, 11, 13, 6, tzinfo=UTC) + timedelta(seconds=second), "a", second))
    results = ticks(migrated, log)
    assert [result.buckets for result in results] == [120, 24, 2]
    assert [result.source_rows for result in results] == [1029, 120, 24]
    assert differences(migrated) == []


def test_an_upsert_and_a_cascade_are_captured(migrated, log):
    execute(
        migrated,
        "CREATE TABLE parent (id int PRIMARY KEY); "
        "ALTER TABLE fact_events ADD parent int REFERENCES parent ON DELETE CASCADE",
    )
    execute(migrated, "INSERT INTO parent VALUES (1), (2)")
    execute(
        migrated,
        "INSERT INTO fact_events (occurred_at, value, parent) "
        "VALUES ('2025-11-13 06:51Z', 1, 1), ('2025-11-13 06:52Z', 1, 2)",
    )
    ticks(migrated, log)
    execute(migrated, "DELETE FROM parent WHERE id = 1")
    execute(
        migrated,
        "INSERT INTO fact_events (id, occurred_at, value) OVERRIDING SYSTEM VALUE VALUES (2, '2025-11-13 06:51Z', 1) "
        "ON CONFLICT (id) DO UPDATE SET value = 77",
    )
    ticks(migrated, log)
    assert differences(migrated) == []
    assert query(migrated, "SELECT value_sum FROM agg_1h") == [(77,)]


def test_late_rows_of_any_age_are_aggregated(migrated, log):
    insert(migrated, ("2025-11-13 06:51Z", "view", "a", 1))
    ticks(migrated, log)
    insert(
        migrated,
        ("2024-02-29 23:59:59.999999Z", "view", "a", 1),
        ("1969-12-31 23:59:59.5Z", "view", "a", 2),
        ("1999-12-31 23:00Z", "view", "a", 3),
        ("0044-03-15 12:00Z BC", "view", "a", 4),
        ("2025-11-13 06:51:59Z", "view", "a", 5),
    )
    results = ticks(migrated, log)
    assert results[0].buckets == 5
    assert differences(migrated) == []


def test_null_is_a_group_like_any_other(migrated, log):
    rows = [("2025-11-13 06:51Z", kind, item, 1) for kind in ("view", None) for item in ("a", None)] * 2
    insert(migrated, *rows)
    assert ticks(migrated, log)[0].rows_written == 4
    execute(migrated, "DELETE FROM fact_events WHERE event_type IS NULL AND item IS NULL")
    execute(migrated, "UPDATE fact_events SET value = 3 WHERE event_type IS NULL")
    results = ticks(migrated, log)
    assert [(result.rows_written, result.rows_deleted) for result in results] == [(1, 1)] * 3
    assert differences(migrated) == []


def test_times_without_a_bucket_are_left_out(migrated, log):
    execute(
        migrated,
        "INSERT INTO fact_events (occurred_at, value) VALUES (NULL, 1), ('infinity', 2), ('-infinity', 3), "
        "('294276-12-31 23:59:59Z', 4), ('4714-11-24 00:00Z BC', 5)",
    )
    results = ticks(migrated, log)
    assert results[0].buckets == 1
    assert results[0].remaining_buckets == 0
    assert query(migrated, "SELECT value_sum FROM agg_1h") == [(5,)]
    execute(migrated, "UPDATE fact_events SET occurred_at = '2025-11-13 06:51Z'")
    ticks(migrated, log)
    assert differences(migrated) == []


def test_a_bucket_holds_its_start_and_not_its_end(migrated, log):
    insert(
        migrated,
        ("2025-11-13 06:59:59.999999Z", "view", "a", 1),
        ("2025-11-13 07:00:00Z", "view", "a", 10),
        ("2025-11-13 07:00:00.000001Z", "view", "a", 100),
        ("2025-11-13 07:00:59.999999Z", "view", "a", 1000),
        ("2025-11-13 07:01:00Z", "view", "a", 10000),
    )
    ticks(migrated, log)
    assert query(migrated, "SELECT bucket::text, value_sum FROM agg_1m ORDER BY 1") == [
        ("2025-11-13 06:59:00+00", 1),
        ("2025-11-13 07:00:00+00", 1110),
        ("2025-11-13 07:01:00+00", 10000),
    ]
    assert query(migrated, "SELECT bucket::text, value_sum FROM agg_5m ORDER BY 1") == [
        ("2025-11-13 06:55:00+00", 1),
        ("2025-11-13 07:00:00+00", 11110),
    ]
    assert query(migrated, "SELECT bucket::text, value_sum FROM agg_1h ORDER BY 1") == [
        ("2025-11-13 06:00:00+00", 1),
        ("2025-11-13 07:00:00+00", 11110),
    ]


def test_an_open_bucket_waits_and_a_future_one_too(migrated, log):
    execute(migrated, "INSERT INTO fact_events (occurred_at) VALUES (now()), (now() + interval '1 day')")
    result = ticks(migrated, log)[0]
    assert (result.outcome, result.remaining_buckets) == ("empty", 0)
    assert len(queue(migrated)) == 2


def test_a_bucket_is_closed_only_when_it_has_settled(session, log):
    patient = define(settle=parse_duration("1h"))
    migrate(session, [patient], CLOCK)
    execute(
        session,
        "INSERT INTO fact_events (occurred_at) VALUES (now() - interval '58 minutes'), (now() - interval '62 minutes')",
    )
    assert tick(session, patient, "1m", CLOCK, log).buckets == 1
    hasty = define(settle=parse_duration("1s"))
    assert tick(session, hasty, "1m", CLOCK, log).buckets == 1


def test_an_unchanged_bucket_writes_nothing_and_wakes_no_parent(migrated, log):
    insert(migrated, ("2025-11-13 06:51Z", None, "a", 1), ("2025-11-13 06:51Z", "view", "a", None))
    ticks(migrated, log)
    # Not even a lock is left on a row.
    before = query(migrated, "SELECT ctid::text, xmin::text, xmax::text FROM agg_1m")
    execute(migrated, "UPDATE fact_events SET id = DEFAULT")
    results = ticks(migrated, log)
    assert (results[0].outcome, results[0].buckets, results[0].source_rows) == ("success", 1, 2)
    assert (results[0].rows_written, results[0].rows_deleted) == (0, 0)
    assert outcomes(results[1:]) == ["empty", "empty"]
    assert query(migrated, "SELECT ctid::text, xmin::text, xmax::text FROM agg_1m") == before


@pytest.mark.parametrize(
    "case",
    [
        ("min(v)", ("text", "'ok'"), ("mood", "'ok'"), "ok"),
        ("min(v)", ("integer", "5"), ("text", "'5'"), "5"),
        ("sum(v)", ("real", "0.1"), ("double precision", "0.1"), "0.2"),
        ("min(v)", ('text COLLATE "C"', "'a'"), ('text COLLATE "POSIX"', "'a'"), "a"),
        ("sum(v)", ("integer", "1"), ("numeric", "1.4"), "2"),
    ],
)
def test_a_source_column_of_another_type_fits_the_table(session, log, case):
    measure, (old, value), (new, again), stored = case
    execute(session, "CREATE TYPE mood AS ENUM ('sad', 'ok')")
    execute(session, f"CREATE TABLE typed (occurred_at timestamptz, v {old})")
    execute(session, f"INSERT INTO typed VALUES ('2025-11-13 06:51Z', {value})")
    definition = define(source="typed", dimensions=(), measures={"m": measure})
    migrate(session, [definition], CLOCK)
    assert outcomes(ticks(session, log, definition)) == ["success"] * 3
    execute(session, f"ALTER TABLE typed ALTER v TYPE {new} USING v::text::{new}")
    execute(session, f"INSERT INTO typed VALUES ('2025-11-13 06:51Z', {again})")
    assert ticks(session, log, definition)[0].outcome == "success"
    assert query(session, "SELECT m::text FROM agg_1m") == [(stored,)]
    # What is as it was is not written again for its type.
    execute(session, "UPDATE typed SET occurred_at = occurred_at")
    results = ticks(session, log, definition)
    assert (results[0].buckets, results[0].rows_written, results[1].outcome) == (1, 0, "empty")


def test_a_group_that_vanished_is_deleted_at_every_grain(migrated, log):
    insert(migrated, *[("2025-11-13 06:51Z", "view", item, 1) for item in ("a", "b")])
    ticks(migrated, log)
    execute(migrated, "DELETE FROM fact_events WHERE item = 'a'")
    assert [(result.rows_written, result.rows_deleted) for result in ticks(migrated, log)] == [(0, 1)] * 3
    execute(migrated, "DELETE FROM fact_events")
    assert [(result.rows_written, result.rows_deleted) for result in ticks(migrated, log)] == [(0, 1)] * 3
    assert differences(migrated) == []


def test_only_rows_that_the_filter_lets_through_count(session, log):
    definition = define(where="value % 2 = 1 and item like 'a%'")
    migrate(session, [definition], CLOCK)
    insert(session, *[("2025-11-13 06:51Z", "view", item, value) for item in ("a", "ab", "b") for value in range(5)])
    ticks(session, log, definition)
    where = "value % 2 = 1 and item like 'a%'"
    assert differences(session, where) == []
    execute(session, "UPDATE fact_events SET value = value + 1")
    ticks(session, log, definition)
    assert differences(session, where) == []
    execute(session, "UPDATE fact_events SET item = 'b'")
    ticks(session, log, definition)
    assert query(session, "SELECT count(*) FROM agg_1h") == [(0,)]


def test_averages_of_integers_keep_their_fraction_and_numeric_is_exact(migrated, log):
    insert(
        migrated,
        ("2025-11-13 06:51Z", "view", "a", 1),
        ("2025-11-13 06:52Z", "view", "a", 2),
        ("2025-11-13 06:52:30Z", "view", "a", 2),
        ("2025-11-13 06:53Z", "view", "a", None),
        ("2025-11-13 06:54Z", "view", "b", None),
    )
    ticks(migrated, log)
    assert differences(migrated) == []
    assert query(
        migrated, "SELECT item, value_avg::text, value_avg_sum, value_avg_count, price_sum::text FROM agg_5m ORDER BY 1"
    ) == [
        ("a", "1.6666666666666667", 5, 3, "0.50"),
        ("b", None, None, 0, None),
    ]


def test_history_is_queued_once_by_whichever_grain_comes_first(session, log):
    insert(session, *[(f"2025-11-{day:02d} 06:51Z", "view", "a", day) for day in range(1, 31)])
    execute(session, "INSERT INTO fact_events (value) VALUES (1)")
    migrate(session, [define()], CLOCK)
    assert tick(session, define(), "1h", CLOCK, log).outcome == "empty"
    assert len(queue(session)) == 30
    assert tick(session, define(), "1m", CLOCK, log).buckets == 30
    assert tick(session, define(), "1m", CLOCK, log).outcome == "empty"
    ticks(session, log)
    assert differences(session) == []


def test_the_newest_come_first_and_a_budget_leaves_the_rest_queued(session, log):
    insert(session, *[(f"2025-11-13 06:{minute:02d}Z", "view", "a", minute) for minute in range(60)])
    migrate(session, [define()], CLOCK)
    clock = SteppingClock()
    result = tick(session, define(), "1m", clock, log, Limits(6, 7))
    assert 0 < result.buckets < 60
    assert result.buckets % 7 == 0
    assert result.remaining_buckets == 60 - result.buckets
    first = query(
        session,
        "SELECT min(bucket)::time::text, count(*) FROM (SELECT bucket AT TIME ZONE 'UTC' FROM agg_1m) AS t (bucket)",
    )
    assert first == [(f"06:{60 - result.buckets:02d}:00", result.buckets)]
    again = tick(session, define(), "1m", clock, log, Limits(0, 7))
    assert again.buckets == 7
    ticks(session, log, limits=Limits(most_buckets=11))
    assert differences(session) == []


def test_the_budget_of_the_rollup_is_the_default(session, log):
    insert(session, *[(f"2025-11-13 06:{minute:02d}Z", "view", "a", minute) for minute in range(60)])
    definition = define(budget=parse_duration("1s"))
    migrate(session, [definition], CLOCK)
    assert tick(session, definition, "1m", SteppingClock(), log, Limits(most_buckets=1)).buckets == 1


def test_an_idle_tick_is_recorded_and_says_four_things(migrated, log, caplog):
    # A test's server may be set to lose what was committed last, which takes one more.
    execute(migrated, "SET synchronous_commit = on")
    asked = []
    run, migrated.run = migrated.run, lambda *arguments: asked.append(1) or run(*arguments)
    caplog.clear()
    execute(migrated, "UPDATE batchctl.state SET last_completed_at = NULL, last_outcome = NULL")
    result = tick(migrated, define(), "1m", CLOCK, log)
    # How long to wait, what is remembered, what is new, and the record.
    assert len(asked) == 4
    assert result.outcome == "empty"
    assert query(
        migrated,
        "SELECT last_outcome, last_completed_at >= last_started_at AS after, "
        "now() - last_started_at < interval '5 s' AS now "
        "FROM batchctl.state WHERE job = 'trend/1m'",
    ) == [("empty", True, True)]
    (record,) = caplog.records
    newest = execute(
        migrated, "SELECT date_bin('1 min', now() - interval '63 s', '2000-01-01Z') AT TIME ZONE 'UTC'"
    ).fetchone()[0]
    assert record.levelname == "DEBUG"
    assert record.getMessage() == f"No events for bucket {newest}, skipping aggregation"


def test_the_lines_of_the_log(migrated, log, caplog):
    caplog.clear()
    insert(migrated, *[("2025-11-13 06:51:30Z", "view", str(number % 25), 1) for number in range(150)])
    tick(migrated, define(), "1m", CLOCK, log)
    insert(migrated, *[(f"2025-11-13 06:{minute:02d}Z", "view", "a", 1) for minute in range(10, 50, 3)])
    tick(migrated, define(), "1m", CLOCK, log)
    tick(migrated, define(), "1h", CLOCK, log)
    tick(migrated, define(), "5m", CLOCK, log)
    tick(migrated, define(), "1h", CLOCK, log)
    messages = [record.getMessage().rpartition(" in ")[0] or record.getMessage() for record in caplog.records]
    assert messages[:4] == [
        "Starting 1m aggregation for bucket: 2025-11-13 06:51:00 (150 events)",
        "1m aggregation completed: 25 rows",
        "Starting 1m aggregation for 14 buckets: 2025-11-13 06:10:00 .. 2025-11-13 06:49:00 (14 events)",
        "1m aggregation completed: 14 rows",
    ]
    assert messages[5:] == [
        "Starting 5m aggregation for 9 buckets: 2025-11-13 06:10:00 .. 2025-11-13 06:50:00 (164 events)",
        "5m aggregation completed: 33 rows",
        "Starting 1h aggregation for bucket: 2025-11-13 06:00:00 (164 events)",
        "1h aggregation completed: 26 rows",
    ]
    assert caplog.records[0].at <= datetime.now(UTC)
    assert caplog.records[1].getMessage().endswith("s")


def test_a_measure_that_fails_keeps_its_buckets_queued(session, log):
    definition = define(measures={"odd": "sum(1 / value)"}, dimensions=())
    migrate(session, [definition], CLOCK)
    insert(session, ("2025-11-13 06:51Z", "view", "a", 1), ("2025-11-13 06:52Z", "view", "a", 0))
    result = tick(session, definition, "1m", CLOCK, log)
    assert (result.outcome, result.buckets, result.remaining_buckets) == ("failed", 1, 1)
    assert "division by zero" in result.reason
    assert "\n" not in result.reason
    assert tick(session, definition, "5m", CLOCK, log).outcome == "success"
    assert query(session, "SELECT last_outcome FROM batchctl.state WHERE job = 'trend/1m'") == [("failed",)]
    execute(session, "UPDATE fact_events SET value = 1")
    assert tick(session, definition, "1m", CLOCK, log).outcome == "success"


def test_one_works_and_the_other_says_that_it_runs_elsewhere(migrated, log, database_url):
    insert(migrated, ("2025-11-13 06:51Z", "view", "a", 1), ("2025-11-13 06:53Z", "view", "a", 1))
    found = {}

    def work():
        with Database(conninfo_to_dict(database_url), "batchctl", CLOCK).connect() as session:
            found["first"] = tick(session, define(), "1m", CLOCK, log)

    with psycopg.connect(database_url) as blocker:
        blocker.execute("LOCK TABLE agg_1m IN SHARE MODE")
        thread = threading.Thread(target=work)
        thread.start()
        while not query(migrated, "SELECT FROM pg_locks WHERE NOT granted"):
            CLOCK.sleep(0.01)
        second = tick(migrated, define(), "1m", CLOCK, log)
        assert tick(migrated, define(), "5m", CLOCK, log).outcome == "empty"
        blocker.rollback()
    thread.join()
    assert (second.outcome, second.reason, second.remaining_buckets) == ("skipped", "running_elsewhere", 2)
    assert (found["first"].outcome, found["first"].buckets) == ("success", 2)


def tick_with_a_writer_between(session, log, database_url, after, limits, *, forget=""):
    """Run a tick in which another session writes right after the statement that has a text in it."""
    run = session.run
    with psycopg.connect(database_url, autocommit=True) as writer:

        def interfere(statement, parameters=None):
            text = statement.as_string()
            rows = run(sql.SQL(re.sub(forget, "", text)) if forget else statement, parameters)
            if after in text:
                writer.execute("INSERT INTO fact_events (occurred_at, value) VALUES ('2025-11-13 06:51:30Z', 10)")
            return rows

        session.run = interfere
        tick(session, define(), "1m", CLOCK, log, limits)
    session.run = run


@pytest.mark.parametrize(
    ("after", "limits"),
    [
        pytest.param("AS noted", Limits(0), id="few"),
        pytest.param("fresh (", Limits(0), id="computed"),
        pytest.param("taken AS (", Limits(0, most_buckets=1), id="taken"),
    ],
)
def test_a_writer_between_the_queue_and_the_source_is_not_lost(migrated, log, database_url, after, limits):
    insert(migrated, ("2025-11-13 06:50Z", "view", "a", 1), ("2025-11-13 06:51Z", "view", "a", 1))
    tick_with_a_writer_between(migrated, log, database_url, after, limits)
    assert len(queue(migrated)) >= 1
    ticks(migrated, log)
    assert differences(migrated) == []


def test_control_notes_that_were_not_seen_are_needed(migrated, log, database_url):
    insert(migrated, ("2025-11-13 06:51Z", "view", "a", 1))
    condition = r"AND pg_visible_in_snapshot\(xid, '[^']*'::pg_snapshot\)"
    tick_with_a_writer_between(migrated, log, database_url, "fresh (", Limits(0), forget=condition)
    ticks(migrated, log)
    assert differences(migrated) != []


def test_a_lost_connection_is_no_failed_aggregation(migrated, log, database_url):
    insert(migrated, ("2025-11-13 06:51Z", "view", "a", 1))

    def lose_in_the_middle():
        with Database(conninfo_to_dict(database_url), "batchctl", CLOCK).connect() as session:
            run = session.run

            def interfere(statement, parameters=None):
                if "fresh" in statement.as_string():
                    execute(migrated, f"SELECT pg_terminate_backend({session.connection.info.backend_pid})")
                return run(statement, parameters)

            session.run = interfere
            tick(session, define(), "1m", CLOCK, log)

    with pytest.raises(DatabaseUnavailableError):
        lose_in_the_middle()
    assert len(queue(migrated)) == 1
    ticks(migrated, log)
    assert differences(migrated) == []


def test_rebuild_repairs_what_was_damaged_by_hand(migrated, log):
    insert(migrated, *[(f"2025-11-13 0{hour}:51Z", "view", "a", 1) for hour in range(10)])
    ticks(migrated, log)
    execute(
        migrated,
        "UPDATE agg_1m SET events = 99; DELETE FROM agg_5m; INSERT INTO agg_1m (bucket) VALUES ('2025-11-13 02:07Z')",
    )
    start, end = datetime(2025, 11, 13, 2, 7, 30, tzinfo=UTC), datetime(2025, 11, 13, 4, 51, 0, 1, tzinfo=UTC)
    assert queue_range(migrated, define(), "1m", start, end) == 4
    assert queue_range(migrated, define(), "5m", start, end) == 4
    assert queue_range(migrated, define(), "1m", end, end) == 1
    ticks(migrated, log)
    assert query(migrated, "SELECT count(*) FROM agg_1m WHERE events = 99") == [(7,)]
    assert query(migrated, "SELECT count(*) FROM agg_5m") == [(3,)]
    for grain in GRAINS:
        queue_range(migrated, define(), grain, datetime(1, 1, 1, tzinfo=UTC), datetime(9999, 1, 1, tzinfo=UTC))
    ticks(migrated, log)
    assert differences(migrated) == []


def test_partitions_are_captured_at_every_level(session, log):
    execute(
        session,
        "DROP TABLE fact_events; CREATE TABLE fact_events (occurred_at timestamptz, event_type text, item text, "
        "value integer, price numeric) PARTITION BY LIST (event_type); "
        "CREATE TABLE views PARTITION OF fact_events FOR VALUES IN ('view') PARTITION BY LIST (item); "
        "CREATE TABLE views_a PARTITION OF views FOR VALUES IN ('a'); "
        "CREATE TABLE views_rest PARTITION OF views DEFAULT; "
        "CREATE TABLE rest PARTITION OF fact_events DEFAULT; CREATE INDEX ON fact_events (occurred_at)",
    )
    migrate(session, [define()], CLOCK)
    for number, statement in enumerate(
        (
            """INSERT INTO fact_events VALUES
               ('2025-11-13 06:51Z', 'view', 'a', 1), ('2025-11-13 06:52Z', 'sale', 'a', 1)""",
            "INSERT INTO views VALUES ('2025-11-13 06:53Z', 'view', 'b', 1)",
            "INSERT INTO views_a VALUES ('2025-11-13 06:54Z', 'view', 'a', 1)",
            "UPDATE views SET item = 'b' WHERE item = 'a' AND occurred_at = '2025-11-13 06:51Z'",
            "UPDATE fact_events SET event_type = 'sale' WHERE item = 'b'",
            "DELETE FROM rest WHERE occurred_at = '2025-11-13 06:53Z'",
            "TRUNCATE views_a",
            "INSERT INTO views_rest VALUES ('2025-11-13 06:51Z', 'view', 'c', 1)",
            "TRUNCATE fact_events",
        )
    ):
        execute(session, statement)
        assert differences(session) != [], number
        ticks(session, log)
        assert differences(session) == [], number


def test_a_source_column_called_bucket_does_not_get_in_the_way(session, log):
    execute(session, "ALTER TABLE fact_events ADD bucket text, ADD fresh int, ADD batchctl_low int")
    definition = define(
        measures={"buckets": "count(bucket)", "low": "sum(fact_events.batchctl_low)"}, dimensions=("fresh",)
    )
    migrate(session, [definition], CLOCK)
    execute(
        session,
        "INSERT INTO fact_events (occurred_at, bucket, fresh, batchctl_low) VALUES "
        "('2025-11-13 06:51Z', 'x', 1, 1), ('2025-11-13 06:53Z', 'y', 1, 2), ('2025-11-13 06:53Z', NULL, 2, 3)",
    )
    ticks(session, log, definition)
    assert query(session, "SELECT fresh, buckets, low FROM agg_1h ORDER BY 1") == [(1, 2, 3), (2, 0, 3)]


def test_a_rollup_without_dimensions_or_with_one_grain(session, log):
    definition = define(dimensions=(), grains=("15m",), target="only", schedule={}, offset={})
    migrate(session, [definition], CLOCK)
    insert(session, ("2025-11-13 06:51Z", "view", "a", 1), ("2025-11-13 06:46Z", "view", "b", 1))
    assert ticks(session, log, definition)[0].rows_written == 1
    assert query(session, "SELECT bucket::text, events FROM public.only") == [("2025-11-13 06:45:00+00", 2)]


def test_nothing_is_prepared_and_no_temporary_table_is_made(migrated, log):
    insert(migrated, ("2025-11-13 06:51Z", "view", "a", 1), ("2025-11-13 06:59Z", "view", "a", 1))
    before = query(migrated, "SELECT count(*) FROM pg_class")
    ticks(migrated, log)
    assert query(migrated, "SELECT count(*) FROM pg_class") == before
    assert query(migrated, "SELECT count(*) FROM pg_prepared_statements") == [(0,)]
