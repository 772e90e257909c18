from __future__ import annotations

import logging
import uuid
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from batchctl.clock import SystemClock
from batchctl.config import Rollup
from batchctl.errors import BatchctlError, ConfigurationError, ExitCode, UsageError
from batchctl.rollup.ddl import migrate
from batchctl.rollup.definition import read_definition
from batchctl.rollup.drop import drop
from batchctl.rollup.refresh import tick
from batchctl.state.database import Database
from batchctl.state.migrate import upgrade

pytestmark = pytest.mark.any_user

CLOCK = SystemClock()
LOG = logging.getLogger("trend")
FACTS = """
CREATE TABLE fact_events (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    occurred_at timestamptz, event_type text, item varchar(20), value integer, price numeric(10, 2), weight real
);
CREATE INDEX ON fact_events (occurred_at)
"""
MEASURES = {"events": "count(*)", "value_sum": "sum(value)", "price_avg": "avg(price)"}


class FastClock(SystemClock):
    """Time passes only in sleep."""

    def __init__(self):
        self.slept = 0.0

    def monotonic(self):
        return self.slept

    def sleep(self, seconds):
        self.slept += seconds


def define(name="trend", **keys):
    keys = {"source": "fact_events", "time": "occurred_at", "measures": MEASURES, "dimensions": ("item",)} | keys
    return read_definition(name, Rollup(**keys), Path("batchctl.toml"))


@pytest.fixture
def session(database_url):
    # A server's role may be called like our schema, which would then come first on its path.
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {connection.info.dbname} SET search_path = public")
    with Database(conninfo_to_dict(database_url), "batchctl", CLOCK).connect() as session:
        upgrade(session)
        session.connection.execute(FACTS)
        yield session


def query(session, text):
    return [tuple(row) for row in session.connection.execute(text).fetchall()]


def everything(session):
    return query(
        session,
        """SELECT oid::text, relname, xmin::text FROM pg_class
             WHERE relnamespace IN ('public'::regnamespace, 'batchctl'::regnamespace)
           UNION ALL SELECT oid::text, tgname, xmin::text FROM pg_trigger
           UNION ALL SELECT oid::text, proname, xmin::text FROM pg_proc WHERE pronamespace = 'batchctl'::regnamespace
           UNION ALL SELECT '', definition::text, xmin::text FROM batchctl.rollup
           UNION ALL SELECT '', job, xmin::text FROM batchctl.state ORDER BY 1, 2, 3""",
    )


def columns(session, table):
    return dict(
        query(
            session,
            f"""SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute
                WHERE attrelid = '{table}'::regclass AND attnum > 0 ORDER BY attnum""",
        )
    )


def test_a_second_migrate_does_nothing(session):
    first = migrate(session, [define()], CLOCK)
    assert first.created == ("trend",)
    before = everything(session)
    second = migrate(session, [define()], CLOCK)
    assert (second.statements, second.created, second.warnings) == ((), (), ())
    assert everything(session) == before


def test_a_dry_run_executes_nothing_and_its_text_is_what_a_migrate_runs(session):
    before = everything(session)
    planned = migrate(session, [define(measures={"odd %": "sum(value % 7)"})], CLOCK, dry_run=True)
    assert everything(session) == before
    assert planned.created == ("trend",)
    session.connection.execute("\n".join(planned.statements))
    assert migrate(session, [define(measures={"odd %": "sum(value % 7)"})], CLOCK).statements == ()


def test_the_types_of_columns_are_those_of_postgresql_at_every_grain(session):
    session.connection.execute("ALTER TABLE fact_events ADD big bigint, ADD wide double precision, ADD took interval")
    measures = {
        "n": "count(*)",
        "nv": "count(value)",
        "si": "sum(value)",
        "sb": "sum(big)",
        "sn": "sum(price)",
        "sd": "sum(wide)",
        "st": "sum(took)",
        "mi": "min(value)",
        "mx": "max(item)",
        "mt": "max(occurred_at)",
        "ai": "avg(value)",
        "ad": "avg(wide)",
        "at": "avg(took)",
    }
    migrate(session, [define(measures=measures, dimensions=("item", "price"))], CLOCK)
    expected = {
        "bucket": "timestamp with time zone",
        "item": "character varying(20)",
        "price": "numeric(10,2)",
        "n": "bigint",
        "nv": "bigint",
        "si": "bigint",
        "sb": "numeric",
        "sn": "numeric",
        "sd": "double precision",
        "st": "interval",
        "mi": "integer",
        "mx": "text",
        "mt": "timestamp with time zone",
        "ai": "numeric",
        "ai_sum": "bigint",
        "ai_count": "bigint",
        "ad": "double precision",
        "ad_sum": "double precision",
        "ad_count": "bigint",
        "at": "interval",
        "at_sum": "interval",
        "at_count": "bigint",
    }
    for grain in ("1m", "5m", "1h"):
        assert columns(session, f"agg_{grain}") == expected
    session.connection.execute(
        "INSERT INTO fact_events (occurred_at, value, big, wide, took, price) VALUES "
        "('2025-11-13 06:51Z', 1, 9223372036854775807, 0.5, '1 minute', 1.10), "
        "('2025-11-13 06:52Z', 2, 9223372036854775807, 0.25, '2 minutes', 1.10)"
    )
    definition = define(measures=measures, dimensions=("item", "price"))
    for grain in ("1m", "5m", "1h"):
        assert tick(session, definition, grain, CLOCK, LOG).outcome == "success"
    row = session.connection.execute("SELECT * FROM agg_1h").fetchone()
    assert (row.n, row.si, row.sb, row.ai, row.ad, row.at.total_seconds()) == (
        2,
        3,
        18446744073709551614,
        1.5,
        0.375,
        90,
    )


def test_everything_is_commented(session):
    migrate(session, [define()], CLOCK)
    missing = query(
        session,
        """SELECT relname, attname FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid
           WHERE relname LIKE 'agg%' AND relkind = 'r' AND attnum > 0
             AND (col_description(attrelid, attnum) IS NULL OR obj_description(attrelid, 'pg_class') IS NULL)""",
    )
    assert missing == []


def test_the_collation_of_a_dimension_is_kept(session):
    session.connection.execute('ALTER TABLE fact_events ALTER item TYPE varchar(20) COLLATE "C"')
    migrate(session, [define()], CLOCK)
    assert query(
        session,
        """SELECT collname FROM pg_attribute JOIN pg_collation ON pg_collation.oid = attcollation
           WHERE attrelid = 'agg_5m'::regclass AND attname = 'item'""",
    ) == [("C",)]


def test_a_table_that_is_not_ours_is_refused_and_nothing_is_made(session):
    session.connection.execute("CREATE TABLE agg_5m (mine text)")
    before = everything(session)
    with pytest.raises(ConfigurationError, match=r"rollup\.trend\.target: public\.agg_5m exists") as caught:
        migrate(session, [define()], CLOCK)
    assert caught.value.exit_code == ExitCode.CONFIGURATION
    assert everything(session) == before


def test_the_table_of_another_rollup_is_refused(session):
    migrate(session, [define("other")], CLOCK)
    with pytest.raises(ConfigurationError, match=r"rollup\.trend\.target"):
        migrate(session, [define("other"), define()], CLOCK)


def test_one_that_does_not_fit_stops_all(session):
    before = everything(session)
    with pytest.raises(ConfigurationError, match=r"rollup\.later\.source"):
        migrate(session, [define(), define("later", source="nothing", target="later_{grain}")], CLOCK)
    assert everything(session) == before


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"source": "nothing"}, r"source: there is no table 'nothing'"),
        ({"source": "a b"}, r"source: .*'a b'"),
        ({"source": "a_view"}, r"source: 'a_view' is a view; expected a table"),
        ({"source": "a_leaf"}, r"source: 'a_leaf' is a part of a_tree"),
        ({"time": "moment"}, r"time: public\.fact_events has no column 'moment'; it has id, occurred_at"),
        ({"time": "item"}, r"time: 'item' is of type character varying\(20\); expected timestamp with time zone"),
        ({"dimensions": ("colour",)}, r"dimensions: public\.fact_events has no column 'colour'"),
        ({"dimensions": ("data",)}, r"dimensions: found 'data': .*operator for type json"),
        ({"measures": {"foo": "sum(nothing)"}}, r'measures\.foo: found .*column "nothing" does not exist'),
        ({"measures": {"foo": "sum(item)"}}, r"measures\.foo: found 'sum\(item\)': .*does not exist"),
        ({"measures": {"foo": "sum(sum(value))"}}, r"measures\.foo: .*cannot be nested"),
        ({"where": "value > "}, r"where: found 'value >'"),
        ({"where": "value"}, r"where: found 'value': .*boolean"),
        ({"target": "nowhere.agg_{grain}"}, r"target: there is no schema 'nowhere'"),
        ({"target": "a.b.agg_{grain}"}, r"target: found 'a\.b\.agg_1m', expected TABLE or SCHEMA\.TABLE"),
        ({"target": "{grain}"}, r"target: found '1m'"),
        ({"target": "x" * 62 + "{grain}"}, r"target: .*at most 63 bytes"),
    ],
)
def test_what_does_not_fit_the_database_is_refused_with_its_key(session, keys, message):
    session.connection.execute(
        "ALTER TABLE fact_events ADD data json; CREATE VIEW a_view AS SELECT * FROM fact_events; "
        "CREATE TABLE a_tree (occurred_at timestamptz, item text, value int, price numeric) PARTITION BY LIST (item); "
        "CREATE TABLE a_leaf PARTITION OF a_tree DEFAULT"
    )
    with pytest.raises(ConfigurationError, match=rf"^rollup\.trend\.{message}"):
        migrate(session, [define(**keys)], CLOCK)


def test_names_follow_the_rules_of_postgresql(session):
    session.connection.execute('CREATE SCHEMA "Shop"; ALTER TABLE fact_events SET SCHEMA "Shop"')
    session.connection.execute('ALTER TABLE "Shop".fact_events RENAME occurred_at TO "When %s"')
    definition = define(
        "my.roll-up", source='"Shop".FACT_EVENTS', time="When %s", target="Agg_{grain}", where="value % 2 = 0"
    )
    migrate(session, [definition], CLOCK)
    session.connection.execute("""INSERT INTO "Shop".fact_events ("When %s", value) VALUES ('2025-11-13 06:51Z', 4)""")
    for grain in ("1m", "5m", "1h"):
        assert tick(session, definition, grain, CLOCK, LOG).rows_written == 1
    assert query(session, 'SELECT value_sum FROM "Shop".agg_1h') == [(4,)]


def test_long_names_are_cut_and_stay_apart(session):
    one, other = define("n" * 80 + "1", target="a_{grain}"), define("n" * 80 + "2", target="b_{grain}")
    migrate(session, [one, other], CLOCK)
    session.connection.execute("INSERT INTO fact_events (occurred_at) VALUES ('2025-11-13 06:51Z')")
    for definition in (one, other):
        assert tick(session, definition, "1m", CLOCK, LOG).rows_written == 1
    assert migrate(session, [one, other], CLOCK).statements == ()


def test_what_changed_is_said_and_until_then_a_tick_is_refused(session):
    migrate(session, [define()], CLOCK)
    changed = define(dimensions=("item", "event_type"), measures={"events": "count(*)", "value_sum": "sum(price)"})
    planned = migrate(session, [changed], CLOCK, dry_run=True)
    for part in (
        "-- rollup.trend has changed",
        "dimensions: was [item], now [item, event_type]",
        "measures.value_sum: was 'sum(value)', now 'sum(price)'",
        "measures.price_avg: was 'avg(price)', now nothing",
    ):
        assert part in planned.statements[0]
    with pytest.raises(ConfigurationError, match=r"rollup\.trend has changed .*run `batchctl migrate`"):
        tick(session, changed, "1m", CLOCK, LOG)


def test_a_rollup_that_was_not_migrated_is_refused(session):
    with pytest.raises(ConfigurationError, match=r"rollup\.trend has no tables yet; run `batchctl migrate`"):
        tick(session, define(), "1m", CLOCK, LOG)


def test_a_table_of_ours_that_is_gone_is_named(session):
    migrate(session, [define()], CLOCK)
    session.connection.execute("DROP TABLE agg_5m CASCADE")
    with pytest.raises(ConfigurationError, match=r"its table public\.agg_5m is gone"):
        migrate(session, [define()], CLOCK)


def test_drop_leaves_nothing_and_a_migrate_after_it_rebuilds(session):
    before = {row[1] for row in everything(session)}
    migrate(session, [define(), define("other", target="other_{grain}")], CLOCK)
    session.connection.execute("INSERT INTO fact_events (occurred_at, value) VALUES ('2025-11-13 06:51Z', 4)")
    tick(session, define(), "1m", CLOCK, LOG)
    planned = drop(session, "trend", CLOCK, dry_run=True)
    assert query(session, "SELECT count(*) FROM agg_1m") == [(1,)]
    assert drop(session, "trend", CLOCK) == planned
    assert query(session, "SELECT DISTINCT rollup FROM batchctl.dirty_bucket") == [("other",)]
    drop(session, "other", CLOCK)
    assert {row[1] for row in everything(session)} == before
    migrate(session, [define()], CLOCK)
    for grain in ("1m", "5m", "1h"):
        tick(session, define(), grain, CLOCK, LOG)
    assert query(session, "SELECT value_sum FROM agg_1h") == [(4,)]


def test_drop_of_something_unknown_names_what_there_is(session):
    migrate(session, [define()], CLOCK)
    with pytest.raises(UsageError, match="'nothing' is not in the database; expected one of trend"):
        drop(session, "nothing", CLOCK)


def test_a_table_that_something_depends_on_is_named_and_nothing_is_dropped(session):
    migrate(session, [define()], CLOCK)
    session.connection.execute(
        "CREATE VIEW dashboard AS SELECT * FROM agg_1h; CREATE FUNCTION shown() RETURNS SETOF agg_1h "
        "LANGUAGE sql AS 'SELECT * FROM agg_1h'"
    )
    before = everything(session)
    with pytest.raises(
        BatchctlError, match=r"depends on its tables: function shown\(\), view dashboard on public.agg_1h"
    ):
        drop(session, "trend", CLOCK)
    assert everything(session) == before
    assert tick(session, define(), "1m", CLOCK, LOG).outcome == "empty"
    session.connection.execute("DROP VIEW dashboard; DROP FUNCTION shown")
    drop(session, "trend", CLOCK)
    assert migrate(session, [define()], CLOCK).created == ("trend",)


def test_a_rollup_that_left_the_configuration_is_named(session):
    migrate(session, [define(), define("old", target="old_{grain}")], CLOCK)
    warnings = migrate(session, [define()], CLOCK).warnings
    assert len(warnings) == 1
    assert "rollup.old" in warnings[0]
    assert "batchctl migrate --drop old" in warnings[0]


def test_a_source_without_an_index_on_time_is_named(session):
    session.connection.execute("DROP INDEX fact_events_occurred_at_idx")
    warnings = migrate(session, [define()], CLOCK).warnings
    assert any('CREATE INDEX CONCURRENTLY ON "public"."fact_events" ("occurred_at")' in warning for warning in warnings)


def test_a_new_rollup_warns_of_purges(session):
    assert any("purged" in warning for warning in migrate(session, [define()], CLOCK).warnings)


def test_a_busy_source_is_given_up_with_a_reason_and_never_held_up(session, database_url):
    clock = FastClock()
    with psycopg.connect(database_url) as writer:
        writer.execute("INSERT INTO fact_events (occurred_at) VALUES (now())")
        with pytest.raises(BatchctlError, match=r"public\.fact_events was locked for 5 s") as caught:
            migrate(session, [define()], clock, patience=5)
        assert type(caught.value) is BatchctlError
        assert 4 < clock.slept < 8
        with pytest.raises(
            ConfigurationError, match=r"rollup\.trend is not complete yet; run `batchctl migrate` again"
        ):
            tick(session, define(), "1m", CLOCK, LOG)
        writer.commit()
    migrate(session, [define()], clock)
    session.connection.execute("SET lock_timeout = 0")
    with psycopg.connect(database_url) as reader:
        reader.execute("SELECT FROM fact_events")
        with pytest.raises(BatchctlError, match=r"public\.fact_events was locked"):
            drop(session, "trend", clock, patience=0)
    drop(session, "trend", clock)


def test_a_migrate_that_was_interrupted_goes_on(session, database_url):
    clock = FastClock()
    session.connection.execute(
        "CREATE TABLE parted (occurred_at timestamptz, item text, value int, price numeric) PARTITION BY LIST (item); "
        "CREATE TABLE parted_a PARTITION OF parted FOR VALUES IN ('a'); "
        "CREATE TABLE parted_b PARTITION OF parted DEFAULT"
    )
    definition = define(source="parted")
    with psycopg.connect(database_url) as writer:
        writer.execute("LOCK TABLE parted_b IN ROW EXCLUSIVE MODE")
        with pytest.raises(BatchctlError, match=r"public\.parted_b was locked"):
            migrate(session, [definition], clock, patience=1)
    assert migrate(session, [definition], clock).created == ("trend",)
    assert query(session, "SELECT count(*) FROM pg_trigger WHERE NOT tgisinternal") == [(12,)]
    assert migrate(session, [definition], clock).statements == ()


def test_a_partition_that_came_later_gets_its_triggers_by_migrate_or_by_the_next_tick(session):
    session.connection.execute(
        "CREATE TABLE parted (occurred_at timestamptz, item text, value int, price numeric) PARTITION BY LIST (item)"
    )
    definition = define(source="parted")
    migrate(session, [definition], CLOCK)
    tick(session, definition, "1m", CLOCK, LOG)
    session.connection.execute(
        "CREATE TABLE leaf PARTITION OF parted FOR VALUES IN ('a'); "
        "INSERT INTO leaf VALUES ('2025-11-13 06:51Z', 'a', 1, 1)"
    )
    result = migrate(session, [definition], CLOCK)
    assert any("tracking was missing on public.leaf" in warning for warning in result.warnings)
    assert tick(session, definition, "1m", CLOCK, LOG).rows_written == 1
    session.connection.execute(
        "CREATE TABLE other PARTITION OF parted FOR VALUES IN ('b'); "
        "INSERT INTO other VALUES ('2025-11-13 06:52Z', 'b', 1, 1)"
    )
    assert tick(session, definition, "1m", CLOCK, LOG).rows_written == 1
    assert migrate(session, [definition], CLOCK).statements == ()


def test_a_trigger_that_was_switched_off_is_installed_again(session):
    migrate(session, [define()], CLOCK)
    tick(session, define(), "1m", CLOCK, LOG)
    session.connection.execute("ALTER TABLE fact_events DISABLE TRIGGER USER")
    session.connection.execute("INSERT INTO fact_events (occurred_at, value) VALUES ('2025-11-13 06:51Z', 4)")
    assert any("tracking was missing" in warning for warning in migrate(session, [define()], CLOCK).warnings)
    assert tick(session, define(), "1m", CLOCK, LOG).rows_written == 1
    assert migrate(session, [define()], CLOCK).statements == ()


def test_the_application_needs_no_right_but_its_own(session, database_url):
    role = f"app_{uuid.uuid4().hex[:8]}"
    migrate(session, [define()], CLOCK)
    tick(session, define(), "1m", CLOCK, LOG)
    session.connection.execute(f"CREATE ROLE {role}; GRANT INSERT ON fact_events TO {role}")
    try:
        with psycopg.connect(database_url, autocommit=True) as application:
            application.execute(f"SET ROLE {role}")
            application.execute("INSERT INTO fact_events (occurred_at, item) VALUES ('2025-11-13 06:51Z', 'a')")
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                application.execute("SELECT FROM batchctl.dirty_bucket")
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                application.execute("SELECT FROM fact_events")
            # Nor may it hang the function on a table of its own.
            application.execute("RESET ROLE")
            application.execute("GRANT USAGE ON SCHEMA batchctl TO PUBLIC")
            application.execute(f"SET ROLE {role}")
            application.execute("CREATE TEMP TABLE mine (occurred_at timestamptz)")
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                application.execute(
                    "CREATE TRIGGER mine AFTER INSERT ON mine REFERENCING NEW TABLE AS new_rows "
                    "FOR EACH STATEMENT EXECUTE FUNCTION batchctl.capture_trend()"
                )
        assert tick(session, define(), "1m", CLOCK, LOG).rows_written == 1
    finally:
        session.connection.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")
