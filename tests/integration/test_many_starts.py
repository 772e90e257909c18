"""64 starts at the same instant, from two state directories as two hosts on one database: one of them runs.

pytest tests/integration/test_many_starts.py --start-rounds 500    more than the usual 50 rounds
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest
from support import batch

STARTS = 64
CONTROL_STARTS, CONTROL_ROUNDS = 16, 3

# A crowd on the other kind of server is in acceptance/test_guards.py.
pytestmark = [pytest.mark.crowd, pytest.mark.any_user, pytest.mark.one_server]


@pytest.fixture
def hosts(batchctl):
    """Two state directories on one database whose schema exists; the steps of both write into one directory."""
    step = "echo $PPID >> ../ran; while ! test -e ../over; do sleep 0.01; done"
    hosts = [replace(batchctl, directory=batchctl.directory / name) for name in ("one", "two")]
    for host in hosts:
        host.directory.mkdir()
        host.configure(batch([("31", step)], 'timeout = "5m"'))
        host("status")
    return hosts


def play(hosts, rounds, starts=STARTS, removed="nothing"):
    """Play the rounds in a process of its own, which forks; the environment is cron's."""
    program = Path(__file__).with_name("forked_starts.py")
    configs = [str(host.config) for host in hosts]
    done = subprocess.run(
        [sys.executable, program, str(rounds), str(starts), removed, *configs],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    played = json.loads(done.stdout)
    for round_ in played:
        assert len(round_["results"]) == starts
        assert [result for result in round_["results"] if result["outcome"] == "error"] == []
    return played


def winners(round_):
    return [result for result in round_["results"] if result["outcome"] != "skipped"]


def test_of_64_starts_on_two_hosts_one_runs(hosts, request):
    rounds = request.config.getoption("start_rounds")
    played = play(hosts, rounds)
    reasons = Counter()
    for number, round_ in enumerate(played):
        (winner,) = winners(round_)
        assert winner["outcome"] == "success"
        assert round_["ran"] == [str(winner["pid"])], f"round {number}"
        for result in round_["results"]:
            if result is winner:
                continue
            reasons[result["reason"]] += 1
            if result["host"] == winner["host"]:
                assert (result["reason"], result["holder"]) == ("running", winner["pid"])
            else:
                # On the other host one start after the other gets its lock, and is refused by the table.
                assert result["reason"] in ("running", "running_elsewhere")
                assert result["reason"] == "running" or result["holder"] == winner["pid"]
    assert set(reasons) == {"running", "running_elsewhere"}
    # Every start is recorded, those of which the database was not told in time by the next command.
    for host in hosts:
        host("history")
    with psycopg.connect(hosts[0].url) as connection:
        runs = connection.execute("SELECT outcome, count(*) FROM batchctl.run GROUP BY outcome").fetchall()
        skips = connection.execute("SELECT reason, sum(count) FROM batchctl.skip GROUP BY reason").fetchall()
    assert runs == [("success", rounds)]
    assert sum(count for _, count in skips) == sum(reasons.values())


def test_without_the_file_lock_several_run(hosts):
    """The control: on one host the lock decides, since its holder may close what its host has left unfinished."""
    assert any(len(winners(round_)) > 1 for round_ in play(hosts, CONTROL_ROUNDS, CONTROL_STARTS, "lock"))


def test_without_the_unique_index_and_the_row_lock_both_hosts_run(hosts):
    """The control: between hosts the table decides; to look first and then insert is not enough."""
    with psycopg.connect(hosts[0].url) as connection:
        ((index,),) = connection.execute(
            "SELECT indexrelid::regclass::text FROM pg_index"
            " WHERE indrelid = 'batchctl.run'::regclass AND indisunique AND indpred IS NOT NULL"
        ).fetchall()
        connection.execute(f"DROP INDEX {index}")
    played = play(hosts, CONTROL_ROUNDS, CONTROL_STARTS, "table")
    twice = [winners(round_) for round_ in played if len(winners(round_)) > 1]
    assert twice
    assert {winner["host"] for winner in twice[0]} == {0, 1}
