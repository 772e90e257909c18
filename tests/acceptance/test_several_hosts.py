"""Two state directories on one database: what a claim promises, with and without a lease, and who ends what."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from datetime import timedelta

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from support import Command, batch, gone, wait_for

from batchctl.clock import SystemClock
from batchctl.state.database import Database
from batchctl.state.journal import Journal

pytestmark = pytest.mark.any_user

# The program with a heart that beats faster, so that a lease of five minutes is one of seconds.
FAST_HEART = """
from datetime import timedelta
from batchctl.batch import heartbeat
heartbeat.LOOK_SECONDS, heartbeat.BEAT_SECONDS = 0.2, 0.5
heartbeat.LEASE, heartbeat.LEASE_MARGIN_SECONDS = timedelta(seconds=12), 4
from batchctl.cli.app import main
main()
"""
WAITS = "touch started-$BATCHCTL_STEP; while ! test -e go_on; do sleep 0.05; done"


def fast(command):
    return replace(command, program=(sys.executable, "-c", FAST_HEART))


def started(command, step="31"):
    wait_for((command.directory / f"started-{step}").exists)
    with psycopg.connect(command.url) as connection:
        return wait_for(
            lambda: connection.execute(
                "SELECT pid FROM batchctl.step_run WHERE step = %s ORDER BY started_at DESC", [step]
            ).fetchone(),
            what="its record",
        )[0]


def execute(url, statement):
    with psycopg.connect(url) as connection:
        return connection.execute(statement).fetchall()


@pytest.fixture
def other(batchctl, tmp_path_factory):
    return replace(batchctl, directory=tmp_path_factory.mktemp("other"))


def test_a_lease_is_prolonged_by_the_heartbeat(batchctl, other):
    for host in (batchctl, other):
        host.configure(batch([("31", WAITS)], 'on_lost_database = "stop"\ngrace = "1s"'))
    process = fast(batchctl).start("run-batch", "--json")
    started(batchctl)
    first, beat = execute(batchctl.url, "SELECT claimed_until, heartbeat_at FROM batchctl.run")[0]
    assert (first - beat).total_seconds() <= 12
    wait_for(lambda: execute(batchctl.url, "SELECT now() > started_at + interval '13s' FROM batchctl.run")[0][0])
    assert other.json("run-batch", code=75)["reason"] == "running_elsewhere"
    assert execute(batchctl.url, "SELECT claimed_until FROM batchctl.run")[0][0] > first
    (batchctl.directory / "go_on").touch()
    stdout, _ = process.communicate(timeout=60)
    assert json.loads(stdout)["outcome"] == "success"


def test_a_run_with_a_lease_ends_itself_when_the_database_is_lost(own_server, tmp_path):
    """And it is over before the lease is: another host that starts then finds nothing of it alive."""
    batchctl = Command(tmp_path / "home", make_conninfo(**own_server.connection_parameters()))
    batchctl.directory.mkdir()
    batchctl.configure(batch([("31", WAITS), ("32", "true")], 'on_lost_database = "stop"\ngrace = "1s"'))
    process = fast(batchctl).start("run-batch", "--json")
    pid = started(batchctl)
    own_server.stop()
    stdout, _ = process.communicate(timeout=60)
    result = json.loads(stdout)
    assert (process.returncode, result["outcome"]) == (143, "stopped")
    assert 'on_lost_database = "stop"' in result["reason"]
    assert [step["outcome"] for step in result["steps"]] == ["stopped", "not_run"]
    assert result["duration_seconds"] < 12
    assert gone(pid)
    own_server.start()
    assert batchctl.json("history")["entries"][0]["outcome"] == "stopped"


def test_another_host_starts_once_the_lease_of_a_dead_one_is_over(batchctl, other):
    for host in (batchctl, other):
        host.configure(batch([("31", WAITS)], 'on_lost_database = "stop"\ngrace = "1s"'))
    process = fast(batchctl).start("run-batch")
    started(batchctl)
    process.kill()
    process.communicate()
    (other.directory / "go_on").touch()
    assert fast(other).json("run-batch", code=75)["reason"] == "running_elsewhere"
    wait_for(lambda: execute(batchctl.url, "SELECT clock_timestamp() > claimed_until FROM batchctl.run")[0][0])
    assert fast(other).json("run-batch")["outcome"] == "success"
    outcomes = [entry["outcome"] for entry in other.json("history")["entries"] if entry["kind"] == "run"]
    assert outcomes == ["success", "crashed"]
    # What the dead one left on its own host still stands in the way there, and there alone.
    assert batchctl.json("run-batch", "--force-gap", code=75)["reason"] == "orphans"
    (batchctl.directory / "go_on").touch()


def test_a_claim_that_lasts_as_long_as_the_run_may(batchctl, other):
    for host in (batchctl, other):
        host.configure(batch([("31", WAITS)], 'timeout = "1h"\ngrace = "10s"'))
    process = batchctl.start("run-batch")
    started(batchctl)
    lasts = execute(batchctl.url, "SELECT extract(epoch FROM claimed_until - started_at)::int FROM batchctl.run")
    assert lasts == [(3600 + 10 + 60,)]
    process.kill()
    process.communicate()
    assert other.json("run-batch", code=75)["reason"] == "running_elsewhere"
    (batchctl.directory / "go_on").touch()


@pytest.mark.parametrize("policy", ["continue", "stop"])
def test_a_run_whose_claim_was_closed_ends_itself(batchctl, policy):
    batchctl.configure(batch([("31", WAITS), ("32", "true")], f'on_lost_database = "{policy}"\ngrace = "1s"'))
    process = fast(batchctl).start("run-batch", "--json")
    pid = started(batchctl)
    with psycopg.connect(batchctl.url) as connection:
        connection.execute("UPDATE batchctl.run SET outcome = 'crashed'")
    stdout, _ = process.communicate(timeout=60)
    result = json.loads(stdout)
    assert (process.returncode, result["outcome"]) == (143, "stopped")
    assert "closed or taken over" in result["reason"]
    assert gone(pid)


def test_a_standby_that_never_received_the_claim_is_told_of_the_run(batchctl):
    batchctl.configure(batch([("31", WAITS), ("32", "true")]))
    process = fast(batchctl).start("run-batch", "--json")
    started(batchctl)
    with psycopg.connect(batchctl.url) as connection:
        connection.execute("DELETE FROM batchctl.run")
        connection.execute("DELETE FROM batchctl.state")
    wait_for(lambda: execute(batchctl.url, "SELECT 1 FROM batchctl.run"), what="the claim")
    assert batchctl.json("run-batch", code=75)["reason"] == "running"
    (batchctl.directory / "go_on").touch()
    stdout, _ = process.communicate(timeout=60)
    assert json.loads(stdout)["outcome"] == "success"
    runs = [entry for entry in batchctl.json("history")["entries"] if entry["kind"] == "run"]
    assert [(run["outcome"], run["run_id"]) for run in runs] == [("success", json.loads(stdout)["run_id"])]
    assert batchctl.json("run-batch", code=75)["reason"] == "gap"


def test_a_standby_on_which_another_host_has_begun_ends_the_run(batchctl, other):
    """It lost the claim, so another host could start: the first one notices and gives way."""
    for host in (batchctl, other):
        host.configure(batch([("31", WAITS)], 'grace = "1s"'))
    process = fast(batchctl).start("run-batch", "--json")
    started(batchctl)
    # As one transaction, so that no heartbeat comes between: the claim is gone and another's is there.
    with psycopg.connect(batchctl.url) as connection:
        connection.execute("DELETE FROM batchctl.step_run")
        connection.execute("UPDATE batchctl.run SET run_id = 'other', host = 'other'")
    stdout, _ = process.communicate(timeout=60)
    assert json.loads(stdout)["outcome"] == "stopped"
    assert other.json("run-batch", code=75)["reason"] == "running_elsewhere"
    # Its end is recorded all the same, and counts.
    ended = execute(batchctl.url, "SELECT run_id, outcome FROM batchctl.run WHERE outcome IS NOT NULL")
    assert ended == [(json.loads(stdout)["run_id"], "stopped")]
    assert execute(batchctl.url, "SELECT last_completed_at IS NOT NULL, last_outcome FROM batchctl.state") == [
        (True, "stopped")
    ]


def test_a_standby_that_missed_that_a_run_goes_on_is_told_of_it(batchctl):
    batchctl.configure(batch([("31", f"test -e again && {{ {WAITS}; }} || exit 1"), ("32", "true")]))
    batchctl("run-batch", code=3)
    (batchctl.directory / "again").touch()
    process = fast(batchctl).start("run-batch", "--resume", "--json")
    started(batchctl)
    with psycopg.connect(batchctl.url) as connection:
        connection.execute("UPDATE batchctl.run SET resumed = 0, outcome = 'partial', finished_at = now()")
    wait_for(lambda: execute(batchctl.url, "SELECT outcome IS NULL AND resumed = 1 FROM batchctl.run")[0][0])
    (batchctl.directory / "go_on").touch()
    stdout, _ = process.communicate(timeout=60)
    assert json.loads(stdout)["outcome"] == "success"
    assert execute(batchctl.url, "SELECT outcome, resumed FROM batchctl.run") == [("success", 1)]


def test_a_claim_whose_answer_was_lost_blocks_nobody(batchctl, other):
    for host in (batchctl, other):
        host.configure(batch([("31", "true")]))
    run_id = batchctl.json("run-batch")["run_id"]
    with psycopg.connect(batchctl.url) as connection:
        connection.execute("UPDATE batchctl.run SET outcome = NULL, finished_at = NULL")
        connection.execute("UPDATE batchctl.state SET last_completed_at = NULL")
    assert other.json("run-batch", code=75)["reason"] == "running_elsewhere"
    clock = SystemClock()
    journal = Journal(batchctl.directory / "state", Database(conninfo_to_dict(batchctl.url), "batchctl", clock), clock)
    journal.append("withdraw", {"run_id": run_id, "resumed": 0})
    batchctl("status")
    assert other.json("run-batch")["outcome"] == "success"


@pytest.mark.parametrize("part", ["earlier", "later"])
def test_of_two_parts_of_a_run_the_later_one_counts(batchctl, part):
    """What an earlier part has in its host's journal comes late, and gives way."""
    batchctl.configure(batch([("31", "test -e again")]))
    run_id = batchctl.json("run-batch", code=1)["run_id"]
    with psycopg.connect(batchctl.url) as connection:
        connection.execute("DELETE FROM batchctl.step_run")
    (batchctl.directory / "again").touch()
    assert batchctl.json("run-batch", "--resume")["outcome"] == "success"
    clock = SystemClock()
    journal = Journal(batchctl.directory / "state", Database(conninfo_to_dict(batchctl.url), "batchctl", clock), clock)
    late = {
        "run_id": run_id, "account": "default", "step": "31", "attempt": 1, "group": None, "quantity": 100, "log": "x",
        "outcome": "failed", "reason": None, "exit_code": 1, "signal": None, "duration": timedelta(seconds=1),
        "resumed": 0 if part == "earlier" else 2, "at": "2026-01-01T00:00:00Z",
    }  # fmt: skip
    journal.append("step_finished", late)
    batchctl("status")
    expected = "success" if part == "earlier" else "failed"
    assert execute(batchctl.url, "SELECT outcome FROM batchctl.step_run") == [(expected,)]


def test_a_role_that_only_reads_unless_told_otherwise(batchctl):
    with psycopg.connect(batchctl.url, autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {connection.info.dbname} SET default_transaction_read_only = on")
    batchctl.configure(batch([("31", "true")]))
    assert batchctl.json("run-batch")["outcome"] == "success"
    assert batchctl.json("run-batch", code=75)["reason"] == "gap"
    assert [entry["outcome"] for entry in batchctl.json("history")["entries"]] == ["skipped", "success"]
    assert not list((batchctl.directory / "state").glob("journal/*.jsonl"))


def test_a_long_grace_does_not_fit_a_lease(batchctl):
    batchctl.configure(batch([("31", "true")], 'on_lost_database = "stop"\ngrace = "3m"'))
    done = batchctl("run-batch", code=78)
    assert "batch.daily.grace: found 3m, expected at most 2m" in done.stderr
