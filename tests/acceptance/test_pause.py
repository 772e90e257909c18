"""pause and unpause: what was paused does not start until it is unpaused, and everything says so."""

from __future__ import annotations

import os
import pty
import subprocess

import psycopg
import pytest
from support import PROGRAM, ROLLUP, batch, wait_for

pytestmark = pytest.mark.any_user

STEPS = batch(
    [("31", "echo x >>search", 'group = "search"'), ("61", "echo x >>upload", 'group = "upload"')],
    'min_gap = "0s"\nschedule = "0 1 * * *"',
)


@pytest.fixture
def daily(batchctl):
    batchctl.configure(STEPS)
    return batchctl


@pytest.fixture
def trend(batchctl):
    """A rollup with a row that was counted and one that was not."""
    batchctl.configure(ROLLUP)
    with psycopg.connect(batchctl.url) as connection:
        connection.execute("CREATE TABLE fact_events (occurred_at timestamptz)")
        connection.execute("INSERT INTO fact_events VALUES ('2025-11-13 06:51:07Z')")
    batchctl("migrate")
    batchctl("aggregate")
    with psycopg.connect(batchctl.url) as connection:
        connection.execute("INSERT INTO fact_events VALUES ('2025-11-13 06:51:08Z')")
    return batchctl


def refused(batchctl, *arguments):
    """Return how a start is skipped, after checking that it is for a pause."""
    result = batchctl.json("run-batch", *arguments, code=75)
    assert (result["outcome"], result["reason"], result["steps"]) == ("skipped", "paused", [])
    return result["detail"]


def states(batchctl):
    return {job["job"]: (job["state"], job["paused"]) for job in batchctl.json("status")["jobs"]}


def outcomes(batchctl, *arguments, code=0):
    grains = batchctl.json("aggregate", *arguments, code=code)["rollups"]
    return [(grain["grain"], grain["reason"] or grain["outcome"]) for grain in grains]


def test_a_paused_batch_starts_neither_as_a_whole_nor_a_group_of_it(daily):
    daily("pause", "daily")
    message = "Paused: daily, lifted by `batchctl unpause daily`. Skipped."
    for arguments in ([], ["--group", "upload"], ["--step", "31"], ["--force-gap"], ["--account", "default"]):
        assert refused(daily, *arguments) == message
    assert message in daily.log
    entries = daily.json("history")["entries"]
    assert {(entry["kind"], entry["reason"], entry["detail"]) for entry in entries} == {("skip", "paused", message)}
    assert not (daily.directory / "search").exists()
    daily("unpause", "daily")
    assert daily.json("run-batch")["outcome"] == "success"


@pytest.mark.each_server
def test_a_paused_group_keeps_from_starting_whatever_includes_it_and_nothing_else(daily):
    daily("pause", "daily/upload")
    message = "Paused: daily/upload, lifted by `batchctl unpause daily/upload`. Skipped."
    for arguments in ([], ["--group", "upload"], ["--step", "61"], ["--step", "31", "--step", "61"]):
        assert refused(daily, *arguments) == message
    assert daily.json("run-batch", "--group", "search")["outcome"] == "success"
    assert daily.json("run-batch", "--step", "31")["outcome"] == "success"
    assert not (daily.directory / "upload").exists(), "what was paused must never run"
    daily("unpause", "daily/upload")
    assert daily.json("run-batch")["outcome"] == "success"


def test_several_pauses_are_named_and_lifted_together(daily):
    daily("pause", "daily/upload")
    daily("pause", "daily/search")
    assert "daily/search, daily/upload, lifted by `batchctl unpause daily`" in refused(daily)
    done = daily("unpause", "daily", "-v")
    assert done.stdout == "No longer paused: daily/search, daily/upload.\n"
    assert daily.json("run-batch")["outcome"] == "success"


def test_a_group_stays_paused_while_its_batch_is_and_that_is_said(daily):
    daily("pause", "daily")
    daily("pause", "daily/upload")
    done = daily("unpause", "daily/upload")
    assert done.stdout == ""
    assert done.stderr == (
        "batchctl: warning: daily/upload is still paused because of daily, lifted by `batchctl unpause daily`\n"
    )
    assert "daily, lifted" in refused(daily, "--group", "upload")


def test_pausing_twice_is_pausing_once_and_both_are_silent(daily):
    for command in ("pause", "pause", "unpause", "unpause"):
        done = daily(command, "daily")
        assert (done.stdout, done.stderr) == ("", "")
    assert daily("unpause", "daily", "-v").stdout == "daily was not paused.\n"
    assert daily("pause", "daily", "-v").stdout == "daily is paused.\n"
    assert daily("pause", "daily", "-v").stdout == "daily was paused already.\n"
    daily("unpause", "daily")
    assert daily.json("run-batch")["outcome"] == "success"


def test_a_terminal_is_told(daily):
    primary, secondary = pty.openpty()
    arguments = [str(PROGRAM), "--config", str(daily.config), "pause", "daily"]
    subprocess.run(arguments, stdout=secondary, stdin=subprocess.DEVNULL, check=True, cwd=daily.directory)
    os.close(secondary)
    assert os.read(primary, 1000) == b"daily is paused.\r\n"
    os.close(primary)


@pytest.mark.parametrize("command", ["pause", "unpause"])
def test_a_job_that_is_not_configured_is_wrong_usage(batchctl, command):
    batchctl.configure(STEPS + ROLLUP)
    for job in ("nightly", "daily/other", "daily/", "trend/2m"):
        done = batchctl(command, job, code=2)
        assert done.stdout == ""
        known = "daily, daily/search, daily/upload, trend, trend/1m, trend/5m, trend/1h"
        assert done.stderr == f"batchctl: no such job: {job}; configured: {known}\n"
    assert "Missing argument 'JOB'" in batchctl(command, code=2).stderr


def test_a_run_in_progress_goes_on_and_the_next_start_is_refused(daily):
    line = "touch started; while ! test -e go; do sleep 0.05; done"
    daily.configure(batch([("31", line, 'group = "search"'), ("61", "true", 'group = "upload"')], 'min_gap = "0s"'))
    process = daily.start("run-batch")
    wait_for((daily.directory / "started").exists)
    said = daily("pause", "daily", "-v").stdout
    assert f"The run in progress (pid {process.pid} on " in said
    assert said.count("\n") == 2
    assert states(daily)["daily"] == ("running", ["daily"])
    assert "paused" in daily("status").stdout
    (answer,) = [job for job in daily.json("next", "daily")["jobs"] if job["job"] == "daily"]
    assert answer["next_start_at"] is None
    (daily.directory / "go").touch()
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert "daily" in refused(daily)
    assert daily("pause", "daily", "-v").stdout == "daily was paused already.\n", "nothing runs any more"


def test_a_start_that_is_being_decided_is_live_or_refused_once_pause_has_returned(daily):
    """`pause` waits for a claim that holds the batch's row, or it would tell that nothing runs, and then one would."""
    daily("unpause", "daily")
    with psycopg.connect(daily.url) as connection, psycopg.connect(daily.url, autocommit=True) as watching:
        connection.execute("INSERT INTO batchctl.state (job) VALUES ('daily')")
        process = daily.start("pause", "daily/upload")
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        wait_for(lambda: watching.execute(waiting).fetchone()[0])
        assert process.poll() is None
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert "daily/upload" in refused(daily)


def test_status_and_next_show_what_a_pause_covers(batchctl):
    batchctl.configure(STEPS + ROLLUP)
    idle = ("idle", [])
    batchctl("pause", "daily/upload")
    batchctl("pause", "trend")
    assert states(batchctl) == {
        # A start of the whole batch would run the group.
        "daily": ("paused", ["daily/upload"]),
        "daily/search": idle,
        "daily/upload": ("paused", ["daily/upload"]),
        **{f"trend/{grain}": ("paused", ["trend"]) for grain in ("1m", "5m", "1h")},
    }
    assert "paused (daily/upload)" in batchctl("status").stdout
    starts = {job["job"]: job for job in batchctl.json("next")["jobs"]}
    for job, by in (("daily", "daily/upload"), ("trend/1m", "trend")):
        assert starts[job]["next_start_at"] is None
        (guard,) = [guard for guard in starts[job]["guards"] if guard["guard"] == "paused"]
        assert guard == {
            "guard": "paused", "allows": False, "until": None,
            "text": f"paused: {by}, lifted by `batchctl unpause {by}`",
        }  # fmt: skip
    batchctl("unpause", "trend")
    batchctl("pause", "trend/5m")
    batchctl("unpause", "daily")
    assert states(batchctl) == {
        **dict.fromkeys(("daily", "daily/search", "daily/upload", "trend/1m", "trend/1h"), idle),
        "trend/5m": ("paused", ["trend/5m"]),
    }


@pytest.mark.each_server
def test_a_paused_rollup_is_skipped_while_changes_are_captured(trend):
    trend("pause", "trend")
    for _ in range(3):
        assert outcomes(trend, code=75) == [("1m", "paused"), ("5m", "paused"), ("1h", "paused")]
    assert trend("aggregate", code=75).stderr == ""
    trend("aggregate", "--skip-exit-code", "0")
    message = "1m aggregation is paused: trend, lifted by `batchctl unpause trend`. Skipped."
    assert message in trend.log
    # A series is one entry.
    entries = trend.json("history", "trend/1m")["entries"]
    assert [(entry["reason"], entry["detail"], entry["count"]) for entry in entries] == [("paused", message, 5)]
    assert trend.json("aggregate", "--dry-run")["rollups"][0]["remaining_buckets"] == 1
    with psycopg.connect(trend.url) as connection:
        assert connection.execute("SELECT events FROM agg_1m").fetchall() == [(1,)]
    trend("unpause", "trend")
    assert [grain["rows_written"] for grain in trend.json("aggregate")["rollups"]] == [1, 1, 1]
    with psycopg.connect(trend.url) as connection:
        assert connection.execute("SELECT events FROM agg_1h").fetchall() == [(2,)]


def test_a_paused_grain_is_skipped_and_the_others_go_on(trend):
    trend("pause", "trend/5m")
    assert outcomes(trend) == [("1m", "success"), ("5m", "paused"), ("1h", "empty")]
    assert outcomes(trend, "--grain", "5m", code=75) == [("5m", "paused")]
    # What the paused grain has not counted cannot have reached the next.
    trend("unpause", "trend")
    assert outcomes(trend) == [("1m", "empty"), ("5m", "success"), ("1h", "success")]


def test_a_rebuild_of_what_is_paused_queues_nothing(trend):
    trend("aggregate")
    trend("pause", "trend/1m")
    rebuild = ("--rebuild", "--from", "2025-11-13", "--to", "2025-11-14")
    assert outcomes(trend, "--grain", "1m", *rebuild, code=75) == [("1m", "paused")]
    trend("unpause", "trend/1m")
    assert outcomes(trend, "--grain", "1m") == [("1m", "empty")]
    assert outcomes(trend, "--grain", "1m", *rebuild) == [("1m", "success")]


def test_a_dropped_rollup_leaves_no_pause_behind(trend):
    trend("pause", "trend")
    trend("migrate", "--drop", "trend")
    trend("migrate")
    assert outcomes(trend)[0] == ("1m", "success")
