"""A run that did not succeed goes on: what is done stays done, what is left is run, under the same id."""

from __future__ import annotations

import json
import os
import signal

import psycopg
import pytest
from support import batch, gone, wait_for

pytestmark = pytest.mark.any_user

MARK = "echo $BATCHCTL_ACCOUNT.$BATCHCTL_STEP.$BATCHCTL_ATTEMPT.$BATCHCTL_RUN_ID >> ran; "


def ran(batchctl):
    """List what ran since the last call: account.step.attempt."""
    path = batchctl.directory / "ran"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return [line.rpartition(".")[0] for line in lines]


def outcomes(result):
    return [(step["account"], step["step"], step["outcome"], step["attempts"]) for step in result["steps"]]


def test_a_run_goes_on_at_the_step_that_failed(batchctl):
    steps = [("31", MARK), ("32", MARK + "test -e repaired"), ("33", MARK)]
    batchctl.configure(batch(steps, 'accounts = ["a", "b"]\non_failure = "stop"\nmax_parallel = 1'))
    failed = batchctl.json("run-batch", code=1)
    assert ran(batchctl) == ["a.31.1", "a.32.1"]
    assert [outcome for _, _, outcome, _ in outcomes(failed)] == ["success", "failed", *["not_run"] * 4]

    left = batchctl.json("run-batch", "--resume", "--dry-run")
    assert left["run_id"] == failed["run_id"]
    assert [step["account"] + step["step"] for step in left["steps"]] == ["a32", "a33", "b31", "b32", "b33"]
    assert ran(batchctl) == []

    (batchctl.directory / "repaired").touch()
    # A new run has to wait for the gap; the one that goes on has not.
    assert batchctl.json("run-batch", code=75)["reason"] == "gap"
    resumed = batchctl.json("run-batch", "--resume")
    assert (resumed["run_id"], resumed["outcome"]) == (failed["run_id"], "success")
    assert resumed["started_at"] == failed["started_at"]
    assert resumed["finished_at"] > failed["finished_at"]
    assert ran(batchctl) == ["a.32.2", "a.33.1", "b.31.1", "b.32.1", "b.33.1"]
    assert outcomes(resumed) == [
        ("a", "31", "success", 1),
        ("a", "32", "success", 2),
        ("a", "33", "success", 1),
        ("b", "31", "success", 1),
        ("b", "32", "success", 1),
        ("b", "33", "success", 1),
    ]
    runs = [entry for entry in batchctl.json("history")["entries"] if entry["kind"] == "run"]
    assert [(run["run_id"], run["outcome"]) for run in runs] == [(failed["run_id"], "success")]
    # The completion is the new one.
    refused = batchctl.json("run-batch", code=75)
    assert (refused["reason"], refused["next_eligible_at"]) == ("gap", resumed["next_eligible_at"])
    with psycopg.connect(batchctl.url) as connection:
        rows = connection.execute(
            "SELECT attempt, outcome FROM batchctl.step_run WHERE account = 'a' AND step = '32' ORDER BY attempt"
        ).fetchall()
    assert rows == [(1, "failed"), (2, "success")]
    done = batchctl("run-batch", "--resume", code=2)
    assert done.stderr.startswith("batchctl: nothing to resume: "), "as other wrong usage is said"
    assert "nothing to resume" not in batchctl.log


def test_what_succeeded_after_the_failure_is_not_done_again(batchctl):
    batchctl.configure(batch([("31", MARK + "exit 3"), ("32", MARK)]))
    batchctl("run-batch", code=3)
    ran(batchctl)
    assert batchctl.json("run-batch", "--resume", code=3)["outcome"] == "partial"
    assert ran(batchctl) == ["default.31.2"]
    # Again, and the attempts go on counting.
    batchctl("run-batch", "--resume", code=3)
    assert ran(batchctl) == ["default.31.3"]


def test_a_killed_run_goes_on(batchctl):
    batchctl.configure(batch([("31", MARK), ("32", MARK + "test -e go_on || exec sleep 60")]))
    process = batchctl.start("run-batch", "--json")
    wait_for((batchctl.directory / "ran").exists, what="the first step")
    with psycopg.connect(batchctl.url) as connection:
        pid = wait_for(
            lambda: connection.execute("SELECT pid FROM batchctl.step_run WHERE step = '32'").fetchone(), what="its row"
        )[0]
    process.kill()
    process.communicate()
    ran(batchctl)
    assert batchctl.json("run-batch", "--resume", code=75)["reason"] == "orphans"
    os.killpg(pid, signal.SIGKILL)
    wait_for(lambda: gone(pid))
    (batchctl.directory / "go_on").touch()
    resumed = batchctl.json("run-batch", "--resume")
    assert resumed["outcome"] == "success"
    assert ran(batchctl) == ["default.32.2"]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ([("31", MARK + "true"), ("32", MARK)], "step 31 of account default has another command, env or quantity"),
        ([("31", MARK, "quantity = 7"), ("32", MARK)], "step 31 of account default has another"),
        ([("31", MARK, 'env = { A = "b" }'), ("32", MARK)], "step 31 of account default has another"),
        ([("32", MARK)], "step 31 of account default is gone"),
    ],
)
def test_a_finished_step_that_is_configured_differently_now_is_named(batchctl, changed, told):
    batchctl.configure(batch([("31", MARK), ("32", MARK + "exit 1")]))
    batchctl("run-batch", code=3)
    ran(batchctl)
    batchctl.configure(batch(changed))
    done = batchctl("run-batch", "--resume", code=78)
    assert told in done.stderr
    assert done.stderr.count("\n") == 1
    assert ran(batchctl) == []
    # Nothing was claimed: an ordinary start is refused by the gap alone.
    assert batchctl.json("run-batch", code=75)["reason"] == "gap"


def test_a_step_that_is_not_done_may_change_and_steps_may_be_added(batchctl):
    batchctl.configure(batch([("31", MARK, 'timeout = "1h"'), ("32", MARK + "exit 1")]))
    batchctl("run-batch", code=3)
    ran(batchctl)
    batchctl.configure(batch([("31", MARK, 'timeout = "2h"', "retries = 1"), ("32", MARK), ("33", MARK)]))
    assert batchctl.json("run-batch", "--resume")["outcome"] == "success"
    assert ran(batchctl) == ["default.32.2", "default.33.1"]


def test_a_narrowed_run_stays_narrowed(batchctl):
    steps = [("31", MARK + "test -e repaired"), ("32", MARK), ("33", MARK)]
    batchctl.configure(batch(steps, 'accounts = ["a", "b", "c"]'))
    batchctl("run-batch", "--account", "b", "--step", "31", "--step", "33", code=3)
    assert ran(batchctl) == ["b.31.1", "b.33.1"]
    (batchctl.directory / "repaired").touch()
    batchctl("run-batch", "--resume")
    assert ran(batchctl) == ["b.31.2"]


def test_which_run_is_meant(batchctl):
    """The latest without success that no later success has made up for; a group's own with --group; the named one."""
    text = batch(
        [("31", MARK + "test -e repaired", 'group = "search"'), ("61", MARK + "test -e repaired", 'group = "upload"')]
    )
    batchctl.configure(text)
    whole = batchctl.json("run-batch", code=1)["run_id"]
    search = batchctl.json("run-batch", "--group", "search", "--force-gap", code=1)["run_id"]
    upload = batchctl.json("run-batch", "--group", "upload", "--force-gap", code=1)["run_id"]
    ran(batchctl)

    def left(*options):
        return batchctl.json("run-batch", "--resume", "--dry-run", *options)["run_id"]

    assert left() == upload
    assert left("--group", "search") == search
    assert left("--run", whole) == whole
    (batchctl.directory / "repaired").touch()
    assert batchctl.json("run-batch", "--resume")["run_id"] == upload
    # The success of one group has not made up for the other, nor for the whole.
    assert left() == search
    batchctl("run-batch", "--force-gap")
    done = batchctl("run-batch", "--resume", code=2)
    assert "has no run left to continue" in done.stderr
    assert left("--run", whole) == whole


def test_wrong_wishes(batchctl):
    batchctl.configure(batch([("31", "true", 'group = "search"')]))
    for arguments, told in (
        (["--resume"], "has no run"),
        (["--resume", "--run", "nosuch"], "no run nosuch"),
        (["--run", "x"], "--run RUN goes with --resume"),
        (["--resume", "--step", "31"], "leave out --account and --step"),
        (["--resume", "--group", "nosuch"], "--group nosuch"),
    ):
        done = batchctl("run-batch", *arguments, code=2)
        assert told in done.stderr
    batchctl("run-batch")
    run_id = batchctl.json("history")["entries"][0]["run_id"]
    assert f"run {run_id} succeeded" in batchctl("run-batch", "--resume", "--run", run_id, code=2).stderr


def test_every_counts_from_the_first_start_of_a_run_that_died_and_went_on(batchctl):
    steps = [("31", "echo $$ > step.pid; test -e again || exec sleep 60")]
    batchctl.configure(batch(steps, 'min_gap = "0s"\nevery = "48h"'))
    process = batchctl.start("run-batch")
    pid = batchctl.pid()
    with psycopg.connect(batchctl.url) as connection:
        wait_for(lambda: connection.execute("SELECT FROM batchctl.step_run").fetchone() is not None)
    process.kill()
    process.communicate()
    os.killpg(pid, signal.SIGKILL)
    wait_for(lambda: gone(pid))
    (batchctl.directory / "again").touch()
    assert batchctl.json("run-batch", "--resume")["outcome"] == "success"
    assert batchctl.json("run-batch", code=75)["reason"] == "not_due"


def test_the_guards_hold_for_a_run_that_goes_on(batchctl):
    steps = [("31", "touch first; test -e repaired || exit 1; while ! test -e go; do sleep 0.05; done")]
    batchctl.configure(batch(steps))
    batchctl("run-batch", code=1)
    batchctl.configure(batch(steps, "enabled = false"))
    assert batchctl.json("run-batch", "--resume", code=75)["reason"] == "disabled"
    batchctl.configure(batch(steps))
    (batchctl.directory / "repaired").touch()
    (batchctl.directory / "first").unlink()
    process = batchctl.start("run-batch", "--resume", "--json")
    wait_for((batchctl.directory / "first").exists)
    for options in ([], ["--resume"]):
        assert batchctl.json("run-batch", *options, code=75)["reason"] == "running"
    (batchctl.directory / "go").touch()
    stdout, _ = process.communicate(timeout=30)
    assert json.loads(stdout)["outcome"] == "success"


def test_the_estimate_ignores_a_run_that_was_continued(batchctl):
    batchctl.configure(batch([("31", "test -e repaired")], 'timeout = "7h"'))
    batchctl("run-batch", code=1)
    (batchctl.directory / "repaired").touch()
    batchctl("run-batch", "--resume")
    assert batchctl.json("status")["jobs"][0]["estimate_seconds"] == 7 * 3600
