"""orphans and recover: what is left when batchctl, its steps, its database or its host died."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest
from support import NOWHERE, batch, gone, skip_or_fail, wait_for

WAITING = "echo $$ >step.pid; exec sleep 300"


@pytest.fixture
def died(batchctl):
    """A run whose batchctl was killed and whose step goes on; its id and the step's process id."""
    batchctl.configure(batch([("31", WAITING)], 'grace = "1s"\nleftovers = "ignore"'))
    yield lambda: die(batchctl)
    path = batchctl.directory / "step.pid"
    if path.exists() and not gone(int(path.read_text())):
        os.kill(int(path.read_text()), signal.SIGKILL)


def die(batchctl, line="run-batch"):
    process = batchctl.start(line)
    pid = batchctl.pid()
    with psycopg.connect(batchctl.url, autocommit=True) as connection:
        recorded = "SELECT count(*) FROM batchctl.step_run WHERE pid IS NOT NULL AND finished_at IS NULL"
        wait_for(lambda: connection.execute(recorded).fetchone()[0])
        run_id = connection.execute("SELECT run_id FROM batchctl.run WHERE outcome IS NULL").fetchone()[0]
    process.kill()
    process.communicate()
    return run_id, pid


def outcome(batchctl, run_id):
    with psycopg.connect(batchctl.url) as connection:
        return connection.execute("SELECT outcome FROM batchctl.run WHERE run_id = %s", [run_id]).fetchone()[0]


def test_orphans_lists_and_kills_and_recover_closes(batchctl, died):
    assert batchctl("orphans").stdout == "No orphans.\n"
    run_id, pid = died()
    (orphan,) = batchctl.json("orphans")["orphans"]
    assert orphan.pop("since")
    assert orphan == {
        "batch": "daily", "run_id": run_id, "account": "default", "step": "31", "pid": pid, "command": "sleep",
        "run_ended": False, "killed": None, "user": getpass.getuser(),
    }  # fmt: skip
    assert f"{pid}" in batchctl("orphans").stdout
    assert not gone(pid), "looking must not kill"
    refused = batchctl("recover", code=1)
    assert f"pid {pid}" in refused.stderr
    assert "batchctl orphans --kill" in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert "is alive" in batchctl("recover", run_id, "--force", code=1).stderr
    assert outcome(batchctl, run_id) is None
    (orphan,) = batchctl.json("orphans", "--kill")["orphans"]
    assert (orphan["pid"], orphan["killed"]) == (pid, True)
    assert gone(pid)
    done = batchctl("recover")
    assert (done.stdout, done.stderr) == ("", "")
    assert outcome(batchctl, run_id) == "crashed"
    assert f"Run {run_id} died without an end; it is closed as crashed" in batchctl.log
    assert "has ended: crashed" in batchctl("recover", run_id, "-v").stdout
    assert batchctl("recover", "-v").stdout == "Nothing to close.\n"
    batchctl.configure(batch([("31", "true")]))
    assert batchctl.json("run-batch")["outcome"] == "success"
    with psycopg.connect(batchctl.url) as connection:
        assert connection.execute("SELECT outcome FROM batchctl.step_run WHERE run_id = %s", [run_id]).fetchall() == [
            ("crashed",)
        ]


def test_all_of_it_without_the_database(batchctl, died):
    _, pid = died()
    url, batchctl.url = batchctl.url, NOWHERE
    batchctl.configure(batch([("31", WAITING)], 'grace = "1s"'))
    done = batchctl("orphans", "--kill")
    assert "cannot be reached" in done.stderr
    assert done.stderr.count("\n") == 1
    assert "ended" in done.stdout
    assert gone(pid)
    batchctl("recover", code=69)
    batchctl.url = url


def test_a_stubborn_tree_is_ended_hard_and_a_polite_one_is_asked(batchctl, died):
    line = (
        "trap 'echo bye >bye' TERM; "
        "(setsid env -i sh -c 'trap \"\" TERM; echo $$ >away; while :; do sleep 0.1; done' &);"
        "echo $$ >step.pid; while :; do sleep 0.1; done"
    )
    batchctl.configure(batch([("31", line)], 'grace = "3s"'))
    _, pid = died()
    away = batchctl.pid("away")
    ended = batchctl.json("orphans", "--kill")["orphans"]
    assert {pid, away} <= {orphan["pid"] for orphan in ended}
    assert all(orphan["killed"] for orphan in ended)
    assert gone(pid)
    assert gone(away)
    assert (batchctl.directory / "bye").exists()


def test_a_run_that_lives_is_no_orphan_and_never_touched(batchctl):
    batchctl.configure(batch([("31", WAITING)]))
    process = batchctl.start("run-batch")
    pid = batchctl.pid()
    with psycopg.connect(batchctl.url, autocommit=True) as connection:
        run_id = connection.execute("SELECT run_id FROM batchctl.run").fetchone()[0]
    assert batchctl.json("orphans", "--kill")["orphans"] == []
    refused = batchctl("recover", run_id, "--force", code=1)
    assert f"pid {process.pid} on " in refused.stderr
    assert "lock of the batch is held" in batchctl("recover", "-v").stdout
    # Not even if somebody removes the lock of the batch, or the record.
    (batchctl.directory / "state" / "lock" / "batch.daily.lock").unlink()
    assert "its batchctl is alive" in batchctl("recover", run_id, "--force", code=1).stderr
    url, batchctl.url = batchctl.url, NOWHERE
    batchctl.configure(batch([("31", WAITING)]))
    assert batchctl("orphans", "--kill").stdout == "No orphans.\n"
    batchctl.url = url
    batchctl.configure(batch([("31", WAITING)]))
    assert batchctl.json("run-batch", code=75)["reason"] == "running"
    assert (process.poll(), gone(pid), outcome(batchctl, run_id)) == (None, False, None)
    process.terminate()
    process.communicate(timeout=60)


def test_what_a_finished_run_left_on_purpose_is_told_apart(batchctl):
    batchctl.configure(
        batch([("31", "setsid sleep 300 & echo $! >agent")], 'leftovers = "ignore"\nmin_gap = "0s"\ngrace = "1s"')
    )
    batchctl("run-batch")
    pid = int((batchctl.directory / "agent").read_text())
    (orphan,) = batchctl.json("orphans")["orphans"]
    assert (orphan["pid"], orphan["run_ended"]) == (pid, True)
    (orphan,) = batchctl.json("orphans", "--kill")["orphans"]
    assert orphan["killed"]
    assert gone(pid)


def test_what_a_run_left_that_another_host_closed_is_never_ignored(batchctl, died, tmp_path_factory):
    run_id, pid = died()
    with psycopg.connect(batchctl.url) as connection:
        connection.execute("UPDATE batchctl.run SET claimed_until = now() - interval '1s'")
    other = replace(batchctl, directory=tmp_path_factory.mktemp("other"))
    other.configure(batch([("31", "true")], 'min_gap = "0s"'))
    assert other.json("run-batch")["outcome"] == "success"
    assert outcome(batchctl, run_id) == "crashed"
    skipped = batchctl.json("run-batch", "--force-gap", code=75)
    assert skipped["reason"] == "orphans"
    assert [(orphan["pid"], orphan["run_ended"]) for orphan in skipped["orphans"]] == [(pid, False)]


@pytest.mark.any_user
def test_a_run_of_a_host_that_is_gone(batchctl, died, tmp_path_factory):
    run_id, pid = died()
    other = replace(batchctl, directory=tmp_path_factory.mktemp("other"))
    other.configure(batch([("31", "true")]))
    # Both state directories are on this machine, so what is left can be seen from both.
    assert f"pid {pid}" in other("recover", run_id, "--force", code=1).stderr
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: gone(pid))
    refused = other("recover", run_id, code=1)
    assert "may be at work until" in refused.stderr
    assert f"batchctl recover {run_id} --force" in refused.stderr
    assert "may be at work until" in other("recover", "-v").stdout
    assert other.json("run-batch", code=75)["reason"] == "running_elsewhere"
    assert "needs the RUN" in other("recover", "--force", code=2).stderr
    assert outcome(other, run_id) is None
    other("recover", run_id, "--force")
    assert outcome(other, run_id) == "crashed"
    assert other.json("run-batch")["outcome"] == "success"


@pytest.mark.any_user
def test_a_claim_that_is_over_needs_no_force(batchctl, died, tmp_path_factory):
    run_id, pid = died()
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: gone(pid))
    with psycopg.connect(batchctl.url) as connection:
        connection.execute("UPDATE batchctl.run SET claimed_until = now() - interval '1s'")
    other = replace(batchctl, directory=tmp_path_factory.mktemp("other"))
    other.configure(batch([("31", "true")]))
    assert "Closed" in other("recover", "-v").stdout
    assert outcome(other, run_id) == "crashed"


@pytest.mark.any_user
def test_an_unknown_run_and_one_that_ended(batchctl):
    batchctl.configure(batch([("31", "true")]))
    run_id = batchctl.json("run-batch")["run_id"]
    assert "no such run" in batchctl("recover", "20240101T010000Z-000000", code=2).stderr
    assert "has ended at" in batchctl("recover", run_id, "-v").stdout
    assert outcome(batchctl, run_id) == "success"


@pytest.mark.any_user
def test_the_end_that_waits_in_the_journal_is_not_a_crash(batchctl):
    """The database is away when the run ends; recover records the journal first."""
    batchctl.configure(batch([("31", "while ! test -e go; do sleep 0.05; done")]))
    process = batchctl.start("run-batch", "--json")
    with psycopg.connect(batchctl.url, autocommit=True) as connection:
        table = "SELECT to_regclass('batchctl.step_run') IS NOT NULL"
        wait_for(lambda: connection.execute(table).fetchone()[0])
        wait_for(lambda: connection.execute("SELECT count(*) FROM batchctl.step_run").fetchone()[0])
        run_id = connection.execute("SELECT run_id FROM batchctl.run").fetchone()[0]
        connection.execute("ALTER TABLE batchctl.run RENAME TO away")
        (batchctl.directory / "go").touch()
        process.communicate(timeout=60)
        connection.execute("ALTER TABLE batchctl.away RENAME TO run")
    assert outcome(batchctl, run_id) is None, "the control: the end is only in the journal"
    assert "success" in batchctl("recover", run_id, "-v").stdout
    assert outcome(batchctl, run_id) == "success"


@pytest.fixture
def shared(batchctl):
    """The program in a directory that other users can reach."""
    directory = Path(tempfile.mkdtemp())
    directory.chmod(0o755)
    yield replace(batchctl, directory=directory)
    started = directory / "step.pid"
    if started.exists() and not gone(int(started.read_text())):
        os.kill(int(started.read_text()), signal.SIGKILL)
    shutil.rmtree(directory)


def test_what_another_user_may_not_end_is_named(shared):
    """The orphan is root's, the state directory that of somebody else who looks into it."""
    if os.geteuid() != 0 or not shutil.which("setpriv"):
        pytest.skip("needs two users and setpriv")
    shared.configure(batch([("31", WAITING)]))
    _, pid = die(shared)
    shared.url = NOWHERE
    shared.configure(batch([("31", WAITING)], 'grace = "1s"'))
    state = shared.directory / "state"
    for path in (state, *state.rglob("*")):
        os.chown(path, 65534, 65534)
    command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable, "-m", "batchctl"]
    done = subprocess.run(
        [*command, "--config", str(shared.config), "orphans", "--kill", "--json"],
        capture_output=True, text=True, check=False, cwd="/", env={"PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    if "Permission denied" in done.stderr or "No module" in done.stderr:
        skip_or_fail("another user cannot read this Python or its packages")
    assert done.returncode == 1, done
    assert "could not be ended" in done.stderr
    (orphan,) = json.loads(done.stdout)["orphans"]
    # By its lock alone: neither its environment nor its descriptors are shown to another user.
    assert (orphan["step"], orphan["pid"], orphan["killed"]) == ("31", None, False)
    assert not gone(pid)
