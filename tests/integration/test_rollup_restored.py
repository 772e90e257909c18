"""A database that was dumped and restored elsewhere goes on exactly: ids of transactions mean nothing there."""

from __future__ import annotations

import logging
import subprocess
from contextlib import closing
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from rollup_source import DEFINITION, GRAINS, PARTITIONED, PLAIN, create_source, differences
from rollup_writers import CLOCK
from support import skip_or_fail

from batchctl.rollup.ddl import migrate
from batchctl.rollup.refresh import tick
from batchctl.state.database import Database
from batchctl.state.migrate import upgrade

pytestmark = pytest.mark.any_user

LOG = logging.getLogger("trend")
IDS = 3000
INSERT = "INSERT INTO fact_events (occurred_at, event_type, item, value) VALUES ('2025-11-13 06:{}Z', 'view', 'a', 1)"
# One of them has used up many more ids than the other.
USE_IDS = f"DO $$ BEGIN FOR i IN 1..{IDS} LOOP PERFORM pg_current_xact_id(); COMMIT; END LOOP; END $$"


def ticks(url):
    """Refresh every grain as another process would; nothing closed is left."""
    with Database(conninfo_to_dict(url), "batchctl", CLOCK).connect() as session:
        upgrade(session)
        results = [tick(session, DEFINITION, grain, CLOCK, LOG) for grain in GRAINS]
    for result in results:
        assert (result.outcome in ("success", "empty"), result.remaining_buckets) == (True, 0), result
    return results


def copy_database(source, target):
    """Dump one database, with the binaries of its server, and restore it into another."""
    with psycopg.connect(source) as connection:
        binaries = connection.execute("SELECT setting FROM pg_config WHERE name = 'BINDIR'").fetchone()[0]
    if not Path(binaries, "pg_dump").exists():
        skip_or_fail(f"no pg_dump in {binaries}")
    dump = subprocess.run([f"{binaries}/pg_dump", "--no-owner", "-d", source], check=True, capture_output=True)
    # psql of the same directory knows what its pg_dump writes (\restrict).
    psql = [f"{binaries}/psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", target]
    done = subprocess.run(psql, check=False, input=dump.stdout, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b""), done.stderr


@pytest.fixture
def elsewhere(own_server):
    """An empty database of another cluster."""
    parameters = own_server.connection_parameters()
    with psycopg.connect(**parameters, autocommit=True) as connection:
        connection.execute("CREATE DATABASE restored")
        connection.execute("ALTER DATABASE restored SET search_path = public")
    return make_conninfo(**{**parameters, "dbname": "restored"})


@pytest.mark.parametrize(
    ("busier", "source"),
    [pytest.param("here", PLAIN, id="to-new"), pytest.param("elsewhere", PARTITIONED, id="to-old")],
)
def test_what_was_queued_and_what_comes_after_a_restore_is_aggregated(database_url, elsewhere, busier, source):
    with closing(psycopg.connect(database_url, autocommit=True)) as here:
        create_source(here, source)
        with Database(conninfo_to_dict(database_url), "batchctl", CLOCK).connect() as session:
            upgrade(session)
            migrate(session, [DEFINITION], CLOCK)
        with psycopg.connect(elsewhere if busier == "elsewhere" else database_url, autocommit=True) as busy:
            busy.execute(USE_IDS)
        for minute in (10, 11):
            here.execute(INSERT.format(minute))
            ticks(database_url)
        assert differences(here) == []
        # Queued, and not aggregated when it is dumped; and what is still open then, which a dump does not see.
        here.execute(INSERT.format(12))
        here.execute("UPDATE fact_events SET value = 5 WHERE occurred_at = '2025-11-13 06:10Z'")
        with psycopg.connect(database_url) as open_one:
            open_one.execute(INSERT.format(13))
            ticks(database_url)
            here.execute(INSERT.format(14))
            here.execute("DELETE FROM fact_events WHERE occurred_at = '2025-11-13 06:11Z'")
            copy_database(database_url, elsewhere)
        ticks(database_url)
        assert differences(here) == []
    with closing(psycopg.connect(elsewhere, autocommit=True)) as there:
        assert there.execute("SELECT count(*) FROM fact_events").fetchone() == (3,)
        assert differences(there) != []
        ticks(elsewhere)
        assert differences(there) == []
        # What numbers from elsewhere noted is done with for good.
        assert {result.outcome for result in ticks(elsewhere)} == {"empty"}
        assert there.execute("SELECT count(*) FROM batchctl.dirty_bucket").fetchone() == (0,)
        for change in (
            INSERT.format(15),
            INSERT.format(10),
            "UPDATE fact_events SET item = 'b' WHERE occurred_at = '2025-11-13 06:10Z'",
            "UPDATE fact_events SET occurred_at = '1999-12-31 23:00Z' WHERE occurred_at = '2025-11-13 06:14Z'",
            "DELETE FROM fact_events WHERE occurred_at = '2025-11-13 06:12Z'",
        ):
            with psycopg.connect(elsewhere) as open_one:
                open_one.execute(INSERT.format(20))
                there.execute(change)
                assert differences(there) != []
                ticks(elsewhere)
                assert differences(there) == []
            ticks(elsewhere)
            assert differences(there) == []
        there.execute("TRUNCATE fact_events")
        ticks(elsewhere)
        assert there.execute("SELECT count(*) FROM agg_1h").fetchone() == (0,)
