from __future__ import annotations

import logging
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import tuple_row

from batchctl.clock import SystemClock
from batchctl.config import Rollup
from batchctl.errors import BatchctlError, ConfigurationError
from batchctl.rollup.ddl import migrate
from batchctl.rollup.definition import read_definition
from batchctl.rollup.drop import drop
from batchctl.rollup.refresh import tick
from batchctl.state.database import Database
from batchctl.state.migrate import upgrade

pytestmark = pytest.mark.any_user

CLOCK = SystemClock()
LOG = logging.getLogger("trend")
WIDTHS = {"1m": "1 minute", "5m": "5 minutes", "1h": "1 hour"}
MEASURES = {
    "events": "count(*)",
    "odd %": "sum(value % 3)",
    "value_min": "min(value)",
    "value_avg": "avg(value)",
    "value_sd": "stddev(value)",
}
CALLS = ", ".join(call for _, call in sorted(MEASURES.items()))
COLUMNS = ["bucket", "item", *sorted(MEASURES)]


@pytest.fixture
def session(database_url):
    # A server's role may be called like our schema, which would then come first on its path.
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {connection.info.dbname} SET search_path = public")
        connection.execute(
            "CREATE TABLE fact_events (occurred_at timestamptz, item varchar(20), value integer); "
            "CREATE INDEX ON fact_events (occurred_at)"
        )
    with Database(conninfo_to_dict(database_url), "batchctl", CLOCK).connect() as session:
        upgrade(session)
        yield session


def define(**keys):
    keys = {"source": "fact_events", "time": "occurred_at", "dimensions": ("item",), "measures": MEASURES} | keys
    return read_definition("trend", Rollup(**keys), Path("batchctl.toml"))


def query(session, text):
    with session.connection.cursor(row_factory=tuple_row) as cursor:
        return cursor.execute(text).fetchall()


def columns(session, relation):
    return [
        name
        for (name,) in query(
            session,
            f"SELECT attname FROM pg_attribute WHERE attrelid = '{relation}'::regclass AND attnum > 0 ORDER BY attnum",
        )
    ]


def shown(session, relation):
    names = ", ".join(sql.Identifier(name).as_string() for name in COLUMNS)
    return query(session, f"SELECT {names} FROM {relation} ORDER BY 1, 2")


def truth(session, grain, where="true"):
    return query(
        session,
        f"SELECT date_bin('{WIDTHS[grain]}', occurred_at, '2000-01-01Z'), item, {CALLS} "
        f"FROM fact_events WHERE isfinite(occurred_at) AND {where} GROUP BY 1, 2 ORDER BY 1, 2",
    )


def fill(session):
    session.connection.execute(
        "INSERT INTO fact_events SELECT now() - n * interval '7 seconds', (ARRAY['a', 'b', NULL])[n % 3 + 1], n % 17 "
        "FROM generate_series(-20, 2000) AS n; "
        "INSERT INTO fact_events VALUES ('infinity', 'a', 1), (NULL, 'a', 1), ('-infinity', 'a', 1)"
    )


def aggregate(session, definition):
    for grain in definition.grains:
        assert tick(session, definition, grain.name, CLOCK, LOG).outcome in ("success", "empty")


def test_the_values_of_a_table_are_shown_without_their_parts(session):
    fill(session)
    definition = define()
    migrate(session, [definition], CLOCK)
    aggregate(session, definition)
    for grain in WIDTHS:
        assert columns(session, f"agg_{grain}_values") == columns(session, f"agg_{grain}_live") == COLUMNS
        assert shown(session, f"agg_{grain}_values") == shown(session, f"agg_{grain}")


@pytest.mark.parametrize("ticked", [(), ("1m",), ("1m", "5m"), ("1h",), ("1m", "5m", "1h")])
def test_what_is_live_equals_the_source_however_far_each_grain_is(session, ticked):
    fill(session)
    definition = define(where="value <> 5")
    migrate(session, [definition], CLOCK)
    for grain in ticked:
        tick(session, definition, grain, CLOCK, LOG)
    session.connection.execute("INSERT INTO fact_events SELECT now(), 'late', 3 FROM generate_series(1, 5)")
    for grain in WIDTHS:
        assert shown(session, f"agg_{grain}_live") == truth(session, grain, "value <> 5"), grain
    # A negative control: the table alone lacks the open bucket.
    assert shown(session, "agg_1m") != truth(session, "1m", "value <> 5")


def test_the_live_view_reads_the_tables_and_not_the_whole_source(session):
    fill(session)
    definition = define()
    migrate(session, [definition], CLOCK)
    aggregate(session, definition)
    # Nobody tells the rollup of this change of a closed bucket: who reads the table does not see it.
    session.connection.execute("SET session_replication_role = replica")
    session.connection.execute("DELETE FROM fact_events WHERE occurred_at < now() - interval '90 minutes'")
    session.connection.execute("RESET session_replication_role")
    for grain in WIDTHS:
        found = shown(session, f"agg_{grain}_live")
        assert found != truth(session, grain)
        assert found[0] == shown(session, f"agg_{grain}")[0]


def test_a_local_day_is_live_too(session):
    fill(session)
    rollup = Rollup(
        source="fact_events", time="occurred_at", dimensions=("item",), measures=MEASURES, grains=("1m", "1h", "1d")
    )
    definition = read_definition("trend", rollup, Path("batchctl.toml"), "Asia/Kolkata")
    zone = definition.grain("1d").zone
    assert zone == "Asia/Kolkata"
    migrate(session, [definition], CLOCK)
    for ticked in (False, True):
        if ticked:
            aggregate(session, definition)
        own = query(
            session,
            f"SELECT date_trunc('day', occurred_at, '{zone}'), item, {CALLS} FROM fact_events "
            "WHERE isfinite(occurred_at) GROUP BY 1, 2 ORDER BY 1, 2",
        )
        assert shown(session, "agg_1d_live") == own


def test_a_second_migrate_finds_the_views_and_makes_those_that_are_gone(session):
    migrate(session, [define()], CLOCK)
    assert migrate(session, [define()], CLOCK).statements == ()
    session.connection.execute("DROP VIEW agg_5m_live; DROP FUNCTION batchctl.live_trend_1h CASCADE")
    made = migrate(session, [define()], CLOCK).statements
    assert len([text for text in made if text.startswith("CREATE OR REPLACE")]) == 3
    assert shown(session, "agg_5m_live") == shown(session, "agg_1h_live") == []
    assert migrate(session, [define()], CLOCK).statements == ()


@pytest.mark.parametrize("thing", ["TABLE agg_5m_live (mine text)", "VIEW agg_1h_values AS SELECT 1 AS mine"])
def test_a_name_that_is_taken_is_refused_before_anything_is_made(session, thing):
    session.connection.execute(f"CREATE {thing}")
    with pytest.raises(ConfigurationError, match=r"rollup\.trend\.target: public\.agg_\w+ exists and is no view that"):
        migrate(session, [define()], CLOCK)
    assert query(session, "SELECT to_regclass('agg_1m')::text") == [(None,)]


def test_the_view_of_one_rollup_is_not_the_table_of_another(session):
    other = read_definition(
        "other",
        Rollup(source="fact_events", time="occurred_at", measures={"n": "count(*)"}, target="agg_{grain}_live"),
        Path("batchctl.toml"),
    )
    with pytest.raises(ConfigurationError, match=r"rollup\.other\.target: public\.agg_1m_live is the table or a view"):
        migrate(session, [define(), other], CLOCK)


def test_a_drop_takes_the_views_along_and_nothing_that_is_somebody_elses(session):
    migrate(session, [define()], CLOCK)
    session.connection.execute("CREATE VIEW report AS SELECT * FROM agg_1m_live")
    with pytest.raises(BatchctlError, match=r"depends on its tables: view report on public\.agg_1m_live"):
        drop(session, "trend", CLOCK)
    session.connection.execute("DROP VIEW report")
    drop(session, "trend", CLOCK)
    assert query(session, "SELECT relname FROM pg_class WHERE relname LIKE 'agg%'") == []
    assert query(session, "SELECT proname FROM pg_proc WHERE proname LIKE 'live%trend%'") == []


def test_the_source_stays_the_applications_to_change(session):
    fill(session)
    migrate(session, [define()], CLOCK)
    session.connection.execute("ALTER TABLE fact_events ALTER value TYPE bigint")
    assert shown(session, "agg_1h_live") == truth(session, "1h")


def test_names_fit_and_everything_is_commented(session):
    definition = define(target="x" * 55 + "_{grain}")
    migrate(session, [definition], CLOCK)
    made = query(
        session,
        """SELECT relname, obj_description(oid, 'pg_class'), array_agg(col_description(oid, attnum))
           FROM pg_class JOIN pg_attribute ON attrelid = oid AND attnum > 0
           WHERE relkind = 'v' AND relnamespace = 'public'::regnamespace GROUP BY oid, relname""",
    )
    assert len(made) == 6
    for _, comment, of_columns in made:
        assert comment.startswith("Rollup trend: ")
        assert all(of_columns)


def test_a_role_needs_the_view_and_its_function_and_nothing_else(session):
    fill(session)
    migrate(session, [define()], CLOCK)
    name = f"reader_{session.connection.info.dbname}"
    session.connection.execute(f"CREATE ROLE {name}")
    try:
        session.connection.execute(f"GRANT SELECT ON agg_1m_live, agg_1m_values TO {name}; SET ROLE {name}")
        assert shown(session, "agg_1m_values") == []
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="live_trend_1m"):
            shown(session, "agg_1m_live")
        session.connection.execute("RESET ROLE")
        session.connection.execute(f"GRANT EXECUTE ON FUNCTION batchctl.live_trend_1m TO {name}; SET ROLE {name}")
        assert len(shown(session, "agg_1m_live")) > 100
    finally:
        session.connection.execute(f"RESET ROLE; DROP OWNED BY {name}; DROP ROLE {name}")
