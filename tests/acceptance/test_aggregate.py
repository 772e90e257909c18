"""aggregate as a crontab calls it."""

from __future__ import annotations

import os
import socket
import time
from contextlib import ExitStack
from datetime import UTC, datetime

import psycopg
import pytest
from support import NOWHERE, wait_for

from batchctl.guard.identity import identify
from batchctl.guard.lock import Holder, acquire, lock_path

pytestmark = pytest.mark.any_user

TREND = """
[rollup.trend]
source = "fact_events"
time = "occurred_at"
[rollup.trend.measures]
events = "count(*)"
"""
TARGET = 'target = "other_{grain}"\n'
GRAIN_KEYS = {
    "rollup", "grain", "outcome", "reason", "buckets", "source_rows", "rows_written", "rows_deleted",
    "remaining_buckets", "duration_seconds", "ignored_buckets", "detail",
}  # fmt: skip


@pytest.fixture
def trend(batchctl):
    """The program with a migrated rollup and an index on its source."""
    batchctl.configure(TREND)
    with psycopg.connect(batchctl.url) as connection:
        connection.execute("CREATE TABLE fact_events (occurred_at timestamptz, value numeric DEFAULT 1)")
        connection.execute("CREATE INDEX ON fact_events (occurred_at)")
    batchctl("migrate")
    return batchctl


def insert(batchctl, *instants):
    with psycopg.connect(batchctl.url) as connection:
        for instant in instants:
            connection.execute("INSERT INTO fact_events (occurred_at) VALUES (%s)", [instant])


def test_the_result_has_the_promised_keys_and_an_empty_tick_is_done(trend):
    result = trend.json("aggregate")
    assert set(result) == {"version", "rollups"}
    assert [set(grain) for grain in result["rollups"]] == [GRAIN_KEYS] * 3
    assert {grain["outcome"] for grain in result["rollups"]} == {"empty"}
    with psycopg.connect(trend.url) as connection:
        rows = connection.execute("SELECT job, last_outcome, last_completed_at FROM batchctl.state").fetchall()
    assert sorted(row[:2] for row in rows) == [("trend/1h", "empty"), ("trend/1m", "empty"), ("trend/5m", "empty")]
    before = {row[0]: row[2] for row in rows}
    trend("aggregate", "--grain", "1m")
    with psycopg.connect(trend.url) as connection:
        after = dict(connection.execute("SELECT job, last_completed_at FROM batchctl.state").fetchall())
    assert after["trend/1m"] > before["trend/1m"]
    assert after["trend/5m"] == before["trend/5m"]


def test_a_grain_that_is_locked_is_skipped_and_the_others_go_on(trend):
    insert(trend, "2025-11-13 06:51:07Z")
    path = lock_path(trend.directory / "state", "rollup.trend.5m")
    lock = acquire(path, Holder("here", *identify(os.getpid()), datetime.now(UTC)))
    with lock:
        result = trend.json("aggregate")["rollups"]
        assert [(grain["outcome"], grain["reason"]) for grain in result] == [
            ("success", None), ("skipped", "running"), ("empty", None),
        ]  # fmt: skip
        done = trend("aggregate", "--grain", "5m", code=75)
        assert (done.stdout, done.stderr) == ("", "")
        assert f"5m aggregation is still in progress (pid {os.getpid()} on here" in trend.log
        trend("aggregate", "--grain", "5m", "--skip-exit-code", "0", code=0)
    entries = trend.json("history")["entries"]
    assert [(entry["job"], entry["reason"], entry["count"]) for entry in entries] == [("trend/5m", "running", 3)]
    assert trend.json("aggregate", "--grain", "5m")["rollups"][0]["rows_written"] == 1


def test_skips_do_not_wait_for_a_database_that_hangs(trend):
    with ExitStack() as stack, socket.create_server(("127.0.0.1", 0)) as silent:
        for grain in ("1m", "5m", "1h"):
            path = lock_path(trend.directory / "state", f"rollup.trend.{grain}")
            stack.enter_context(acquire(path, Holder("here", *identify(os.getpid()), datetime.now(UTC))))
        trend.environment = {"BATCHCTL_DATABASE_URL": f"postgresql://a@127.0.0.1:{silent.getsockname()[1]}/b"}
        began = time.monotonic()
        assert {grain["reason"] for grain in trend.json("aggregate", code=75)["rollups"]} == {"running"}
        assert time.monotonic() - began < 6
    (journal,) = (trend.directory / "state" / "journal").glob("*.jsonl")
    assert len(journal.read_text().splitlines()) == 3


@pytest.mark.each_server
def test_a_grain_that_another_host_works_on_is_skipped(trend):
    insert(trend, "2025-11-13 06:51:07Z")
    with psycopg.connect(trend.url) as connection:
        connection.execute("SELECT FROM batchctl.state WHERE job = 'trend/1m' FOR UPDATE")
        result = trend.json("aggregate", "--grain", "1m", code=75)["rollups"][0]
        assert (result["outcome"], result["reason"]) == ("skipped", "running_elsewhere")
    assert trend.json("aggregate", "--grain", "1m")["rollups"][0]["outcome"] == "success"


def test_a_measure_that_fails_is_an_error_and_nothing_is_lost(batchctl):
    batchctl.configure(TREND + 'ratio = "max(1 / value)"\n')
    with psycopg.connect(batchctl.url) as connection:
        connection.execute("CREATE TABLE fact_events (occurred_at timestamptz, value numeric DEFAULT 0)")
    batchctl("migrate")
    insert(batchctl, "2025-11-13 06:51:07Z")
    done = batchctl("aggregate", "--json", code=1)
    assert "division by zero" in done.stdout
    assert done.stderr.count("\n") == 1
    assert "ERROR | 1m aggregation failed" in done.stderr
    with psycopg.connect(batchctl.url) as connection:
        connection.execute("UPDATE fact_events SET value = 2")
    assert batchctl.json("aggregate")["rollups"][0]["outcome"] == "success"


def test_a_database_that_is_down(trend):
    trend.environment = {"BATCHCTL_DATABASE_URL": NOWHERE}
    began = time.monotonic()
    done = trend("aggregate", code=69)
    assert done.stderr.count("\n") == 1
    assert time.monotonic() - began < 10


def test_what_does_not_exist_or_fit_is_wrong_usage(trend):
    for arguments in (
        ["--grain", "2m"],
        ["--rollup", "other"],
        ["--rebuild"],
        ["--rebuild", "--from", "2025-01-01", "--to", "2025-01-02", "--dry-run"],
        ["--from", "2025-01-01"],
        ["--rebuild", "--from", "2025-01-02", "--to", "2025-01-01"],
        ["--rebuild", "--from", "yesterday", "--to", "2025-01-01"],
    ):
        done = trend("aggregate", *arguments, code=2)
        assert "Traceback" not in done.stderr
    # By their length, which is neither how they sort as text nor, over several rollups, the order of the file.
    text = trend.config.read_text()
    more = '[rollup.more]\nsource = "fact_events"\ntime = "occurred_at"\ngrains = ["30s", "10m"]\n'
    trend.config.write_text(f'{text}\n{more}target = "more_{{grain}}"\n[rollup.more.measures]\nn = "count(*)"\n')
    done = trend("aggregate", "--grain", "7m", code=2)
    assert done.stderr == "batchctl: --grain 7m: no such grain; configured: 30s, 1m, 5m, 10m, 1h\n"


def test_a_dry_run_counts_and_changes_nothing(trend):
    insert(trend, "2025-11-13 06:51:07Z", "2025-11-13 06:52:07Z", "2025-11-13 06:52:08Z")
    waiting = trend.json("aggregate", "--dry-run")["rollups"]
    assert [(grain["grain"], grain["remaining_buckets"]) for grain in waiting] == [("1m", 2), ("5m", 0), ("1h", 0)]
    assert trend.json("aggregate", "--grain", "1m")["rollups"][0]["buckets"] == 2


@pytest.mark.each_server
def test_killed_at_any_moment_nothing_is_lost_and_nothing_is_counted_twice(trend):
    """A tick that is killed while it works, many times; then one that is not."""
    with psycopg.connect(trend.url) as connection:
        connection.execute(
            "INSERT INTO fact_events SELECT timestamptz '2025-11-13Z' + i * interval '7 s' "
            "FROM generate_series(1, 60000) AS i"
        )
    for number in range(6):
        process = trend.start("aggregate")
        time.sleep(0.35 + 0.1 * number)
        process.kill()
        process.communicate()
    wait_for(lambda: trend.json("aggregate", code=None)["rollups"][0]["outcome"] in ("success", "empty"))
    trend("aggregate")
    with psycopg.connect(trend.url) as connection:
        for table, width in (("agg_1m", "1 min"), ("agg_5m", "5 min"), ("agg_1h", "1 hour")):
            truth = f"SELECT date_bin('{width}', occurred_at, '2000-01-01Z'), count(*) FROM fact_events GROUP BY 1"
            rolled_up = f"SELECT bucket, events FROM {table}"
            for query in (f"{truth} EXCEPT {rolled_up}", f"{rolled_up} EXCEPT {truth}"):
                assert connection.execute(query).fetchall() == []


def test_an_aggregate_of_what_was_not_migrated_says_what_to_do(batchctl):
    batchctl.configure(TREND)
    done = batchctl("aggregate", code=78)
    assert "run `batchctl migrate`" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_rollup_that_was_not_migrated_does_not_stop_the_others(trend):
    trend.configure(
        TREND.replace("trend", "new").replace("[rollup.new]", '[rollup.new]\ntarget = "new_{grain}"') + TREND
    )
    insert(trend, "2025-11-13 06:51:07Z")
    result = trend.json("aggregate", code=78)["rollups"]
    assert [(grain["rollup"], grain["outcome"]) for grain in result] == [
        *[("new", "failed")] * 3, *[("trend", "success")] * 3,
    ]  # fmt: skip
    assert "rollup.new has no tables yet; run `batchctl migrate`" in result[0]["reason"]


def test_a_dry_run_makes_no_schema(batchctl):
    batchctl.configure(TREND)
    done = batchctl("aggregate", "--dry-run", code=78)
    assert "run `batchctl migrate`" in done.stderr
    with psycopg.connect(batchctl.url) as connection:
        assert connection.execute("SELECT to_regnamespace('batchctl')").fetchone() == (None,)


def test_a_view_on_a_table_of_a_rollup_is_named_before_anything_is_dropped(trend):
    with psycopg.connect(trend.url) as connection:
        connection.execute("CREATE VIEW dashboard AS SELECT * FROM agg_1h")
    done = trend("migrate", "--drop", "trend", code=1)
    assert "view dashboard on public.agg_1h" in done.stderr
    assert trend.json("aggregate")["rollups"][0]["outcome"] == "empty"


@pytest.mark.each_server
def test_the_whole_line_from_event_to_hour(batchctl):
    batchctl.configure(TREND)
    with psycopg.connect(batchctl.url) as connection:
        connection.execute("CREATE TABLE fact_events (occurred_at timestamptz)")
        connection.execute("INSERT INTO fact_events SELECT '2025-11-13 06:51:07Z' FROM generate_series(1, 150)")
    batchctl("migrate")
    done = batchctl("aggregate", "--grain", "1m", "-v")
    assert "INFO | Starting 1m aggregation for bucket: 2025-11-13 06:51:00 (150 events)" in done.stderr
    assert "INFO | 1m aggregation completed: 1 rows in 0." in done.stderr
    result = batchctl.json("aggregate")["rollups"]
    assert [(grain["grain"], grain["outcome"], grain["rows_written"]) for grain in result] == [
        ("1m", "empty", 0),
        ("5m", "success", 1),
        ("1h", "success", 1),
    ]
    with psycopg.connect(batchctl.url) as connection:
        connection.execute("INSERT INTO fact_events VALUES ('2025-11-13 06:59:59Z')")
        connection.execute("DELETE FROM fact_events WHERE ctid IN (SELECT ctid FROM fact_events LIMIT 50)")
    assert (batchctl("aggregate").stdout, batchctl("aggregate").stderr) == ("", "")
    with psycopg.connect(batchctl.url) as connection:
        rows = connection.execute("SELECT bucket AT TIME ZONE 'UTC', events FROM agg_1h").fetchall()
    assert rows == [(datetime(2025, 11, 13, 6), 101)]
    debug = batchctl("aggregate", "--grain", "1m", "-vv").stderr
    assert "DEBUG | No events for bucket " in debug
    assert ", skipping aggregation" in debug


@pytest.mark.each_server
def test_a_rebuild_repairs_what_somebody_changed_by_hand(batchctl):
    batchctl.configure(TREND)
    with psycopg.connect(batchctl.url) as connection:
        connection.execute("CREATE TABLE fact_events (occurred_at timestamptz)")
        connection.execute("INSERT INTO fact_events VALUES ('2025-11-13 06:51:07Z')")
    batchctl("migrate")
    batchctl("aggregate")
    with psycopg.connect(batchctl.url) as connection:
        connection.execute("UPDATE agg_1m SET events = 99")
        connection.execute("DELETE FROM agg_1h")
    batchctl("aggregate", "--rebuild", "--from", "2025-11-13", "--to", "2025-11-14")
    with psycopg.connect(batchctl.url) as connection:
        for table in ("agg_1m", "agg_5m", "agg_1h"):
            assert connection.execute(f"SELECT events FROM {table}").fetchall() == [(1,)]


def test_a_load_with_the_triggers_switched_off_is_counted_when_its_time_is_queued(trend):
    trend("aggregate")
    with psycopg.connect(trend.url) as connection:
        connection.execute("SET LOCAL session_replication_role = replica")
        connection.execute(
            "INSERT INTO fact_events SELECT '2026-01-31Z'::timestamptz + number * interval '1 minute'"
            " FROM generate_series(0, 1439) AS number"
        )
    # Nothing is noted of it, or the load would have paid for that.
    assert {grain["outcome"] for grain in trend.json("aggregate")["rollups"]} == {"empty"}
    trend("aggregate", "--rebuild", "--from", "2026-01-31", "--to", "2026-02-01")
    with psycopg.connect(trend.url) as connection:
        for table, buckets in (("agg_1m", 1440), ("agg_5m", 288), ("agg_1h", 24)):
            assert connection.execute(f"SELECT count(*), sum(events) FROM {table}").fetchone() == (buckets, 1440)


@pytest.mark.parametrize("locked", ["fact_events", "agg_1m"])
def test_a_locked_table_fails_its_grain_and_no_other(trend, locked):
    trend.configure(
        TREND
        + TREND.replace("trend", "other").replace("fact_events", "other_events").replace("time =", TARGET + "time =")
    )
    with psycopg.connect(trend.url) as connection:
        connection.execute("CREATE TABLE other_events (occurred_at timestamptz)")
    trend("migrate")
    trend("aggregate")
    insert(trend, "2025-11-13 06:51:07Z")
    with psycopg.connect(trend.url) as connection:
        connection.execute("INSERT INTO other_events VALUES ('2025-11-13 06:51:07Z')")
    with psycopg.connect(trend.url) as connection:
        connection.execute(f"LOCK TABLE {locked} IN ACCESS EXCLUSIVE MODE")
        first, *rest = trend.json("aggregate", "--grain", "1m", code=1)["rollups"]
        assert (first["rollup"], first["outcome"]) == ("trend", "failed")
        assert "another session is in the way" in first["reason"]
        assert [(grain["rollup"], grain["outcome"]) for grain in rest] == [("other", "success")]
        assert outcome_of(trend, "trend/1m") == "failed"
    assert trend.json("aggregate", "--grain", "1m")["rollups"][0]["outcome"] == "success"


def outcome_of(batchctl, job):
    (found,) = (each["last_outcome"] for each in batchctl.json("status")["jobs"] if each["job"] == job)
    return found


def test_what_is_refused_is_recorded_as_failed(trend):
    trend("aggregate")
    assert outcome_of(trend, "trend/1m") == "empty"
    trend.configure(TREND + 'last = "max(occurred_at)"\n')
    trend("aggregate", code=78)
    assert outcome_of(trend, "trend/1m") == "failed"


def test_a_range_is_queued_even_by_a_call_that_is_skipped(trend):
    trend("aggregate")
    insert(trend, "2025-11-13 06:51:07Z")
    trend("aggregate")
    with psycopg.connect(trend.url) as connection:
        connection.execute("DELETE FROM agg_1m")
    path = lock_path(trend.directory / "state", "rollup.trend.1m")
    day = ("--rebuild", "--from", "2025-11-13", "--to", "2025-11-14")
    with acquire(path, Holder(socket.gethostname(), *identify(os.getpid()), datetime.now(UTC))):
        done = trend("aggregate", "--grain", "1m", *day, "-v", code=75)
        assert "Skipped; the range is queued for the next call." in done.stderr
    assert trend.json("aggregate", "--grain", "1m")["rollups"][0]["rows_written"] == 1


def test_a_role_that_only_reads_unless_told_otherwise(trend):
    with psycopg.connect(trend.url, autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {connection.info.dbname} SET default_transaction_read_only = on")
    assert {grain["outcome"] for grain in trend.json("aggregate")["rollups"]} == {"empty"}
    assert {grain["outcome"] for grain in trend.json("aggregate")["rollups"]} == {"empty"}
    trend("pause", "trend")
    trend("unpause", "trend")
