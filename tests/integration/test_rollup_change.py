"""A changed definition: a new version is built beside the old one and takes its place; nothing captured is lost."""

from __future__ import annotations

import logging
import threading
from contextlib import contextmanager
from dataclasses import replace

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict
from rollup_source import DEFINITION, PARTITIONED, PLAIN, create_source, differences
from rollup_writers import CLOCK
from support import wait_for

from batchctl.errors import BatchctlError, ConfigurationError, UsageError
from batchctl.rollup import ddl, rebuild, refresh
from batchctl.rollup.ddl import migrate
from batchctl.rollup.definition import Grain
from batchctl.rollup.drop import drop
from batchctl.rollup.measure import read_measure
from batchctl.rollup.refresh import tick
from batchctl.state.database import Database
from batchctl.state.migrate import upgrade

pytestmark = pytest.mark.any_user

LOG = logging.getLogger("trend")
INSERT = "INSERT INTO fact_events (occurred_at, event_type, item, value) VALUES (%s, 'view', 'a', 1)"
SOME = ("2025-11-13 06:51Z", "2025-11-13 06:52Z", "2025-11-13 08:00Z", "2025-11-12 08:00Z")
# Changed: fewer and other measures. What the tests compare with has all of them.
OLD = replace(DEFINITION, measures=DEFINITION.measures[:2])
INTERNAL = """
SELECT relname FROM pg_class WHERE relname LIKE '%next%'
UNION ALL SELECT tgname FROM pg_trigger WHERE tgname LIKE '%next%'
UNION ALL SELECT proname FROM pg_proc WHERE proname LIKE '%~next%'
UNION ALL SELECT conname FROM pg_constraint WHERE conname LIKE '%~next%'
UNION ALL SELECT rollup FROM batchctl.rollup WHERE rollup LIKE '%next%'
UNION ALL SELECT job FROM batchctl.state WHERE job LIKE '%next%'
UNION ALL SELECT rollup FROM batchctl.dirty_bucket WHERE rollup LIKE '%next%'
UNION ALL SELECT rollup FROM batchctl.queued_bucket WHERE rollup LIKE '%next%'
UNION ALL SELECT rollup FROM batchctl.source_partition WHERE rollup LIKE '%next%'
"""


class KilledError(Exception):
    """Stands for the end of the process."""


@pytest.fixture
def connection(database_url):
    with psycopg.connect(database_url, autocommit=True) as connection:
        yield connection


@contextmanager
def connected(url):
    with Database(conninfo_to_dict(url), "batchctl", CLOCK).connect() as session:
        upgrade(session)
        yield session


@pytest.fixture
def session(connection, database_url):
    create_source(connection)
    with connected(database_url) as session:
        yield session


def write(connection, *times):
    for time in times:
        connection.execute(INSERT, [time])


def ticks(session, definition=DEFINITION):
    return [tick(session, definition, grain.name, CLOCK, LOG) for grain in definition.grains]


def begun_with(session, connection, definition=OLD):
    """Let a rollup be at work for a while."""
    write(connection, *SOME)
    migrate(session, [definition], CLOCK)
    ticks(session, definition)


def interrupted(monkeypatch, session, place=rebuild, name="_fill_grain", at=1):
    """Let a migrate end in the middle, at the second grain unless told otherwise."""
    real, calls = getattr(place, name), []

    def failing(*arguments, **options):
        calls.append(arguments)
        if len(calls) > at:
            raise KilledError
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, failing)
        with pytest.raises(KilledError):
            migrate(session, [DEFINITION], CLOCK)


def internal(connection):
    return [row[0] for row in connection.execute(INTERNAL).fetchall()]


def shape(connection):
    """List all there is by its name, with what a name can hide."""
    return connection.execute(
        """SELECT relname, relkind::text, obj_description(oid, 'pg_class') FROM pg_class
             WHERE relnamespace IN ('public'::regnamespace, 'batchctl'::regnamespace)
           UNION ALL SELECT attrelid::regclass::text || '.' || attname, format_type(atttypid, atttypmod),
                col_description(attrelid, attnum) FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid
             WHERE relnamespace IN ('public'::regnamespace, 'batchctl'::regnamespace) AND attnum > 0
           UNION ALL SELECT tgname, tgrelid::regclass::text, tgfoid::regproc::text FROM pg_trigger
           UNION ALL SELECT proname, prosrc, proacl::text FROM pg_proc WHERE pronamespace = 'batchctl'::regnamespace
           UNION ALL SELECT conname, conrelid::regclass::text, '' FROM pg_constraint
           UNION ALL SELECT rollup, definition::text, '' FROM batchctl.rollup
           UNION ALL SELECT job, '', '' FROM batchctl.state
           ORDER BY 1, 2, 3"""
    ).fetchall()


@pytest.mark.parametrize("source", [pytest.param(PLAIN, id="plain"), pytest.param(PARTITIONED, id="partitioned")])
def test_after_a_change_everything_is_as_if_it_had_always_been_so(connection, database_url, source):
    create_source(connection, source)
    write(connection, *SOME)
    with connected(database_url) as session:
        migrate(session, [DEFINITION], CLOCK)
        ticks(session)
        expected = shape(connection)
        drop(session, "trend", CLOCK)
        begun_with(session, connection)
        done = migrate(session, [DEFINITION], CLOCK)
        assert (done.changed, done.created) == (("trend",), ())
        # Before any tick.
        assert differences(connection) == []
        assert shape(connection) == expected
        assert internal(connection) == []
        assert [result.outcome for result in ticks(session)] == ["empty"] * 3
        write(connection, *SOME)
        connection.execute("DELETE FROM fact_events WHERE occurred_at = '2025-11-12 08:00Z'")
        ticks(session)
        assert differences(connection) == []
        assert migrate(session, [DEFINITION], CLOCK).statements == ()


@pytest.mark.parametrize(
    ("before", "gone"),
    [
        ({"measures": DEFINITION.measures[1:]}, ()),
        ({"dimensions": ("event_type",)}, ()),
        ({"where": "value > 7"}, ()),
        ({"grains": DEFINITION.grains[1:]}, ()),
        ({"grains": (Grain("2m", 120, "agg_2m"), *DEFINITION.grains)}, ("agg_2m",)),
        ({"target": "old_{grain}", "grains": tuple(replace(g, target=f"old_{g.name}") for g in DEFINITION.grains)},
         ("old_1m", "old_1h", "old_1m_live")),
        ({"source": "other_events"}, ()),
        ({"time": "noticed_at"}, ()),
    ],
    ids=lambda keys: "-".join(keys) if isinstance(keys, dict) else "",
)  # fmt: skip
def test_each_kind_of_change(session, connection, before, gone):
    connection.execute(
        "ALTER TABLE fact_events ADD noticed_at timestamptz; CREATE TABLE other_events (LIKE fact_events)"
    )
    begun_with(session, connection, replace(DEFINITION, **before))
    connection.execute("UPDATE batchctl.state SET paused = true WHERE job = 'trend/1h'")
    migrate(session, [DEFINITION], CLOCK)
    assert differences(connection) == []
    assert connection.execute("SELECT job FROM batchctl.state WHERE paused").fetchall() == [("trend/1h",)]
    connection.execute("UPDATE batchctl.state SET paused = false")
    for table in gone:
        assert connection.execute("SELECT to_regclass(%s)", [table]).fetchone() == (None,)
    assert internal(connection) == []
    # A source that was left is left in peace.
    connection.execute("ALTER TABLE other_events DROP occurred_at; INSERT INTO other_events (id, owner) VALUES (1, 1)")
    write(connection, *SOME)
    ticks(session)
    assert differences(connection) == []
    drop(session, "trend", CLOCK)
    assert connection.execute("SELECT count(*) FROM pg_trigger WHERE NOT tgisinternal").fetchone() == (0,)


DAYS = """
CREATE TABLE day_12 (LIKE fact_events); CREATE TABLE day_13 (LIKE fact_events);
INSERT INTO day_12 (id, owner, occurred_at, value) VALUES (1, 0, '2025-11-12 08:00Z', 1);
INSERT INTO day_13 (id, owner, occurred_at, value) VALUES (1, 0, '2025-11-13 08:00Z', 1);
CREATE TABLE parts (LIKE fact_events) PARTITION BY RANGE (occurred_at);
CREATE INDEX ON parts (occurred_at);
DROP TABLE fact_events;
ALTER TABLE parts RENAME TO fact_events;
ALTER TABLE fact_events ATTACH PARTITION day_12 FOR VALUES FROM ('2025-11-12Z') TO ('2025-11-13Z');
"""
ATTACH = "ALTER TABLE fact_events ATTACH PARTITION day_13 FOR VALUES FROM ('2025-11-13Z') TO ('2025-11-14Z')"


def test_partitions_of_another_source_are_followed(session, connection):
    connection.execute("CREATE TABLE other_events (LIKE fact_events); CREATE INDEX ON other_events (occurred_at)")
    connection.execute(DAYS)
    migrate(session, [replace(DEFINITION, source="other_events")], CLOCK)
    migrate(session, [DEFINITION], CLOCK)
    assert differences(connection) == []
    connection.execute(ATTACH)
    ticks(session)
    assert differences(connection) == []
    connection.execute("DROP TABLE day_12")
    ticks(session)
    assert differences(connection) == []
    assert internal(connection) == []
    assert migrate(session, [DEFINITION], CLOCK).statements == ()


@pytest.mark.parametrize("change", ["DROP TABLE day_12", ATTACH, "ALTER TABLE fact_events DETACH PARTITION day_12"])
@pytest.mark.parametrize("interruption", [{"at": 1}, {"place": ddl, "name": "swap", "at": 0}], ids=["half", "built"])
def test_partitions_that_change_while_the_new_version_is_built_are_followed(
    session, connection, monkeypatch, change, interruption
):
    connection.execute(DAYS)
    migrate(session, [OLD], CLOCK)
    ticks(session, OLD)
    interrupted(monkeypatch, session, **interruption)
    connection.execute(change)
    # A host whose configuration is the old one.
    ticks(session, OLD)
    assert migrate(session, [DEFINITION], CLOCK).changed == ("trend",)
    ticks(session)
    assert differences(connection) == []
    assert internal(connection) == []
    assert [result.outcome for result in ticks(session)] == ["empty"] * 3


def test_a_dry_run_changes_nothing_and_its_text_can_be_run(session, connection):
    begun_with(session, connection)
    before = shape(connection)
    planned = migrate(session, [DEFINITION], CLOCK, dry_run=True)
    assert shape(connection) == before
    assert "measures.weight_sum: was nothing" in planned.statements[0]
    session.connection.execute("\n".join(planned.statements))
    assert internal(connection) == []
    ticks(session)
    assert differences(connection) == []
    assert migrate(session, [DEFINITION], CLOCK).statements == ()


def test_a_tick_of_a_changed_rollup_is_refused_and_says_how_to_go_on(session, connection, monkeypatch):
    begun_with(session, connection)
    with pytest.raises(ConfigurationError, match=r"rollup\.trend has changed .*run `batchctl migrate`, which builds"):
        tick(session, DEFINITION, "1m", CLOCK, LOG)
    interrupted(monkeypatch, session)
    with pytest.raises(ConfigurationError, match=r"`batchctl migrate` builds its new tables"):
        tick(session, DEFINITION, "1m", CLOCK, LOG)


def test_an_interrupted_change_goes_on_and_keeps_what_is_built(session, connection, monkeypatch):
    begun_with(session, connection)
    old = connection.execute("SELECT * FROM agg_1m ORDER BY 1").fetchall()
    interrupted(monkeypatch, session)
    assert connection.execute("SELECT * FROM agg_1m ORDER BY 1").fetchall() == old
    write(connection, *SOME)
    made = connection.execute("""SELECT oid FROM pg_class WHERE relname = 'agg_1m~next'""").fetchone()
    built = connection.execute('SELECT xmin::text FROM "agg_1m~next" WHERE bucket < %s', [SOME[0]]).fetchall()
    migrate(session, [DEFINITION], CLOCK)
    assert connection.execute("""SELECT oid FROM pg_class WHERE relname = 'agg_1m'""").fetchone() == made
    assert len(built) == 1
    assert differences(connection) == []


def test_a_half_built_version_that_no_longer_fits_begins_anew(session, connection, monkeypatch):
    begun_with(session, connection)
    interrupted(monkeypatch, session)
    other = replace(DEFINITION, where="value > 7")
    migrate(session, [other], CLOCK)
    assert connection.execute("SELECT count(*) FROM agg_1m").fetchone() == (0,)
    assert internal(connection) == []
    migrate(session, [DEFINITION], CLOCK)
    assert differences(connection) == []


def test_a_definition_that_is_changed_back_only_drops_the_half_built_version(session, connection, monkeypatch):
    begun_with(session, connection)
    made = connection.execute("SELECT 'agg_1m'::regclass::oid").fetchone()
    interrupted(monkeypatch, session)
    write(connection, "2025-11-13 06:59Z")
    done = migrate(session, [OLD], CLOCK)
    assert (done.discarded, done.changed) == (("trend",), ())
    assert internal(connection) == []
    assert connection.execute("SELECT 'agg_1m'::regclass::oid").fetchone() == made
    # What was noted for it meanwhile is still its own.
    assert [result.buckets for result in ticks(session, OLD)] == [1, 1, 1]


@pytest.mark.parametrize("at", range(1, 9))
def test_a_migrate_may_end_between_any_two_transactions(session, connection, at):
    begun_with(session, connection)
    for _ in range(3):
        with pytest.MonkeyPatch.context() as patch:
            real, calls = ddl.apply.apply, []

            def failing(*arguments, real=real, calls=calls):
                calls.append(arguments)
                if len(calls) > at:
                    raise KilledError
                return real(*arguments)

            patch.setattr(ddl.apply, "apply", failing)
            try:
                migrate(session, [DEFINITION], CLOCK)
            except KilledError:
                write(connection, *SOME)
    migrate(session, [DEFINITION], CLOCK)
    ticks(session)
    assert differences(connection) == []
    assert internal(connection) == []


def test_drop_takes_a_half_built_version_along(session, connection, monkeypatch):
    before = shape(connection)
    begun_with(session, connection)
    interrupted(monkeypatch, session)
    assert internal(connection)
    with pytest.raises(UsageError, match=r"expected one of trend$"):
        drop(session, "trend~next", CLOCK)
    assert not any("next" in text for text in migrate(session, [OLD], CLOCK, dry_run=True).warnings)
    drop(session, "trend", CLOCK)
    assert shape(connection) == before


def test_a_stranger_s_new_version_is_not_named(session, connection, monkeypatch):
    begun_with(session, connection)
    interrupted(monkeypatch, session)
    warnings = migrate(session, [], CLOCK).warnings
    assert len(warnings) == 1
    assert "~" not in warnings[0]


def test_a_table_that_something_depends_on_is_named_and_nothing_is_built(session, connection):
    begun_with(session, connection)
    connection.execute("CREATE VIEW dashboard AS SELECT * FROM agg_1h_values")
    before = shape(connection)
    with pytest.raises(BatchctlError, match=r"rollup\.trend cannot be changed.*view dashboard on public.agg_1h_values"):
        migrate(session, [DEFINITION], CLOCK)
    assert shape(connection) == before
    connection.execute("DROP VIEW dashboard")
    migrate(session, [DEFINITION], CLOCK)
    assert differences(connection) == []


def test_a_name_that_is_taken_is_refused_before_anything_is_built(session, connection):
    begun_with(session, connection, replace(OLD, grains=OLD.grains[:2]))
    connection.execute("CREATE TABLE agg_1h_live (mine text)")
    before = shape(connection)
    with pytest.raises(ConfigurationError, match=r"rollup\.trend\.target: public\.agg_1h_live exists"):
        migrate(session, [DEFINITION], CLOCK)
    assert shape(connection) == before


def test_rows_that_the_new_definition_cannot_compute_leave_the_old_tables_in_use(session, connection):
    begun_with(session, connection)
    measure = read_measure("odd", "sum(1 / (value - 1))", "here")
    with pytest.raises(BatchctlError, match=r"rollup\.trend: its new tables cannot be built.*division by zero"):
        migrate(session, [replace(OLD, measures=(*OLD.measures, measure))], CLOCK)
    write(connection, "2025-11-13 06:59Z")
    assert migrate(session, [OLD], CLOCK).discarded == ("trend",)
    assert [result.outcome for result in ticks(session, OLD)] == ["success"] * 3


def test_tables_that_hold_what_the_source_need_not_hold_are_not_replaced(session, connection):
    begun_with(session, connection)
    connection.execute("DELETE FROM fact_events WHERE occurred_at < '2025-11-13'")
    before = shape(connection)
    with pytest.raises(ConfigurationError, match=r"public\.agg_1. holds buckets older than its source_retention"):
        migrate(session, [replace(DEFINITION, retention_seconds=86400.0)], CLOCK)
    assert shape(connection) == before
    # Without such buckets there is nothing to lose.
    connection.execute("TRUNCATE agg_1m, agg_5m, agg_1h")
    assert migrate(session, [replace(DEFINITION, retention_seconds=86400.0)], CLOCK).changed == ("trend",)


def test_rights_on_the_old_tables_are_kept(session, connection):
    begun_with(session, connection)
    role = f"reader_{connection.info.dbname}"
    connection.execute(f"CREATE ROLE {role}")
    try:
        connection.execute(
            f"GRANT SELECT ON agg_1m, agg_5m_live TO {role}; GRANT SELECT ON agg_1h TO PUBLIC; "
            f"GRANT SELECT (bucket) ON agg_5m TO {role} WITH GRANT OPTION; "
            f"GRANT EXECUTE ON FUNCTION batchctl.live_trend_5m TO {role}"
        )
        migrate(session, [DEFINITION], CLOCK)
        assert connection.execute(
            """SELECT has_table_privilege(%(r)s, 'agg_1m', 'SELECT'), has_table_privilege(%(r)s, 'agg_1m', 'UPDATE'),
                      has_table_privilege(%(r)s, 'agg_5m', 'SELECT'),
                      has_table_privilege(%(r)s, 'agg_5m_live', 'SELECT'),
                      has_column_privilege(%(r)s, 'agg_5m', 'bucket', 'SELECT WITH GRANT OPTION'),
                      has_table_privilege(%(r)s, 'agg_1h', 'SELECT'),
                      has_table_privilege(%(r)s, 'agg_1m_live', 'SELECT'),
                      has_function_privilege(%(r)s, 'batchctl.live_trend_5m()', 'EXECUTE'),
                      has_function_privilege(%(r)s, 'batchctl.live_trend_1m()', 'EXECUTE')""",
            {"r": role},
        ).fetchone() == (True, False, False, True, True, True, False, True, False)
    finally:
        connection.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


def test_long_names_are_cut_and_stay_apart(session, connection):
    write(connection, *SOME)
    long = replace(
        OLD,
        name="n" * 60,
        target="t" * 60 + "{grain}",
        grains=tuple(replace(grain, target="t" * 60 + grain.name) for grain in OLD.grains),
    )
    migrate(session, [long], CLOCK)
    changed = replace(long, measures=DEFINITION.measures)
    migrate(session, [changed], CLOCK)
    assert connection.execute(f"SELECT sum(events) FROM {'t' * 60}1h").fetchone() == (4,)
    drop(session, "n" * 60, CLOCK)
    assert connection.execute("SELECT count(*) FROM pg_trigger WHERE NOT tgisinternal").fetchone() == (0,)


class Migration(threading.Thread):
    """A migrate in a session of its own."""

    def __init__(self, url, definition=DEFINITION):
        super().__init__()
        self.url, self.definition, self.error = url, definition, None
        self.start()

    def run(self):
        try:
            with connected(self.url) as session:
                migrate(session, [self.definition], CLOCK)
        except Exception as error:  # noqa: BLE001 - looked at by the test
            self.error = error


WAITS = "SELECT pid FROM pg_locks WHERE NOT granted AND relation = 'fact_events'::regclass"


def test_a_writer_that_is_open_when_the_change_begins_is_counted(session, connection, database_url):
    begun_with(session, connection)
    with psycopg.connect(database_url) as writer:
        write(writer, "2025-11-13 06:51Z")
        migration = Migration(database_url)
        wait_for(lambda: migration.error or connection.execute(WAITS).fetchone(), what="a wait for the writer")
        assert migration.error is None
        write(writer, "2025-11-13 09:51Z")
        writer.commit()
    migration.join()
    assert migration.error is None
    assert differences(connection) == []


def test_a_writer_that_is_open_at_the_swap_is_counted_and_stalls_nobody(session, connection, database_url, monkeypatch):
    begun_with(session, connection)
    writers, real = [], rebuild.fill

    def fill(*arguments):
        filled = real(*arguments)
        if not writers:
            writers.append(psycopg.connect(database_url))
            write(writers[0], "2025-11-13 09:51Z")
        return filled

    monkeypatch.setattr(rebuild, "fill", fill)
    migration = Migration(database_url)
    wait_for(lambda: migration.error or connection.execute(WAITS).fetchone(), what="a wait for the writer")
    assert migration.error is None
    assert len(writers) == 1
    connection.execute("SET statement_timeout = '2s'")
    for _ in range(3):
        write(connection, "2025-11-13 09:52Z")
        connection.execute("SELECT count(*) FROM agg_1h_live")
    write(writers[0], "2025-11-13 10:51Z")
    writers[0].commit()
    migration.join()
    writers[0].close()
    assert migration.error is None
    ticks(session)
    assert differences(connection) == []


def test_a_tick_that_began_before_the_swap_writes_nothing_after_it(session, connection, monkeypatch):
    """The other host still has the old configuration, and has looked already."""
    begun_with(session, connection, replace(DEFINITION, where="value > 7"))
    old = replace(DEFINITION, where="value > 7")
    write(connection, *SOME)
    real = refresh._catch_up

    def late(call):
        with monkeypatch.context() as patch:
            patch.setattr(refresh, "_catch_up", real)
            with connected_like(call.work.session) as other:
                migrate(other, [DEFINITION], CLOCK)
            write(connection, *SOME)
            return real(call)

    with monkeypatch.context() as patch:
        patch.setattr(refresh, "_catch_up", late)
        assert tick(session, old, "1m", CLOCK, LOG).rows_written == 0
    ticks(session)
    assert differences(connection) == []


@contextmanager
def connected_like(session):
    parameters = session.connection.info.get_parameters()
    with Database(parameters, "batchctl", CLOCK).connect() as other:
        yield other


def test_two_migrations_at_once_come_to_the_same_end(session, connection, database_url):
    begun_with(session, connection)
    both = [Migration(database_url) for _ in range(2)]
    for migration in both:
        migration.join()
        assert migration.error is None
    assert differences(connection) == []
    assert internal(connection) == []


def test_the_comparison_sees_a_change_that_is_not_captured(session, connection, monkeypatch):
    """A negative control: without the triggers of the new version, what is written meanwhile is lost."""
    begun_with(session, connection)
    interrupted(monkeypatch, session)
    connection.execute("ALTER TABLE fact_events DISABLE TRIGGER ALL")
    write(connection, *SOME)
    connection.execute("ALTER TABLE fact_events ENABLE TRIGGER ALL")
    migrate(session, [DEFINITION], CLOCK)
    ticks(session)
    assert differences(connection) != []
