"""Exact whatever a transaction does, however long it is open, wherever in time and in which partition its rows lie."""

from __future__ import annotations

import logging
from contextlib import closing, suppress

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict
from rollup_source import DEFINITION, GRAINS, PARTITIONED, PLAIN, create_source, differences
from rollup_writers import CLOCK

from batchctl.rollup.ddl import migrate
from batchctl.rollup.refresh import tick
from batchctl.state.database import Database
from batchctl.state.migrate import upgrade

pytestmark = pytest.mark.any_user

LOG = logging.getLogger("trend")
SOURCES = [pytest.param(PLAIN, id="plain"), pytest.param(PARTITIONED, id="partitioned")]
ROWS = """
INSERT INTO fact_events (occurred_at, event_type, item, value, weight) VALUES
('2025-11-13 06:51:07Z', 'view', 'a', 1, 0.5), ('2025-11-13 06:51:09Z', 'view', 'b', 2, 0.25),
('2025-11-13 06:53:00Z', 'sale', 'a', 3, NULL), ('2025-11-13 08:00:00Z', NULL, NULL, NULL, 8)
"""


@pytest.fixture
def make(database_url):
    """Make a source of some kind with rows that are aggregated; return what refreshes and what changes it."""
    with Database(conninfo_to_dict(database_url), "batchctl", CLOCK).connect() as session:
        upgrade(session)

        def made(source):
            create_source(session.connection, source)
            migrate(session, [DEFINITION], CLOCK)
            session.connection.execute(ROWS)
            ticks(session)
            return session

        yield made


def ticks(session):
    """Refresh every grain; nothing closed is left, and each grain is what its source says."""
    for grain in GRAINS:
        result = tick(session, DEFINITION, grain, CLOCK, LOG)
        assert (result.outcome in ("success", "empty"), result.remaining_buckets) == (True, 0), result
    assert differences(session.connection) == []


def changed(session):
    """Refresh what no longer agrees with its source."""
    assert differences(session.connection) != []
    ticks(session)


def count(session):
    return session.connection.execute("SELECT sum(events)::int FROM agg_1h").fetchone()[0]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("end", "rows"), [("COMMIT", 9), ("ROLLBACK", 7)])
def test_a_prepared_transaction_that_is_open_over_several_ticks(make, database_url, source, end, rows):
    session = make(source)
    with closing(psycopg.connect(database_url)) as writer:
        writer.execute(ROWS)
        writer.execute("DELETE FROM fact_events WHERE item = 'b'")
        writer.execute("PREPARE TRANSACTION 'second_phase_later'")
    for minute in (51, 52, 53):
        session.connection.execute(f"INSERT INTO fact_events (occurred_at) VALUES ('2025-11-13 06:{minute}:30Z')")
        changed(session)
    assert count(session) == 7
    session.connection.execute(f"{end} PREPARED 'second_phase_later'")
    (changed if end == "COMMIT" else ticks)(session)
    # Four and three, and four less the two of b; or as if nothing had been prepared.
    assert count(session) == rows


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("isolation", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
def test_a_transaction_that_is_open_all_day(make, database_url, source, isolation):
    """What it wrote at any time comes when it commits, into buckets that were refreshed many times before."""
    session = make(source)
    with psycopg.connect(database_url) as long:
        long.execute(f"SET TRANSACTION ISOLATION LEVEL {isolation}")
        for minute in range(51, 56):
            # Both in the same bucket, and one of them each in buckets of their own.
            long.execute(f"INSERT INTO fact_events (occurred_at) VALUES ('2025-11-13 06:{minute}:01Z')")
            long.execute(f"INSERT INTO fact_events (occurred_at) VALUES ('2025-11-13 0{minute - 50}:10Z')")
            for other in (f"2025-11-13 06:{minute}:02Z", f"2025-11-12 01:{minute}Z"):
                session.connection.execute("INSERT INTO fact_events (occurred_at) VALUES (%s)", [other])
            changed(session)
        long.execute("UPDATE fact_events SET value = 9 WHERE item = 'a'")
        ticks(session)
        long.commit()
    changed(session)
    assert count(session) == 24


def test_a_short_transaction_within_the_life_of_a_long_one_is_not_held_back(make, database_url):
    session = make(PLAIN)
    with psycopg.connect(database_url) as reader:
        reader.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        reader.execute("SELECT count(*), pg_current_xact_id() FROM fact_events")
        session.connection.execute("DELETE FROM fact_events WHERE item = 'a'")
        changed(session)
        assert count(session) == 2


@pytest.mark.parametrize("source", SOURCES)
def test_savepoints_are_taken_back_in_part(make, database_url, source):
    session = make(source)
    insert = "INSERT INTO fact_events (occurred_at) VALUES ('2025-11-13 {}Z')"
    with psycopg.connect(database_url) as writer:
        writer.execute(insert.format("01:00"))
        writer.execute("SAVEPOINT one")
        writer.execute(insert.format("02:00"))
        writer.execute("SAVEPOINT two")
        writer.execute("UPDATE fact_events SET occurred_at = '2025-11-13 03:00Z' WHERE item = 'a'")
        ticks(session)
        writer.execute("ROLLBACK TO two")
        writer.execute(insert.format("04:00"))
        writer.execute("SAVEPOINT three")
        writer.execute("DELETE FROM fact_events")
        writer.execute("ROLLBACK TO three")
        writer.execute("RELEASE two")
        with suppress(psycopg.errors.DivisionByZero), writer.transaction():
            writer.execute("DELETE FROM fact_events WHERE item = 'b'")
            writer.execute("SELECT 1 / 0")
        ticks(session)
        writer.commit()
    changed(session)
    assert count(session) == 7


def test_an_exception_that_a_function_caught_takes_its_changes_back(make):
    session = make(PLAIN)
    session.connection.execute("""
        DO $$ BEGIN
            FOR hour IN 1..5 LOOP
                BEGIN
                    INSERT INTO fact_events (occurred_at) VALUES (make_timestamptz(2025, 11, 13, hour, 0, 0));
                    PERFORM 1 / (hour % 2);
                EXCEPTION WHEN division_by_zero THEN
                    NULL;
                END;
            END LOOP;
        END $$
    """)
    changed(session)
    assert count(session) == 7


@pytest.mark.parametrize("source", SOURCES)
def test_truncate_in_every_kind_of_transaction(make, database_url, source):
    session = make(source)
    with psycopg.connect(database_url) as writer:
        writer.execute("TRUNCATE fact_events")
        writer.rollback()
        ticks(session)
        writer.execute("SAVEPOINT before")
        writer.execute("TRUNCATE fact_events")
        writer.execute("ROLLBACK TO before")
        writer.commit()
        ticks(session)
        assert count(session) == 4
        writer.execute("DELETE FROM fact_events WHERE item = 'a'")
        writer.execute("TRUNCATE fact_events")
        writer.execute(ROWS)
        writer.execute("PREPARE TRANSACTION 'truncated'")
    session.connection.execute("ROLLBACK PREPARED 'truncated'")
    ticks(session)
    with psycopg.connect(database_url) as writer:
        writer.execute(ROWS)
        writer.execute("TRUNCATE fact_events")
        writer.execute("INSERT INTO fact_events (occurred_at) VALUES ('2025-11-13 06:51Z')")
        writer.execute("PREPARE TRANSACTION 'truncated'")
    session.connection.execute("COMMIT PREPARED 'truncated'")
    changed(session)
    assert count(session) == 1


def test_a_copy_that_fails_in_the_middle_leaves_nothing(make, database_url):
    session = make(PLAIN)
    copy = "COPY fact_events (occurred_at, value) FROM STDIN"
    with psycopg.connect(database_url) as writer:
        with pytest.raises(psycopg.errors.DatetimeFieldOverflow), writer.cursor().copy(copy) as rows:
            rows.write("2025-11-13 01:00Z\t1\n2025-13-13 01:00Z\t1\n")
        writer.rollback()
        ticks(session)
        with writer.cursor().copy(copy) as rows:
            rows.write("2025-11-13 01:00Z\t1\n\\N\t1\ninfinity\t1\n2025-11-13 02:00Z\tNaN\n2025-11-13 02:00Z\t\\N\n")
        ticks(session)
        writer.commit()
    changed(session)
    assert count(session) == 7


@pytest.mark.parametrize("source", SOURCES)
def test_measures_become_null_and_nan_and_numbers_again(make, source):
    session = make(source)
    for value, weight in (("NULL", "NULL"), ("'NaN'", "'NaN'"), ("'Infinity'", "'-Infinity'"), ("7", "0.125")):
        for where in ("item = 'a'", "true"):
            session.connection.execute(f"UPDATE fact_events SET value = {value}, weight = {weight} WHERE {where}")
            changed(session)


@pytest.mark.parametrize("source", SOURCES)
def test_dimensions_become_null_and_values_again(make, source):
    session = make(source)
    for event_type, item in (("NULL", "NULL"), ("'view'", "'a'"), ("''", "''"), ("'sale'", "NULL"), ("NULL", "'c'")):
        for where in ("value = 1", "true"):
            session.connection.execute(f"UPDATE fact_events SET event_type = {event_type}, item = {item} WHERE {where}")
            changed(session)


EDGES = (
    "2025-11-13 07:00Z", "2025-11-13 00:00Z", "2000-01-01 00:00Z", "1999-12-31 23:00Z", "1999-12-31 22:55Z",
    "1970-01-01 00:00Z", "1969-12-31 23:59Z", "1582-10-15 00:00Z", "0001-01-01 00:00Z", "0044-03-15 12:00Z BC",
)  # fmt: skip


@pytest.mark.parametrize("source", SOURCES)
def test_a_microsecond_moves_a_row_over_an_edge_and_back(make, source):
    session = make(source)
    for edge in EDGES:
        session.connection.execute(
            f"INSERT INTO fact_events (occurred_at, value) VALUES ('{edge}', 100), ('{edge}', 1000)"
        )
        changed(session)
        for step, minutes in (
            ("- '1 us'", [100, 1000]),
            ("+ '1 us'", [1100]),
            ("+ '1 us'", [1100]),
            ("- '2 us'", [100, 1000]),
        ):
            session.connection.execute(
                f"UPDATE fact_events SET occurred_at = occurred_at {step}::interval WHERE value = 1000"
            )
            ticks(session)
            rows = session.connection.execute("SELECT value_sum FROM agg_1m WHERE value_sum >= 100 ORDER BY 1")
            assert [row[0] for row in rows] == minutes, edge
        for time in ("NULL", f"'{edge}'", "'infinity'"):
            session.connection.execute(f"UPDATE fact_events SET occurred_at = {time} WHERE value = 1000")
            changed(session)
        session.connection.execute("DELETE FROM fact_events WHERE value >= 100")
        changed(session)


def test_what_is_written_into_a_leaf_is_seen_whenever_it_commits(make, database_url):
    session = make(PARTITIONED)
    insert = "INSERT INTO {} (occurred_at, event_type, item) VALUES ('2025-11-13 06:51Z', '{}', '{}')"
    with psycopg.connect(database_url) as long:
        long.execute(insert.format("views_a", "view", "a"))
        long.execute(insert.format("views", "view", "b"))
        session.connection.execute(insert.format("rest", "sale", "a"))
        changed(session)
        long.execute("UPDATE views_rest SET occurred_at = occurred_at + interval '1 hour'")
        # A row that moves to another leaf is deleted here and inserted there.
        long.execute("UPDATE fact_events SET event_type = 'sale' WHERE item = 'a'")
        long.execute("UPDATE views SET item = 'a' WHERE item = 'b'")
        long.execute("PREPARE TRANSACTION 'in_leaves'")
    ticks(session)
    session.connection.execute("COMMIT PREPARED 'in_leaves'")
    changed(session)
    session.connection.execute("TRUNCATE views_a; DELETE FROM rest WHERE item = 'a'")
    changed(session)
    with session.connection.cursor().copy("COPY views_a (occurred_at, event_type, item) FROM STDIN") as copy:
        copy.write_row(("2025-11-13 06:51Z", "view", "a"))
    changed(session)
