"""What the doctor says of real servers, roles, clocks, journals, rollups and jobs."""

from __future__ import annotations

import os
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from support import FACT_EVENTS, NOWHERE, ROLLUP

from batchctl.clock import SystemClock
from batchctl.config_file import decode
from batchctl.doctor import database as doctor
from batchctl.doctor import jobs, rollups
from batchctl.errors import ExitCode
from batchctl.rollup import ddl
from batchctl.rollup.definition import read_definitions
from batchctl.state.database import Database, open_database
from batchctl.state.journal import Journal
from batchctl.state.migrate import upgrade
from batchctl.state.store import Store

pytestmark = pytest.mark.any_user

CLOCK = SystemClock()


class Shifted(SystemClock):
    """The clock of a host that goes wrong."""

    def __init__(self, **off):
        self.off = timedelta(**off)

    def now(self):
        return super().now() + self.off


def states(findings):
    return [finding.state for finding in findings]


def at(url):
    return Database(conninfo_to_dict(url), "batchctl", CLOCK)


def sql(url, *statements):
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement)


@pytest.fixture
def session(database_url):
    """A session on a database with the schema."""
    with at(database_url).connect() as session:
        upgrade(session)
        yield session


# The server


def test_a_database_that_cannot_be_reached():
    (found,) = doctor.check_reachable(at(NOWHERE))
    assert (found.state, found.exit_code) == ("error", ExitCode.DATABASE_UNREACHABLE)
    assert found.advice


def test_a_database_that_can(database_url):
    assert list(doctor.check_reachable(at(database_url))) == []


def test_clocks_that_differ(session):
    for clock, expected in (
        (CLOCK, ["ok", "ok"]),
        (Shifted(seconds=20), ["ok", "warning"]),
        (Shifted(hours=-9), ["ok", "error"]),
    ):
        found = list(doctor.check_server(session, "here", clock))
        assert states(found) == expected
    assert "32400 s apart" in found[1].found or "32399 s apart" in found[1].found


def test_a_server_that_is_too_old(session, monkeypatch):
    monkeypatch.setattr(doctor, "OLDEST_SERVER", 99)
    assert states(doctor.check_server(session, "here", CLOCK)) == ["error", "ok"]


def test_a_standby_and_a_password_that_only_the_environment_has(own_server, monkeypatch, tmp_path):
    data = own_server._data
    here = own_server.connection_parameters()
    with psycopg.connect(**here, autocommit=True) as connection:
        connection.execute("CREATE ROLE locked LOGIN PASSWORD 'hush'")
    rules = (data / "pg_hba.conf").read_text()
    (data / "pg_hba.conf").write_text("local all locked scram-sha-256\n" + rules)
    with psycopg.connect(**here, autocommit=True) as connection:
        connection.execute("SELECT pg_reload_conf()")
    locked = Database({**here, "user": "locked", "passfile": str(tmp_path / "none")}, "batchctl", CLOCK)
    # The reload is not awaited by the server.
    for _ in range(100):
        (found,) = doctor.check_reachable(locked) or [None]
        if found is not None:
            break
        CLOCK.sleep(0.05)
    assert (found.state, found.exit_code) == ("error", ExitCode.DATABASE_UNREACHABLE)
    monkeypatch.setenv("PGPASSWORD", "hush")
    (found,) = doctor.check_reachable(locked)
    assert (found.state, "$PGPASSWORD" in found.found, "hush" in repr(found)) == ("error", True, False)
    assert os.environ["PGPASSWORD"] == "hush", "it is put back"
    # The control: with the password in the file that libpq reads under cron too, all is well.
    (tmp_path / "pgpass").write_text("*:*:*:locked:hush\n")
    (tmp_path / "pgpass").chmod(0o600)
    kept = Database({**here, "user": "locked", "passfile": str(tmp_path / "pgpass")}, "batchctl", CLOCK)
    assert states(doctor.check_reachable(kept)) == []

    own_server.stop()
    (data / "standby.signal").touch()
    owner = data.stat()
    os.chown(data / "standby.signal", owner.st_uid, owner.st_gid)
    own_server.start()
    with Database({**here, **own_server.connection_parameters()}, "batchctl", CLOCK).connect() as session:
        found, _ = doctor.check_server(session, "here", CLOCK)
    assert (found.state, "standby" in found.found) == ("error", True)
    assert found.exit_code == ExitCode.DATABASE_UNREACHABLE


# The schema and the rights to it


def test_the_schema_and_its_version(database_url, session):
    assert states(doctor.check_schema(session)) == ["ok"]
    for version, words in ((1, "has version 1"), (99, "has version 99")):
        sql(database_url, "DELETE FROM batchctl.migration", f"INSERT INTO batchctl.migration VALUES ({version}, 'x')")
        if version > 1:
            with pytest.raises(Exception, match=words):
                list(doctor.check_schema(session))
            continue
        (found,) = doctor.check_schema(session)
        assert (found.state, found.exit_code, words in found.found) == ("error", ExitCode.CONFIGURATION, True)
    sql(database_url, "DROP SCHEMA batchctl CASCADE")
    (found,) = doctor.check_schema(session)
    assert (found.state, "not there yet" in found.found) == ("ok", True)


def test_what_the_role_may_not_do(database_url, session):
    role = f"stranger_{os.getpid()}"
    sql(database_url, f"CREATE ROLE {role}")
    try:
        session.connection.execute(f"SET ROLE {role}")
        (found,) = doctor.check_schema(session)
        assert "may not use the schema" in found.found
        sql(database_url, f"GRANT USAGE ON SCHEMA batchctl TO {role}")
        sql(database_url, f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA batchctl TO {role}")
        assert states(doctor.check_schema(session)) == ["ok"]
        sql(database_url, f"REVOKE DELETE ON batchctl.dirty_bucket FROM {role}")
        (found,) = doctor.check_schema(session)
        assert (found.state, found.exit_code) == ("error", ExitCode.CONFIGURATION)
        assert "may not read and write dirty_bucket in" in found.found
        sql(database_url, "DROP SCHEMA batchctl CASCADE")
        (found,) = doctor.check_schema(session)
        assert "may not make one" in found.found
    finally:
        session.connection.execute("RESET ROLE")
        sql(database_url, f"DROP OWNED BY {role}", f"DROP ROLE {role}")


# Journals


def test_journals_that_wait(tmp_path):
    own = Journal(tmp_path, at("postgresql://u@now:5432/d"), CLOCK)
    former = Journal(tmp_path, at("postgresql://u:hush@before:5432/d"), CLOCK)
    assert states(doctor.check_journals(own.path, reached=True)) == ["ok"]
    own.append("skip", {"n": 1})
    (found,) = doctor.check_journals(own.path, reached=True)
    assert (found.state, "1 record wait" in found.found) == ("ok", True)
    assert states(doctor.check_journals(own.path, reached=False)) == ["warning"]
    former.append("run_finished", {"n": 1})
    former.append("run_finished", {"n": 2})
    own.path.with_suffix(".refused").write_text("what the database will never take\n")
    found = {Path(each.found.partition(":")[0]).name: each for each in doctor.check_journals(own.path, reached=True)}
    assert found[former.path.name].state == "warning"
    assert "2 records wait for another database" in found[former.path.name].found
    assert found[own.path.with_suffix(".refused").name].state == "warning"


# Rollups


def configured(text, directory):
    import tomllib

    document = tomllib.loads(f'timezone = "UTC"\nstate_dir = "state"\n[database]\nembedded = true\n{text}')
    return decode(document, directory / "batchctl.toml", {})


@pytest.fixture
def trend(session, database_url, tmp_path):
    """A migrated rollup on a partitioned source, its definition and configuration."""
    sql(
        database_url,
        "CREATE TABLE fact_events (occurred_at timestamptz) PARTITION BY RANGE (occurred_at)",
        "CREATE INDEX ON fact_events (occurred_at)",
        "CREATE TABLE fact_2026 PARTITION OF fact_events FOR VALUES FROM ('2026-01-01') TO ('2027-01-01')",
    )
    configuration = configured(ROLLUP, tmp_path)
    (definition,) = read_definitions(configuration)
    ddl.migrate(session, [definition], CLOCK)
    return definition, configuration.rollups


def test_a_rollup_that_is_as_configured(session, trend):
    assert states(rollups.check_rollup(session, trend[0], CLOCK)) == ["ok"]
    assert list(rollups.check_strangers(session, trend[1])) == []
    assert list(rollups.check_silenced(session)) == []


def test_a_rollup_that_is_not_migrated(session, database_url, tmp_path):
    sql(database_url, FACT_EVENTS)
    (definition,) = read_definitions(configured(ROLLUP, tmp_path))
    (found,) = rollups.check_rollup(session, definition, CLOCK)
    assert (found.state, found.exit_code) == ("error", ExitCode.CONFIGURATION)
    assert "not migrated" in found.found
    tables = session.run(session.statement("doctor.registered"))
    assert tables == [], "looking made nothing"


@pytest.mark.usefixtures("trend")
def test_a_rollup_that_was_changed(session, tmp_path):
    (changed,) = read_definitions(configured(ROLLUP + 'last = "max(occurred_at)"\n', tmp_path))
    (found,) = rollups.check_rollup(session, changed, CLOCK)
    assert (found.state, found.exit_code) == ("error", ExitCode.CONFIGURATION)
    assert "has changed since it was migrated" in found.found


@pytest.mark.usefixtures("trend")
def test_a_rollup_that_was_given_lookback(session, tmp_path):
    (changed,) = read_definitions(
        configured(ROLLUP.replace("\n[rollup.trend.m", '\nlookback = "10m"\n[rollup.trend.m'), tmp_path)
    )
    found = list(rollups.check_rollup(session, changed, CLOCK))
    assert [each.exit_code for each in found if each.state == "error"] == [ExitCode.CONFIGURATION]
    assert any("lookback" in each.found for each in found)


def test_a_view_that_is_gone(session, trend, database_url):
    sql(database_url, "DROP VIEW agg_1m_live")
    (found,) = rollups.check_rollup(session, trend[0], CLOCK)
    assert (found.state, "lacks something" in found.found) == ("warning", True)


@pytest.mark.parametrize(
    "fault",
    [
        "ALTER TABLE fact_events DISABLE TRIGGER ALL",
        "ALTER TABLE fact_2026 DISABLE TRIGGER ALL",
        "CREATE TABLE fact_2027 PARTITION OF fact_events FOR VALUES FROM ('2027-01-01') TO ('2028-01-01')",
    ],
)
def test_triggers_that_are_missing_or_disabled(session, trend, database_url, fault):
    sql(database_url, fault)
    (found,) = rollups.check_rollup(session, trend[0], CLOCK)
    assert (found.state, "changes are not noticed" in found.found) == ("error", True)
    assert re.search(r"fact_(events|2026|2027)", found.found)
    assert "batchctl migrate" in found.advice


def test_a_source_without_an_index_on_the_time(session, trend, database_url):
    sql(database_url, "DROP INDEX fact_events_occurred_at_idx")
    (found,) = rollups.check_rollup(session, trend[0], CLOCK)
    assert (found.state, "no index" in found.found) == ("warning", True)


@pytest.mark.usefixtures("trend")
def test_a_rollup_that_the_configuration_does_not_have(session):
    (found,) = rollups.check_strangers(session, {})
    assert (found.state, "migrate --drop trend" in found.advice) == ("warning", True)


@pytest.mark.usefixtures("trend")
def test_a_role_whose_writes_fire_no_trigger(session, database_url):
    role = f"loader_{os.getpid()}"
    sql(database_url, f"CREATE ROLE {role}", f"ALTER ROLE {role} SET session_replication_role = replica")
    try:
        (found,) = rollups.check_silenced(session)
        assert (found.state, role in found.found) == ("warning", True)
    finally:
        sql(database_url, f"DROP ROLE {role}")


def lag(session, trend, now):
    rows = {row.job: row for row in Store(session).jobs()}
    return list(rollups.check_lag(session, "trend", trend[1]["trend"], rows, now=now, zone=UTC))


def test_a_rollup_that_cron_does_not_aggregate(session, trend, database_url):
    now = datetime.now(UTC)
    assert states(lag(session, trend, now)) == ["ok"] * 3
    # An hour after the migration each grain should have been started by cron.
    later = now + timedelta(hours=2)
    assert states(lag(session, trend, later)) == ["warning"] * 3
    sql(database_url, "INSERT INTO fact_events SELECT now() - interval '1 hour'")
    first, *_ = lag(session, trend, later)
    assert (first.state, "1 closed bucket waits" in first.found) == ("error", True)
    # A tick leaves its time, also one that had nothing to do.
    sql(database_url, f"UPDATE batchctl.state SET last_started_at = '{later}' WHERE job LIKE 'trend/%'")
    assert states(lag(session, trend, later)) == ["ok"] * 3
    # One that ends in failure is not done.
    sql(database_url, "UPDATE batchctl.state SET last_outcome = 'failed' WHERE job = 'trend/1m'")
    first, *rest = lag(session, trend, later)
    assert (first.state, "failed when it was last aggregated" in first.found) == ("error", True)
    assert states(rest) == ["ok"] * 2
    # What is paused is not late.
    sql(database_url, "UPDATE batchctl.state SET last_started_at = NULL, paused = true WHERE job LIKE 'trend/%'")
    assert lag(session, trend, later) == []


# Jobs

BATCH = '[batch.daily]\nschedule = "0 1 * * *"\n[[batch.daily.step]]\nid = "31"\ncommand = ["true"]\n'


def test_paused_and_disabled_jobs_are_named(session, tmp_path):
    configuration = configured(BATCH.replace("schedule", "enabled = false\nschedule") + ROLLUP, tmp_path)
    store = Store(session)
    assert [each.found for each in jobs.check_jobs(configured(BATCH, tmp_path), {})] == ["none is paused or disabled"]
    store.pause("trend/1m", batch=None)
    paused, disabled = jobs.check_jobs(configuration, {row.job: row for row in store.jobs()})
    assert (paused.state, disabled.state) == ("ok", "ok")
    assert paused.found.startswith("paused: trend/1m ")
    assert disabled.found.startswith("disabled: daily ")


def insert_run(database_url, host, pid, *, hours=None):
    ended = "NULL, NULL, NULL" if hours is None else f"now(), 'success', interval '{hours} hours'"
    sql(
        database_url,
        "INSERT INTO batchctl.run (run_id, batch, job, groups, host, hostname, boot_id, pid, pid_start_ticks, "
        "claimed_until, whole, config_hash, finished_at, outcome, duration) "
        f"VALUES ('run-{pid}', 'daily', 'daily', '{{}}', '{host}', 'h', 'an earlier boot', {pid}, 1, now(), true, 'x', "
        f"{ended})",
    )


def test_a_run_that_died(session, database_url, tmp_path):
    configuration = configured(BATCH, tmp_path)
    store = Store(session)
    assert states(jobs.check_orphans(configuration, store, CLOCK)) == ["ok"], "no state directory yet"
    (tmp_path / "state").mkdir(mode=0o700)
    (tmp_path / "state" / "host_id").write_text("here\n")
    insert_run(database_url, "elsewhere", 10)
    assert states(jobs.check_orphans(configuration, store, CLOCK)) == ["ok"], "another host's is not ours to judge"
    sql(database_url, "UPDATE batchctl.run SET host = 'here'")
    (found,) = jobs.check_orphans(configuration, store, CLOCK)
    assert (found.state, "died without an end" in found.found) == ("warning", True)


def test_a_batch_that_takes_longer_than_its_schedule(session, database_url, tmp_path):
    configuration, store = configured(BATCH, tmp_path), Store(session)

    def look():
        return list(jobs.check_schedules(configuration, store, datetime.now(UTC), UTC))

    assert look() == [], "nothing has run yet"
    insert_run(database_url, "here", 11, hours=4)
    assert states(look()) == ["ok"]
    sql(database_url, "UPDATE batchctl.run SET duration = interval '26 hours'")
    (found,) = look()
    assert (found.state, "every 24h" in found.found, "simulate" in found.advice) == ("warning", True, True)
    sql(database_url, "UPDATE batchctl.run SET duration = interval '20 hours'")
    (found,) = look()
    assert (found.state, "6h0m have to be between" in found.found) == ("warning", True), "with its gap it takes longer"
    sql(database_url, "UPDATE batchctl.run SET duration = interval '18 hours'")
    assert states(look()) == ["ok"]


def test_skips_that_every_asks_for_are_no_fault(session, database_url, tmp_path):
    hourly = BATCH.replace("0 1 * * *", '0 * * * *"\nevery = "32h')
    insert_run(database_url, "here", 12, hours=26)
    for text, state in ((hourly, "ok"), (hourly.replace("32h", "26h"), "warning")):
        found = jobs.check_schedules(configured(text, tmp_path), Store(session), datetime.now(UTC), UTC)
        assert states(found) == [state]


@pytest.mark.parametrize(
    "case",
    [
        ("0 1 * * *", 'min_gap = "6h"', 17, "ok", "takes about 17h0m"),
        ("0 1 * * *", 'min_gap = "6h"', 19, "warning", "6h0m have to be between a completion and a start"),
        ("0 1 * * *", 'min_gap = "0s"\ngap_factor = 1.2', 12, "warning", "14h24m have to be between"),
        ("0 1 * * *", 'min_gap = "0s"\ngap_factor = 0.9', 12, "ok", "takes about 12h0m"),
        ("*/2 * * * *", 'min_gap = "36h"', None, "warning", "36h0m have to be between a completion and a start"),
        ("*/2 * * * *", 'min_gap = "0s"\ngap_factor = 1.2', None, None, "nothing is known of its duration"),
        ("0 * * * *", 'every = "30h"', 20, "ok", "all but one start in 30h0m is skipped, as `every` asks"),
        ("0 * * * *", 'every = "30h"', 26, "warning", "6h0m have to be between a completion and a start"),
    ],
)
def test_a_gap_that_a_schedule_does_not_leave(session, database_url, tmp_path, case):
    schedule, options, hours, state, text = case
    changed = BATCH.replace('schedule = "0 1 * * *"', f'schedule = "{schedule}"\n{options}')
    configuration = configured(changed, tmp_path)
    if hours is not None:
        insert_run(database_url, "here", 11, hours=hours)
    found = list(jobs.check_schedules(configuration, Store(session), datetime.now(UTC), UTC))
    assert states(found) == ([state] if state else []), found
    for each in found:
        assert text in each.found
        assert ("batchctl simulate daily" in each.advice) == (state == "warning")


def test_the_variables_that_decide_where_to_connect_are_not_in_the_way(tmp_path, database_url, monkeypatch):
    monkeypatch.setenv("PGHOST", "127.0.0.1")
    parameters = conninfo_to_dict(database_url)
    configuration = configured("", tmp_path)
    document = {"database": {"url": make_conninfo(**parameters)}}
    database = open_database(decode(document, configuration.path, {}), CLOCK)
    assert states(doctor.check_reachable(database)) == []
