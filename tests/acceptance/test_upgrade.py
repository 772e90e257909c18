"""A database of an earlier version: refused until `migrate`, and then everything in it is still good."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict
from rollup_source import CONFIGURATION, GRAINS, PLAIN
from support import batch

from batchctl.clock import SystemClock
from batchctl.state.database import Database
from batchctl.state.journal import Journal
from batchctl.state.sql import LATEST_VERSION, migrations

pytestmark = pytest.mark.any_user


def earlier(url, version):
    """Make the schema as the program that knew this version did."""
    with psycopg.connect(url) as connection:
        connection.execute("CREATE SCHEMA batchctl")
        for migration in migrations():
            if migration.version <= version:
                connection.execute(sql.SQL(migration.text).format(schema=sql.Identifier("batchctl")))
                row = (migration.version, migration.name)
                connection.execute("INSERT INTO batchctl.migration (version, name) VALUES (%s, %s)", row)


def test_the_latest_version_is_that_of_the_files():
    assert [migration.version for migration in migrations()] == list(range(1, LATEST_VERSION + 1))


def test_a_failed_run_of_the_first_version_can_be_continued(batchctl):
    earlier(batchctl.url, 1)
    with psycopg.connect(batchctl.url) as connection:
        connection.execute(
            """
            INSERT INTO batchctl.run (run_id, batch, job, groups, host, hostname, boot_id, pid, pid_start_ticks,
                                      started_at, claimed_until, finished_at, outcome, whole, config_hash)
            VALUES ('old', 'daily', 'daily', '{}', 'h', 'host1', 'b', 1, 1,
                    now() - interval '2 hours', now(), now() - interval '1 hour', 'partial', true, 'x')
            """
        )
        connection.execute(
            """
            INSERT INTO batchctl.step_run (run_id, account, step, attempt, started_at, finished_at, outcome, quantity,
                                           log)
            VALUES ('old', 'default', '31', 1, now(), now(), 'success', 100, 'x'),
                   ('old', 'default', '32', 1, now(), now(), 'failed', 100, 'x')
            """
        )
        connection.execute(
            "INSERT INTO batchctl.state (job, last_started_at, last_completed_at, last_outcome, last_run_id) "
            "VALUES ('daily', now() - interval '2 hours', now() - interval '1 hour', 'partial', 'old')"
        )
    batchctl.configure(batch([("31", "touch again"), ("32", "true")]))
    for command in (["run-batch"], ["status"]):
        done = batchctl(*command, code=78)
        assert f"has version 1, this program needs {LATEST_VERSION}; run `batchctl migrate`" in done.stderr
    batchctl("migrate")
    assert batchctl.json("run-batch", code=75)["reason"] == "gap"
    resumed = batchctl.json("run-batch", "--resume")
    assert (resumed["run_id"], resumed["outcome"]) == ("old", "success")
    assert [step["attempts"] for step in resumed["steps"]] == [1, 2]
    assert not (batchctl.directory / "again").exists()


def test_a_journal_of_the_first_version_is_recorded(batchctl):
    """Its records know nothing of runs that go on."""
    batchctl.configure(batch([("31", "true")]))
    batchctl("run-batch")
    with psycopg.connect(batchctl.url) as connection:
        run_id = connection.execute("UPDATE batchctl.run SET outcome = NULL, finished_at = NULL RETURNING run_id")
        run_id = run_id.fetchone()[0]
        connection.execute("UPDATE batchctl.step_run SET outcome = NULL, finished_at = NULL")
    clock = SystemClock()
    database = Database(conninfo_to_dict(batchctl.url), "batchctl", clock)
    journal = Journal(batchctl.directory / "state", database, clock)
    journal.append(
        "step_finished",
        {
            "run_id": run_id, "account": "default", "step": "31", "attempt": 1, "group": None, "quantity": 100,
            "log": "x", "outcome": "success", "reason": None, "exit_code": 0, "signal": None, "duration": "PT1S",
            "at": "2026-01-01T00:00:00Z",
        },
    )  # fmt: skip
    ended = {"run_id": run_id, "outcome": "success", "reason": None, "jobs": ["daily"], "at": "2026-01-01T00:00:01Z"}
    journal.append("run_finished", ended)
    entry = batchctl.json("history")["entries"][0]
    assert (entry["outcome"], journal.entries()) == ("success", [])
    with psycopg.connect(batchctl.url) as connection:
        row = connection.execute("SELECT outcome, exit_code FROM batchctl.step_run").fetchone()
    assert row == ("success", 0)


def migrated(batchctl):
    with psycopg.connect(batchctl.url) as connection:
        connection.execute(PLAIN)
    batchctl.configure(CONFIGURATION)
    batchctl("migrate")


@pytest.mark.parametrize("waiting", [False, True], ids=["", "with a journal"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("INSERT INTO batchctl.migration (version, name) VALUES (99, 'later')", "this program only knows"),
        ("DELETE FROM batchctl.migration WHERE version > 2", "has version 2, this program needs"),
    ],
    ids=["newer", "older"],
)
def test_aggregate_says_once_that_the_schema_is_another(batchctl, change, said, waiting):
    migrated(batchctl)
    with psycopg.connect(batchctl.url) as connection:
        connection.execute(change)
    clock = SystemClock()
    journal = Journal(batchctl.directory / "state", Database(conninfo_to_dict(batchctl.url), "batchctl", clock), clock)
    if waiting:
        journal.append("skip", {"job": "trend/1m", "reason": "running", "detail": "x", "at": "2026-01-01T00:00:00Z"})
    done = batchctl("aggregate", code=78)
    assert done.stderr.count(said) == 1
    assert len(journal.entries()) == waiting


def test_a_skip_is_kept_for_a_schema_that_fits(batchctl):
    migrated(batchctl)
    elsewhere = (datetime.now(UTC) + timedelta(hours=12)).hour
    another = CONFIGURATION.replace("trend", "another").replace(
        "settle", f'target = "another_{{grain}}"\nhours = "{elsewhere}"\nsettle'
    )
    batchctl.configure(another + CONFIGURATION)
    batchctl("migrate")
    with psycopg.connect(batchctl.url, autocommit=True) as connection:
        connection.execute("INSERT INTO batchctl.migration (version, name) VALUES (99, 'later')")
        batchctl("aggregate", code=78)
        assert connection.execute("SELECT count(*) FROM batchctl.skip").fetchone() == (0,)
        connection.execute("DELETE FROM batchctl.migration WHERE version = 99")
        batchctl("aggregate")
        # Once for each of the two calls, in a series of its own for each grain.
        skips = "SELECT job, count FROM batchctl.skip ORDER BY job"
        assert connection.execute(skips).fetchall() == [(f"another/{grain}", 2) for grain in sorted(GRAINS)]


def test_aggregate_makes_a_schema_that_is_gone_and_asks_for_its_tables(batchctl):
    migrated(batchctl)
    with psycopg.connect(batchctl.url) as connection:
        connection.execute("DROP SCHEMA batchctl CASCADE")
    assert "has no tables yet; run `batchctl migrate`" in batchctl("aggregate", code=78).stderr
