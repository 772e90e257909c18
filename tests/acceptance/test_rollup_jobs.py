"""A backlog worked off several chunks at a time: exact, also after a crash, between hosts, and short of sessions."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from rollup_source import CONFIGURATION, GRAINS, create_source, differences
from support import Command, wait_for

pytestmark = pytest.mark.any_user

ROWS = 100_000
HISTORY = f"""
INSERT INTO fact_events (owner, occurred_at, event_type, item, value, weight)
SELECT -1, timestamptz '2025-11-13Z' - i * interval '20 s', (ARRAY['view', 'buy', NULL])[i % 3 + 1], 'a', i % 97, i
FROM generate_series(1, {ROWS}) AS i
"""
SHORT_HISTORY = HISTORY.replace(str(ROWS), "5000")
CONNECTIONS = 8
AT_WORK = (
    "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'batchctl' AND datname = current_database() "
    "AND state = 'active'"
)


@pytest.fixture
def hosts(tmp_path, database_url):
    with psycopg.connect(database_url, autocommit=True) as connection:
        create_source(connection)
        connection.execute(HISTORY)
    made = [Command(tmp_path / name, database_url) for name in ("one", "two")]
    for host in made:
        host.directory.mkdir()
        host.configure(CONFIGURATION)
    made[0]("migrate")
    return made


def finished(host):
    """Call until nobody else is in the way; a session of a call that was killed may be for a while."""

    def call():
        grains = host.json("aggregate", "--jobs", "3", code=None)["rollups"]
        return grains if all(grain["outcome"] in ("success", "empty") for grain in grains) else None

    grains = wait_for(call, what="a call that nobody is in the way of")
    assert [grain["remaining_buckets"] for grain in grains] == [0] * len(GRAINS)


def test_several_sessions_at_a_time_come_to_what_group_by_says(hosts, database_url):
    with closing(psycopg.connect(database_url, autocommit=True)) as connection:
        process = hosts[0].start("aggregate", "--jobs", "3", "--json")
        most = 0
        while process.poll() is None:
            most = max(most, connection.execute(AT_WORK).fetchone()[0])
        stdout, stderr = process.communicate()
        assert process.returncode == 0, (stdout, stderr)
        # Otherwise nothing was tested.
        assert most > 1
        assert differences(connection) == []
        finished(hosts[0])
        # The control: what compares sees one event too many.
        connection.execute("UPDATE agg_1m SET events = events + 1 WHERE ctid = (SELECT min(ctid) FROM agg_1m)")
        assert len(differences(connection)) == 2


def test_a_changed_rollup_is_built_anew_by_several_sessions(hosts, database_url):
    finished(hosts[0])
    changed = CONFIGURATION.replace('weight_max = "max(weight)"', 'weight_max = "max(-weight)"')
    assert changed != CONFIGURATION
    hosts[0].configure(changed)
    with closing(psycopg.connect(database_url, autocommit=True)) as connection:
        process = hosts[0].start("migrate", "--jobs", "3")
        most = 0
        while process.poll() is None:
            most = max(most, connection.execute(AT_WORK).fetchone()[0])
        assert process.returncode == 0, process.communicate()
        process.communicate()
        assert most > 1
        finished(hosts[0])
        connection.execute("UPDATE fact_events SET weight = -weight")
        for grain in GRAINS:
            # What is compared knows the measure as it was.
            connection.execute(f"UPDATE agg_{grain} SET weight_sum = -weight_sum")
        assert differences(connection) == []


def test_a_call_killed_in_the_middle_is_made_good_by_the_next(hosts, database_url):
    with closing(psycopg.connect(database_url, autocommit=True)) as connection:
        process = hosts[0].start("aggregate", "--jobs", "3")
        wait_for(lambda: connection.execute("SELECT count(*) FROM agg_1m").fetchone()[0], what="a chunk")
        process.kill()
        process.communicate()
        # Otherwise it was not in the middle.
        assert differences(connection) != []
        finished(hosts[0])
        assert differences(connection) == []


def test_two_hosts_at_once_keep_out_of_each_others_way(hosts, database_url):
    def call(host):
        process = host.start("aggregate", "--jobs", "2")
        stdout, stderr = process.communicate(timeout=60)
        assert "Traceback" not in stderr
        assert "ERROR" not in stderr, (stdout, stderr)
        return process.returncode

    with ThreadPoolExecutor(2) as pool:
        codes = list(pool.map(call, hosts))
    assert set(codes) <= {0, 75}
    assert 0 in codes
    finished(hosts[1])
    with closing(psycopg.connect(database_url)) as connection:
        assert differences(connection) == []


def test_where_the_server_has_few_sessions_left_fewer_work(tmp_path, own_server):
    url = make_conninfo(**own_server.connection_parameters())
    with psycopg.connect(url, autocommit=True) as connection:
        create_source(connection)
        for setting in (f"max_connections = {CONNECTIONS}", "superuser_reserved_connections = 0"):
            connection.execute(f"ALTER SYSTEM SET {setting}")
    host = Command(tmp_path, url)
    host.configure(CONFIGURATION)
    host("migrate")
    own_server.stop()
    own_server.start()
    with ExitStack() as stack:
        taken = [stack.enter_context(psycopg.connect(url, autocommit=True)) for _ in range(CONNECTIONS - 3)]
        taken[0].execute("SET search_path = public")
        # Who called is one of them, and hands out the work of the others, if there are others.
        for left, workers in ((3, 2), (2, 1), (1, 1)):
            taken[0].execute(SHORT_HISTORY)
            assert host("aggregate", "--jobs", "4").stderr == ""
            assert f"{workers} of 4 sessions are at work" in host.log.splitlines()[0], left
            assert "too many clients" in host.log
            assert differences(taken[0]) == []
            for log in (tmp_path / "state" / "log").glob("*.log"):
                log.unlink()
            taken.append(stack.enter_context(psycopg.connect(url)))
