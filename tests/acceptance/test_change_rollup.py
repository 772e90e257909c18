"""A rollup is changed by `migrate`, as a person would call it, and killed in the middle."""

from __future__ import annotations

import psycopg
import pytest
from rollup_source import CONFIGURATION, create_source, differences
from support import wait_for

INSERT = """
INSERT INTO fact_events (occurred_at, event_type, item, value)
SELECT '2025-11-13 00:00Z'::timestamptz + n * interval '1 minute', 'view', 'a', n FROM generate_series(1, 600) AS n
"""
OLD = CONFIGURATION.replace("[rollup.trend.measures]", 'where = "value > 9"\n[rollup.trend.measures]')
HALF_BUILT = "SELECT to_regclass('\"agg_1m~next\"')::text"


@pytest.fixture
def connection(batchctl, database_url):
    """A rollup at work, whose configuration then changes."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        create_source(connection)
        connection.execute(INSERT)
        batchctl.configure(OLD)
        batchctl("migrate")
        batchctl("aggregate")
        batchctl.configure(CONFIGURATION)
        yield connection


def kept(connection):
    return connection.execute("SELECT sum(events) FROM agg_1h").fetchone()[0]


def finished(batchctl, connection):
    """Migrate once more, and compare."""
    connection.execute(INSERT)
    done = batchctl("-v", "migrate")
    assert "The new tables of trend took the place of the old ones." in done.stdout
    batchctl("aggregate")
    assert differences(connection) == []
    assert connection.execute(HALF_BUILT).fetchone() == (None,)
    assert batchctl("-v", "migrate").stdout == "Nothing to do.\n"


def test_a_change_is_said_planned_carried_out_and_silent_under_cron(batchctl, connection):
    refused = batchctl("aggregate", code=78)
    assert "rollup.trend has changed since it was migrated (where: was 'value > 9', now '')" in refused.stderr
    assert "run `batchctl migrate`, which builds its new tables" in refused.stderr
    planned = batchctl("migrate", "--dry-run")
    assert planned.stdout.startswith("-- rollup.trend has changed (where: was 'value > 9', now '')")
    assert 'CREATE TABLE "public"."agg_1m~next"' in planned.stdout
    assert 'ALTER TABLE "public"."agg_1m~next" RENAME TO "agg_1m"' in planned.stdout
    assert kept(connection) == 591
    done = batchctl("migrate")
    assert (done.stdout, done.stderr) == ("", "")
    assert differences(connection) == []
    assert kept(connection) == 600
    for command in ("status", "history", "doctor"):
        assert "~" not in batchctl(command, code=None).stdout
    assert "Rebuilt by its new definition: where" in batchctl.log
    assert "~next" not in batchctl.log
    finished_before = batchctl("-v", "migrate").stdout
    assert finished_before == "Nothing to do.\n"


def test_a_migrate_that_is_killed_while_it_builds_is_continued_by_the_next(batchctl, connection, database_url):
    with psycopg.connect(database_url) as other:
        migration = None
        try:
            # Without a job to hold the build would be over too soon.
            migration = batchctl.start("migrate")
            wait_for(lambda: connection.execute(HALF_BUILT).fetchone()[0], what="new tables")
            wait_for(
                lambda: (
                    other.execute(
                        "SELECT job FROM batchctl.state WHERE job = 'trend~next/5m' FOR UPDATE SKIP LOCKED"
                    ).fetchall()
                    or other.rollback()
                ),
                what="a job to hold",
            )
            wait_for(lambda: connection.execute('SELECT FROM "agg_1m~next"').fetchall(), what="a part that is built")
        finally:
            migration.kill()
            migration.communicate()
    assert kept(connection) == 591
    assert differences(connection) != []
    assert "builds its new tables; run it again" in batchctl("aggregate", code=78).stderr
    finished(batchctl, connection)


def test_a_migrate_that_is_killed_in_the_swap_is_continued_by_the_next(batchctl, connection, database_url):
    with psycopg.connect(database_url) as reader:
        reader.execute("SELECT FROM agg_5m")
        migration = batchctl.start("migrate")
        try:
            wait_for(
                lambda: connection.execute(
                    "SELECT pid FROM pg_locks WHERE NOT granted AND relation = 'agg_5m'::regclass"
                ).fetchall(),
                what="a swap that waits for a reader",
            )
        finally:
            migration.kill()
            migration.communicate()
        assert kept(connection) == 591
        assert connection.execute(HALF_BUILT).fetchone()[0]
    finished(batchctl, connection)


def test_a_change_that_is_taken_back_in_the_middle_drops_what_was_built(batchctl, connection, database_url):
    with psycopg.connect(database_url) as reader:
        reader.execute("SELECT FROM agg_5m")
        migration = batchctl.start("migrate")
        wait_for(
            lambda: connection.execute(
                "SELECT pid FROM pg_locks WHERE NOT granted AND relation = 'agg_5m'::regclass"
            ).fetchall(),
            what="a swap that waits for a reader",
        )
        migration.kill()
        migration.communicate()
    connection.execute(INSERT)
    batchctl.configure(OLD)
    assert batchctl("-v", "migrate").stdout == "Dropped the unfinished new tables of trend.\n"
    batchctl("aggregate")
    assert kept(connection) == 2 * 591
    assert connection.execute(HALF_BUILT).fetchone() == (None,)


def test_what_cannot_be_changed_is_refused_before_anything_is_built(batchctl, connection):
    connection.execute("CREATE VIEW dashboard AS SELECT * FROM agg_1h")
    refused = batchctl("migrate", code=1)
    assert (
        "rollup.trend cannot be changed, because something else depends on its tables: view dashboard" in refused.stderr
    )
    assert connection.execute(HALF_BUILT).fetchone() == (None,)
    connection.execute("DROP VIEW dashboard")
    finished(batchctl, connection)
