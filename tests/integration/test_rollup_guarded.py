"""What a database may have in store for a rollup, and must not let it be wrong or the application suffer."""

from __future__ import annotations

import logging
import threading
import uuid
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from batchctl.clock import SystemClock
from batchctl.config import Rollup
from batchctl.errors import BatchctlError, ConfigurationError
from batchctl.rollup.ddl import migrate
from batchctl.rollup.definition import read_definition
from batchctl.rollup.drop import drop
from batchctl.rollup.queue import rebuild
from batchctl.rollup.refresh import Limits, tick
from batchctl.state.database import Database
from batchctl.state.migrate import upgrade

pytestmark = pytest.mark.any_user

CLOCK = SystemClock()
LOG = logging.getLogger("trend")
AT = "2025-11-13 06:{:02}:07Z"


class LateClock(SystemClock):
    """The budget is over at once."""

    def monotonic(self):
        return 1e9


def define(name="trend", **keys):
    keys = {"source": "fact_events", "time": "occurred_at", "measures": {"events": "count(*)"}} | keys
    return read_definition(name, Rollup(**keys), Path("batchctl.toml"))


@contextmanager
def connected(url, schema="batchctl"):
    with Database(conninfo_to_dict(url), schema, CLOCK).connect() as session:
        upgrade(session)
        yield session


@pytest.fixture
def session(database_url):
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {connection.info.dbname} SET search_path = public")
        connection.execute(
            "CREATE TABLE fact_events (occurred_at timestamptz, item text, value integer, weight real); "
            "CREATE INDEX ON fact_events (occurred_at)"
        )
    with connected(database_url) as session:
        yield session


@pytest.fixture
def role(session, database_url):
    """A role that owns nothing, and where it connects; it has its own copy of our schema to itself."""
    name = f"trend_{uuid.uuid4().hex[:8]}"
    session.connection.execute(
        f"CREATE ROLE {name}; GRANT CREATE ON DATABASE {session.connection.info.dbname} TO {name}"
    )
    try:
        yield name, make_conninfo(database_url, options=f"-c role={name}")
    finally:
        session.connection.execute(f"DROP OWNED BY {name} CASCADE; DROP ROLE {name}")


def execute(session, text):
    return session.connection.execute(text)


def query(session, text):
    return [tuple(row) for row in execute(session, text).fetchall()]


def insert(session, minute, item="a", value=1):
    session.connection.execute(
        "INSERT INTO fact_events (occurred_at, item, value) VALUES (%s, %s, %s)", [AT.format(minute), item, value]
    )


def ticks(session, definition):
    results = [tick(session, definition, grain.name, CLOCK, LOG) for grain in definition.grains]
    return [result.outcome for result in results]


def test_a_virtual_time_is_refused_and_a_stored_one_is_captured(session):
    execute(session, "ALTER TABLE fact_events ADD stored timestamptz GENERATED ALWAYS AS (occurred_at) STORED")
    definition = define(time="stored")
    migrate(session, [definition], CLOCK)
    insert(session, 51)
    assert ticks(session, definition) == ["success"] * 3
    if session.connection.info.server_version >= 180000:
        execute(session, "ALTER TABLE fact_events ADD made timestamptz GENERATED ALWAYS AS (occurred_at) VIRTUAL")
        with pytest.raises(ConfigurationError, match=r"rollup\.other\.time: 'made' is a virtual generated column"):
            migrate(session, [definition, define("other", time="made", target="other_{grain}")], CLOCK)


@pytest.mark.parametrize("time", ["found", "new", "old", "tg_op", "new_rows", "rollup", "bucket"])
def test_a_time_may_be_called_like_a_variable(session, time):
    execute(session, f'ALTER TABLE fact_events RENAME occurred_at TO "{time}"')
    definition = define(time=time)
    migrate(session, [definition], CLOCK)
    execute(session, f"""INSERT INTO fact_events ("{time}") VALUES ('2025-11-13 06:51Z'), ('2025-11-13 06:53Z')""")
    execute(session, f"""UPDATE fact_events SET "{time}" = "{time}" + '1 min' WHERE "{time}" > '2025-11-13 06:52Z'""")
    execute(session, f"""DELETE FROM fact_events WHERE "{time}" < '2025-11-13 06:52Z'""")
    assert query(session, "SELECT DISTINCT extract(minute FROM bucket) FROM batchctl.dirty_bucket ORDER BY 1") == [
        (51,), (53,), (54,),
    ]  # fmt: skip
    assert ticks(session, definition) == ["success"] * 3


def test_what_vanished_while_nothing_was_captured_leaves_the_rollup(session):
    migrate(session, [define()], CLOCK)
    insert(session, 51)
    insert(session, 53)
    ticks(session, define())
    execute(session, "ALTER TABLE fact_events DISABLE TRIGGER USER; DELETE FROM fact_events WHERE item = 'a'")
    insert(session, 55)
    migrate(session, [define()], CLOCK)
    ticks(session, define())
    assert query(session, "SELECT extract(minute FROM bucket), events FROM agg_1m") == [(55, 1)]
    assert query(session, "SELECT events FROM agg_1h") == [(1,)]


def test_rows_that_a_policy_hides_are_an_error_and_never_a_smaller_sum(session, role):
    name, url = role
    execute(session, f"GRANT SELECT, INSERT, TRIGGER ON fact_events TO {name}; GRANT CREATE ON SCHEMA public TO {name}")
    with connected(url, "own") as limited:
        migrate(limited, [define()], CLOCK)
        insert(session, 51)
        execute(session, "ALTER TABLE fact_events ENABLE ROW LEVEL SECURITY")
        for action in (
            lambda: tick(limited, define(), "1m", CLOCK, LOG),
            lambda: rebuild(limited, define(), "1m", CLOCK.now(), CLOCK.now()),
            lambda: migrate(limited, [define()], CLOCK),
        ):
            with pytest.raises(ConfigurationError, match="row-level security"):
                action()
        execute(session, "ALTER TABLE fact_events DISABLE ROW LEVEL SECURITY")
        assert ticks(limited, define()) == ["success"] * 3
        insert(session, 52)
        execute(session, "ALTER TABLE fact_events ENABLE ROW LEVEL SECURITY")
        with pytest.raises(ConfigurationError, match="row-level security"):
            tick(limited, define(), "1m", CLOCK, LOG)
        execute(session, "ALTER TABLE fact_events DISABLE ROW LEVEL SECURITY")
        assert ticks(limited, define()) == ["success"] * 3
        assert query(limited, "SELECT events FROM agg_1h") == [(2,)]


def test_the_smallest_text_is_so_in_the_order_of_its_expression(session):
    execute(session, 'ALTER TABLE fact_events ALTER item TYPE text COLLATE "C"')
    measures = {"own": "min(item)", "chosen": 'max(item COLLATE "POSIX")', "usual": 'min(item COLLATE "default")'}
    definition = define(measures=measures)
    migrate(session, [definition], CLOCK)
    for grain in ("1m", "5m", "1h"):
        assert query(
            session,
            f"""SELECT attname, collname FROM pg_attribute JOIN pg_collation ON pg_collation.oid = attcollation
                WHERE attrelid = 'agg_{grain}'::regclass ORDER BY 1""",
        ) == [("chosen", "POSIX"), ("own", "C"), ("usual", "default")]
    for minute, item in enumerate(["a", "B", "c", "D"]):
        insert(session, minute, item)
    ticks(session, definition)
    assert query(session, "SELECT own, chosen FROM agg_1h") == [("B", "c")]


def test_an_average_of_real_adds_up_in_double_precision(session):
    definition = define(measures={"weight": "avg(weight)"})
    migrate(session, [definition], CLOCK)
    execute(session, "INSERT INTO fact_events (occurred_at, weight) VALUES ('2025-11-13 06:51Z', 16777216)")
    execute(
        session,
        "INSERT INTO fact_events (occurred_at, weight) SELECT '2025-11-13 06:51Z', 1 FROM generate_series(1, 1000)",
    )
    ticks(session, definition)
    for grain in ("1m", "1h"):
        assert query(session, f"SELECT weight_sum, weight = weight_sum / 1001 FROM agg_{grain}") == [(16778216.0, True)]


def test_two_schemas_do_not_take_each_other_s_triggers_over(session, database_url):
    one, other = define("x_trend"), define("trend", target="other_{grain}")
    migrate(session, [one], CLOCK)
    with connected(database_url, "batchctl_x") as second:
        migrate(second, [other], CLOCK)
        assert ticks(session, one) == ticks(second, other) == ["empty"] * 3
        insert(session, 51)
        assert ticks(session, one) == ["success"] * 3
        assert ticks(second, other) == ["success"] * 3


def test_a_trigger_of_somebody_else_is_left_alone(session):
    migrate(session, [define()], CLOCK)
    ((name,),) = query(session, "SELECT tgname FROM pg_trigger WHERE tgname LIKE '%insert%'")
    drop(session, "trend", CLOCK)
    execute(
        session,
        "CREATE FUNCTION mine() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'; "
        f"CREATE TRIGGER {name} AFTER INSERT ON fact_events EXECUTE FUNCTION mine()",
    )
    with pytest.raises(ConfigurationError, match=f"has a trigger {name} that was not made by batchctl"):
        migrate(session, [define()], CLOCK)
    assert query(session, "SELECT rollup FROM batchctl.rollup") == []


def test_a_publication_of_all_tables_does_not_stop_anything(session):
    definition = define(measures={"events": "count(*)", "value": "avg(value)"}, dimensions=("item",))
    migrate(session, [definition], CLOCK)
    execute(session, "CREATE PUBLICATION everything FOR ALL TABLES WITH (publish = 'insert, update, delete, truncate')")
    execute(session, "ALTER TABLE fact_events REPLICA IDENTITY FULL")
    insert(session, 51)
    insert(session, 51, item="b")
    assert ticks(session, definition) == ["success"] * 3
    execute(session, "DELETE FROM fact_events WHERE item = 'b'; UPDATE fact_events SET value = 8")
    assert ticks(session, definition) == ["success"] * 3
    assert query(session, "SELECT item, value FROM agg_1h") == [("a", 8)]


RATIO = {"events": "count(*)", "ratio": "max(10 / value)"}


def test_a_bucket_that_fails_stays_queued_and_the_others_go_on(session):
    definition = define(measures=RATIO)
    migrate(session, [definition], CLOCK)
    bad = (7, 30, 58)
    for minute in range(60):
        insert(session, minute, value=0 if minute in bad else 5)
    result = tick(session, definition, "1m", CLOCK, LOG)
    assert (result.outcome, result.buckets, result.remaining_buckets) == ("failed", 57, 3)
    for part in ("bucket 2025-11-13 06:58:00, 2025-11-13 06:30:00, 2025-11-13 06:07:00: ", "division by zero"):
        assert part in result.reason
    assert query(session, "SELECT sum(events) FROM agg_1m") == [(57,)]
    insert(session, 59, value=5)
    assert tick(session, definition, "1m", CLOCK, LOG).buckets == 1
    execute(session, "UPDATE fact_events SET value = 1 WHERE value = 0")
    assert ticks(session, definition) == ["success"] * 3
    assert query(session, "SELECT events, ratio FROM agg_1h") == [(61, 10)]


def test_a_bucket_that_fails_is_found_even_when_the_budget_is_over(session):
    definition = define(measures=RATIO)
    migrate(session, [definition], CLOCK)
    for minute in range(20):
        insert(session, minute, value=0 if minute == 7 else 5)
    result = tick(session, definition, "1m", LateClock(), LOG, Limits(0))
    assert (result.outcome, result.buckets) == ("success", 10)
    result = tick(session, definition, "1m", LateClock(), LOG, Limits(0))
    assert (result.outcome, result.buckets) == ("success", 2)


def test_a_dimension_too_long_for_an_index_stops_only_its_bucket(session):
    definition = define(dimensions=("item",))
    migrate(session, [definition], CLOCK)
    execute(
        session,
        "INSERT INTO fact_events (occurred_at, item) SELECT '2025-11-13 06:51Z', "
        "string_agg(md5(i::text), '') FROM generate_series(1, 300) AS i",
    )
    insert(session, 50)
    insert(session, 52)
    result = tick(session, definition, "1m", CLOCK, LOG)
    assert (result.outcome, result.buckets, result.remaining_buckets) == ("failed", 2, 1)
    assert "bucket 2025-11-13 06:51:00: " in result.reason


def test_a_table_that_is_gone_is_not_searched_for_bucket_by_bucket(session):
    migrate(session, [define()], CLOCK)
    insert(session, 51)
    insert(session, 52)
    execute(session, "DROP TABLE agg_1m CASCADE")
    result = tick(session, define(), "1m", CLOCK, LOG)
    assert (result.outcome, result.remaining_buckets) == ("failed", 2)
    assert not result.reason.startswith("bucket")


def triggers(session):
    return query(session, "SELECT tgname FROM pg_trigger WHERE NOT tgisinternal")


def test_no_trigger_is_made_where_no_table_can_be(session, role):
    name, url = role
    execute(session, f"GRANT SELECT, TRIGGER ON fact_events TO {name}; REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    message = r"rollup\.trend\.target: .*GRANT CREATE ON SCHEMA public"
    with connected(url, "own") as limited, pytest.raises(ConfigurationError, match=message):
        migrate(limited, [define()], CLOCK)
    with pytest.raises(ConfigurationError, match=r"public\.agg_1m is the table or a view of trend/1m and of other/1m"):
        migrate(session, [define(), define("other", target="public.agg_{grain}")], CLOCK)
    # What nobody looked for beforehand: the name of an index.
    execute(session, "CREATE TABLE mine (id int CONSTRAINT agg_5m_bucket_key UNIQUE)")
    with pytest.raises(BatchctlError, match="already exists"):
        migrate(session, [define()], CLOCK)
    assert triggers(session) == []
    assert query(session, "SELECT rollup FROM batchctl.rollup") == []


def test_many_that_migrate_at_once_agree(session, database_url):
    definitions = [define(), define("other", target="other_{grain}")]
    results = []

    def run():
        with connected(database_url) as mine:
            barrier.wait()
            try:
                results.append(migrate(mine, definitions, CLOCK).warnings)
            except BatchctlError as error:
                results.append(error)

    barrier = threading.Barrier(8)
    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [result for result in results if isinstance(result, Exception)] == []
    assert len(triggers(session)) == 8
    insert(session, 51)
    for definition in definitions:
        assert ticks(session, definition) == ["success"] * 3
    assert migrate(session, definitions, CLOCK).statements == ()


def test_a_lock_timeout_of_the_role_does_not_end_the_wait_for_another_migrate(session, database_url):
    key = "hashtextextended('batchctl rollups batchctl', 0)"
    with psycopg.connect(database_url) as other:
        other.execute(f"SELECT pg_advisory_xact_lock({key})")
        timer = threading.Timer(0.5, other.commit)
        timer.start()
        execute(session, "SET lock_timeout = '50ms'")
        assert migrate(session, [define()], CLOCK).created == ("trend",)
        timer.join()


def test_the_smallest_of_padded_text_keeps_its_length(session):
    execute(session, "ALTER TABLE fact_events ADD code char(4)")
    definition = define(measures={"code": "min(code)"})
    migrate(session, [definition], CLOCK)
    execute(session, "INSERT INTO fact_events (occurred_at, code) VALUES ('2025-11-13 06:51Z', 'abcd')")
    assert ticks(session, definition) == ["success"] * 3
    assert query(session, "SELECT code FROM agg_1h") == [("abcd",)]


def test_a_dimension_may_be_called_like_nearly_anything(session):
    names = ("row_id", "second", "fresh", "kept", "written", "removed", "gone", "low", "rollup", "grain")
    for name in names:
        execute(session, f"ALTER TABLE fact_events ADD {name} text DEFAULT 'x'")
    definition = define(dimensions=names)
    migrate(session, [definition], CLOCK)
    insert(session, 51)
    insert(session, 53)
    assert ticks(session, definition) == ["success"] * 3
    execute(session, "DELETE FROM fact_events WHERE occurred_at > '2025-11-13 06:52Z'")
    assert ticks(session, definition) == ["success"] * 3
    assert query(session, "SELECT events FROM agg_1h") == [(1,)]


def test_a_role_that_owns_nothing_cannot_leave_a_rollup_half_dropped(session, role):
    name, url = role
    execute(session, f"GRANT SELECT, TRIGGER ON fact_events TO {name}; GRANT CREATE ON SCHEMA public TO {name}")
    with connected(url, "own") as limited:
        migrate(limited, [define()], CLOCK)
        with pytest.raises(ConfigurationError, match=r"does not own public\.fact_events"):
            drop(limited, "trend", CLOCK)
        assert len(triggers(session)) == 4
        assert ticks(limited, define()) == ["empty"] * 3
    with connected(make_conninfo(url, options=""), "own") as owner:
        drop(owner, "trend", CLOCK)
        assert triggers(session) == []


def test_a_rollup_that_is_being_dropped_says_so(session, database_url):
    migrate(session, [define()], CLOCK)
    with psycopg.connect(database_url) as reader:
        reader.execute("SELECT FROM fact_events")
        with pytest.raises(BatchctlError, match=r"public\.fact_events was locked"):
            drop(session, "trend", CLOCK, patience=0)
    for action in (lambda: tick(session, define(), "1m", CLOCK, LOG), lambda: migrate(session, [define()], CLOCK)):
        with pytest.raises(ConfigurationError, match=r"is being dropped; run `batchctl migrate --drop trend` again"):
            action()
    drop(session, "trend", CLOCK)
    assert migrate(session, [define()], CLOCK).created == ("trend",)


@pytest.mark.parametrize(
    ("setting", "measure", "kept"),
    [
        ("DateStyle = 'German, DMY'", "max(occurred_at::text)", "2025-11-13 23:30:00+00"),
        ("DateStyle = 'SQL, DMY'", "count(nullif(occurred_at > '11/12/2025', false))", "1"),
        ("IntervalStyle = 'iso_8601'", "max((occurred_at - '2025-11-12Z')::text)", "1 day 23:30:00"),
        ("bytea_output = 'escape'", "max('\\x00ff'::bytea::text)", "\\x00ff"),
    ],
)
def test_what_a_text_means_depends_on_no_setting(session, setting, measure, kept):
    definition = define(measures={"events": "count(*)", "kept": measure})
    migrate(session, [definition], CLOCK)
    execute(session, "INSERT INTO fact_events (occurred_at) VALUES ('2025-11-13 23:30Z')")
    execute(session, f"SET {setting}")
    assert ticks(session, definition) == ["success"] * 3
    assert query(session, "SELECT kept::text FROM agg_1h") == [(kept,)]


def test_a_transaction_may_take_longer_than_the_role_allows(session):
    definition = define(where="pg_sleep(0.01) IS NOT NULL")
    migrate(session, [definition], CLOCK)
    execute(session, "INSERT INTO fact_events (occurred_at) SELECT '2025-11-13Z' FROM generate_series(1, 120)")
    # Before PostgreSQL 17 there is no such setting, and it must not be asked for either.
    if session.connection.info.server_version >= 170_000:
        execute(session, "SET transaction_timeout = '500ms'")
    assert ticks(session, definition) == ["success"] * 3
    assert query(session, "SELECT events FROM agg_1h") == [(120,)]


def test_a_cast_in_a_measure_depends_on_no_time_zone(session):
    definition = define(measures={"last": "max(occurred_at::date)"}, where="extract(hour FROM occurred_at) = 23")
    migrate(session, [definition], CLOCK)
    execute(session, "INSERT INTO fact_events (occurred_at) VALUES ('2025-11-13 23:30Z')")
    execute(session, "SET TimeZone = 'Asia/Tokyo'")
    assert ticks(session, definition) == ["success"] * 3
    assert query(session, "SELECT last::text FROM agg_1h") == [("2025-11-13",)]
