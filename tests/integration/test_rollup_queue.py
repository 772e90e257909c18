"""The queue of dirty buckets: what a tick remembers of the notes it has seen, and what it need not look at again."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from batchctl.clock import SystemClock
from batchctl.config import Rollup
from batchctl.rollup.ddl import migrate
from batchctl.rollup.definition import read_definition
from batchctl.rollup.look import Seen, look_at
from batchctl.rollup.queue import settle
from batchctl.rollup.refresh import tick
from batchctl.state.database import Database
from batchctl.state.migrate import upgrade

pytestmark = pytest.mark.any_user

CLOCK = SystemClock()
LOG = logging.getLogger("queue")
DEFINITION = read_definition(
    "trend",
    Rollup(source="fact_events", time="occurred_at", measures={"events": "count(*)"}, grains=("1m",)),
    Path("batchctl.toml"),
)
NAIVE = "SELECT FROM batchctl.dirty_bucket WHERE rollup = 'trend' AND grain = '1m' AND bucket < now() LIMIT 1"
"""A look at the notes that remembers nothing."""


@contextmanager
def connected(url):
    with Database(conninfo_to_dict(url), "batchctl", CLOCK).connect() as session:
        yield session


@pytest.fixture
def session(database_url):
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {connection.info.dbname} SET search_path = public")
        connection.execute("CREATE TABLE fact_events (occurred_at timestamptz)")
        connection.execute("CREATE INDEX ON fact_events (occurred_at)")
    with connected(database_url) as session:
        upgrade(session)
        migrate(session, [DEFINITION], CLOCK)
        tick(session, DEFINITION, "1m", CLOCK, LOG)
        yield session


def insert(connection, minute="06:51"):
    connection.execute("INSERT INTO fact_events VALUES (%s)", [f"2025-11-13 {minute}Z"])


def pages(session, statement):
    """Count the pages that a statement touches when it runs."""
    text = statement if isinstance(statement, str) else statement.as_string()
    plan = session.connection.execute(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {text}").fetchone()[0][0]["Plan"]
    return plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]


@contextmanager
def overheard(session):
    """Collect the statements of a block, with their values filled in."""
    found = []
    run = session.run

    def overhear(statement, parameters=None):
        found.append(psycopg.ClientCursor(session.connection).mogrify(statement, parameters))
        return run(statement, parameters)

    session.run = overhear
    try:
        yield found
    finally:
        del session.run


def probe(session):
    """Return the probe of an idle tick."""
    with overheard(session) as statements:
        assert tick(session, DEFINITION, "1m", CLOCK, LOG).outcome == "empty"
    return next(statement for statement in statements if "AS noted" in statement)


def queue(session):
    """Return the buckets in the queue, by their distance from now in hours, and from where the job says it begins."""
    (hours,) = session.connection.execute(
        "SELECT array_agg(round(extract(epoch FROM bucket - now()) / 3600)::integer ORDER BY bucket) "
        "FROM batchctl.queued_bucket"
    ).fetchone()
    (begins,) = session.connection.execute(
        "SELECT queued_from IS NOT DISTINCT FROM (SELECT min(bucket) FROM batchctl.queued_bucket) FROM batchctl.state"
    ).fetchone()
    return hours, begins


def test_a_probe_does_not_look_at_notes_that_an_old_snapshot_keeps(session, database_url):
    with psycopg.connect(database_url) as old:
        old.execute("SET default_transaction_isolation = 'repeatable read'")
        old.commit()
        old.execute("SELECT count(*) FROM fact_events")
        session.connection.execute(
            "DO $$ BEGIN FOR i IN 1..20000 LOOP INSERT INTO fact_events VALUES ('2025-11-13 06:51Z'); END LOOP; END $$"
        )
        assert tick(session, DEFINITION, "1m", CLOCK, LOG).outcome == "success"
        assert tick(session, DEFINITION, "1m", CLOCK, LOG).outcome == "empty"
        session.connection.execute("VACUUM batchctl.dirty_bucket")
        session.connection.execute("ANALYZE batchctl.dirty_bucket")
        # The control: the notes are still there for whoever looks without remembering.
        assert pages(session, NAIVE) > 100
        assert pages(session, probe(session)) < 30


def test_what_commits_after_it_was_overtaken_is_seen_and_what_was_seen_is_not_looked_for(session, database_url):
    with psycopg.connect(database_url) as slow:
        insert(slow, "06:10")
        for number in range(3):
            insert(session.connection, f"06:2{number}")
            assert tick(session, DEFINITION, "1m", CLOCK, LOG).buckets == 1
        look, work = look_at(session, DEFINITION, DEFINITION.finest)
        assert not look.dirty
        seen = Seen.read(session.connection.execute("SELECT notes_seen::text FROM batchctl.state").fetchone()[0])
        assert len(seen.late) == 1
        assert seen.unseen_from > seen.late[0]
        slow.commit()
    assert tick(session, DEFINITION, "1m", CLOCK, LOG).buckets == 1
    assert tick(session, DEFINITION, "1m", CLOCK, LOG).outcome == "empty"
    assert session.connection.execute("SELECT sum(events) FROM agg_1m").fetchone()[0] == 4
    assert work.run("remaining")[0].buckets == 0


@pytest.mark.parametrize("waiting", [1, 300])
def test_few_buckets_that_wait_in_the_queue_are_computed_along_with_the_notes(session, waiting):
    """Where events come all the time, each tick finds the bucket in the queue that was open at the one before."""
    session.connection.execute(
        "INSERT INTO fact_events SELECT now() + number * interval '1 minute' + interval '10 hours' "
        "FROM generate_series(1, %s) AS number",
        [waiting],
    )
    insert(session.connection)
    assert tick(session, DEFINITION, "1m", CLOCK, LOG).buckets == 1
    # Some hours later.
    session.connection.execute("UPDATE batchctl.queued_bucket SET bucket = bucket - interval '20 hours'")
    session.connection.execute("UPDATE batchctl.state SET queued_from = queued_from - interval '20 hours'")
    session.connection.execute(
        "INSERT INTO fact_events VALUES (now() + interval '4 hours'), (now() + interval '2 hours')"
    )
    insert(session.connection, "06:52")
    with overheard(session) as statements:
        result = tick(session, DEFINITION, "1m", CLOCK, LOG)
    assert (result.outcome, result.buckets, result.remaining_buckets) == ("success", waiting + 1, 0)
    transactions = sum("FOR UPDATE SKIP LOCKED" in statement for statement in statements)
    assert (transactions == 1) == (waiting == 1)
    assert queue(session) == ([2, 4], True)
    assert tick(session, DEFINITION, "1m", CLOCK, LOG).outcome == "empty"


def test_a_note_of_an_open_bucket_stays_unseen_until_the_bucket_is_closed(session):
    session.connection.execute("INSERT INTO fact_events VALUES (now() + interval '1 hour')")
    before = session.connection.execute("SELECT notes_seen::text FROM batchctl.state").fetchone()
    assert tick(session, DEFINITION, "1m", CLOCK, LOG).outcome == "empty"
    assert session.connection.execute("SELECT notes_seen::text FROM batchctl.state").fetchone() == before
    # Sorted in along with a closed one, it waits in the queue, where time alone makes it due.
    insert(session.connection)
    assert tick(session, DEFINITION, "1m", CLOCK, LOG).buckets == 1
    assert tick(session, DEFINITION, "1m", CLOCK, LOG).outcome == "empty"
    session.connection.execute("UPDATE batchctl.queued_bucket SET bucket = bucket - interval '2 hours'")
    session.connection.execute("UPDATE batchctl.state SET queued_from = queued_from - interval '2 hours'")
    assert tick(session, DEFINITION, "1m", CLOCK, LOG).buckets == 1


def test_numbers_of_transactions_from_elsewhere_are_not_believed(session):
    insert(session.connection)
    session.connection.execute("UPDATE batchctl.state SET notes_seen = '9999999:9999999:'")
    assert tick(session, DEFINITION, "1m", CLOCK, LOG).buckets == 1
    insert(session.connection, "06:52")
    session.connection.execute("UPDATE batchctl.state SET notes_seen_in = 'another/1', notes_seen = '9999999:9999999:'")
    assert tick(session, DEFINITION, "1m", CLOCK, LOG).buckets == 1


def test_an_idle_tick_writes_one_row_and_no_transaction_waits_for_it(session):
    before = session.connection.execute("SELECT pg_current_wal_insert_lsn()").fetchone()[0]
    assert tick(session, DEFINITION, "1m", CLOCK, LOG).outcome == "empty"
    written = session.connection.execute("SELECT pg_current_wal_insert_lsn() - %s::pg_lsn", [before]).fetchone()[0]
    assert written < 20_000


def test_many_rows_are_hashed_whatever_the_session_inserted_before(session):
    with psycopg.connect(session.connection.info.dsn, autocommit=True) as writer:
        writer.execute("SET client_min_messages = log")
        writer.execute("SET trace_sort = on")
        sorts = []
        writer.add_notice_handler(lambda notice: sorts.append(notice.message_primary))
        for rows in (2, 2000):
            sorts.clear()
            writer.execute(
                "INSERT INTO fact_events SELECT '2025-11-13 07:00Z'::timestamptz + number * interval '1 minute' "
                "FROM generate_series(1, %s) AS number",
                [rows],
            )
            # The first shows that there is another plan, which the session would have kept.
            assert bool(sorts) == (rows == 2)
    assert tick(session, DEFINITION, "1m", CLOCK, LOG).buckets == 2000


@pytest.mark.parametrize("many", [1, 1500], ids=["few", "many"])
@pytest.mark.parametrize(
    ("times", "minutes"),
    [
        (["06:51"], {"06:51"}),
        (["06:51", "06:51:59.999999"], {"06:51"}),
        (["06:51", "06:52"], {"06:51", "06:52"}),
        (["06:51", "06:51", "06:51", "09:00"], {"06:51", "09:00"}),
        (["09:00", "06:51:30", "09:00:30", "06:51"], {"06:51", "09:00"}),
        ([None, "06:51", "06:51"], {"06:51"}),
        ([None, "06:51", "06:52"], {"06:51", "06:52"}),
        (["06:51", "06:51", None], {"06:51"}),
        (["infinity", "06:51", "06:51"], {"06:51"}),
        (["06:51", "-infinity", "06:51", "06:53"], {"06:51", "06:53"}),
        ([None, None, "infinity"], set()),
    ],
)
def test_an_insert_notes_the_buckets_of_its_rows_and_one_bucket_hardly_more_than_once(session, times, minutes, many):
    instants = [f"2025-11-13 {time}Z" if time and "infinity" not in time else time for time in times]
    # A session keeps the plans of the trigger, so what it inserts a second time is noted by those of the first.
    for _ in range(2):
        session.connection.execute(
            "INSERT INTO fact_events SELECT moment"
            " FROM unnest(%s::timestamptz[]) WITH ORDINALITY AS given (moment, place), generate_series(1, %s)"
            " ORDER BY place",
            [instants, many],
        )
        noted = session.connection.execute("SELECT bucket FROM batchctl.dirty_bucket").fetchall()
        assert {f"{bucket:%H:%M}" for (bucket,) in noted} == minutes
        assert len(noted) <= 3 or len(minutes) > 1
        session.connection.execute("DELETE FROM batchctl.dirty_bucket")


@pytest.mark.parametrize("kind", ["timestamptz", "date", "text"])
def test_a_source_may_have_a_column_called_bucket(database_url, kind):
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(f"CREATE TABLE fact_events (occurred_at timestamptz, bucket {kind})")
        connection.execute("CREATE INDEX ON fact_events (occurred_at)")
        # Many rows for each bucket, so that the history is read by jumps in the index.
        connection.execute(
            "INSERT INTO fact_events SELECT '2025-11-13Z'::timestamptz + number * interval '0.1 s', NULL"
            " FROM generate_series(0, 59999) AS number; ANALYZE fact_events"
        )
        connection.execute(f"UPDATE fact_events SET bucket = '2030-01-01'::{kind}; ANALYZE fact_events")
    with connected(database_url) as session:
        upgrade(session)
        migrate(session, [DEFINITION], CLOCK)
        assert tick(session, DEFINITION, "1m", CLOCK, LOG).buckets == 100


def test_the_end_of_a_tick_does_not_wait_for_another_that_holds_the_job(session, database_url):
    _, work = look_at(session, DEFINITION, DEFINITION.finest)
    with psycopg.connect(database_url) as other:
        other.execute("SELECT FROM batchctl.state WHERE job = 'trend/1m' FOR NO KEY UPDATE")
        session.connection.execute("SET lock_timeout = '1ms'")
        assert settle(work, "success", None) == 0


def test_the_digits_that_a_role_asks_for_are_of_no_matter(session):
    session.connection.execute("SET extra_float_digits = -15")
    for _ in range(2):
        insert(session.connection)
        assert tick(session, DEFINITION, "1m", CLOCK, LOG).buckets == 1
        assert tick(session, DEFINITION, "1m", CLOCK, LOG).outcome == "empty"
    assert session.connection.execute("SELECT bucket::text, events FROM agg_1m").fetchall() == [
        ("2025-11-13 06:51:00+00", 2)
    ]


def test_few_notes_wait_in_the_queue_until_their_buckets_are_closed(session):
    insert(session.connection)
    assert tick(session, DEFINITION, "1m", CLOCK, LOG).buckets == 1
    insert(session.connection, "06:52")
    session.connection.execute(
        "INSERT INTO fact_events VALUES (now() + interval '1 hour'), (now() + interval '3 hours')"
    )
    result = tick(session, DEFINITION, "1m", CLOCK, LOG)
    assert (result.outcome, result.buckets, result.remaining_buckets) == ("success", 1, 0)
    assert queue(session) == ([1, 3], True)
    assert session.connection.execute("SELECT count(*) FROM batchctl.dirty_bucket").fetchone()[0] == 0


def test_what_came_into_the_queue_after_the_look_stays_there(session, database_url):
    for minute in ("06:50", "06:51"):
        insert(session.connection, minute)
        tick(session, DEFINITION, "1m", CLOCK, LOG)
    # Closed, and in the queue as if it had been open before.
    enqueue = (
        "INSERT INTO batchctl.queued_bucket VALUES ('trend', '1m', '2025-11-13 {}Z'); "
        "UPDATE batchctl.state SET queued_from = least(queued_from, '2025-11-13 {}Z')"
    )
    session.connection.execute(enqueue.format("06:50", "06:50"))
    run = session.run
    with psycopg.connect(database_url, autocommit=True) as other:

        def interfere(statement, parameters=None):
            rows = run(statement, parameters)
            if "AS noted" in statement.as_string():
                other.execute(enqueue.format("06:49", "06:49"))
                other.execute("INSERT INTO fact_events VALUES ('2025-11-13 06:49Z')")
            return rows

        session.run = interfere
        assert tick(session, DEFINITION, "1m", CLOCK, LOG).buckets == 1
    session.run = run
    assert tick(session, DEFINITION, "1m", CLOCK, LOG).buckets == 1
    assert tick(session, DEFINITION, "1m", CLOCK, LOG).outcome == "empty"
    assert session.connection.execute("SELECT sum(events) FROM agg_1m").fetchone()[0] == 3


@pytest.mark.parametrize("notes", [10, 60_000])
def test_more_notes_than_are_read_at_once_are_sorted_in(session, notes):
    insert(session.connection)
    tick(session, DEFINITION, "1m", CLOCK, LOG)
    session.connection.execute(
        "INSERT INTO batchctl.dirty_bucket (rollup, grain, bucket) "
        "SELECT 'trend', '1m', '2025-11-13 06:52Z' FROM generate_series(1, %s)",
        [notes],
    )
    insert(session.connection, "06:52")
    with overheard(session) as statements:
        assert tick(session, DEFINITION, "1m", CLOCK, LOG).buckets == 1
    assert any("taken_late" in statement for statement in statements) == (notes > 10)
    assert session.connection.execute("SELECT count(*) FROM batchctl.dirty_bucket").fetchone()[0] == 0
    assert tick(session, DEFINITION, "1m", CLOCK, LOG).outcome == "empty"
