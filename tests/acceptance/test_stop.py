"""A live run that is asked to end: here and on another host, after its step, with grace, at once."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import psycopg
import pytest
from support import NOWHERE, batch, gone, wait_for

from batchctl.guard.identity import identify

WAITS = "touch started-$BATCHCTL_STEP; while ! test -e go_on; do sleep 0.05; done"
STUBBORN = "trap '' TERM; touch started-$BATCHCTL_STEP; while :; do sleep 0.1; done"
FAST_HEART = """
from batchctl.batch import heartbeat
heartbeat.LOOK_SECONDS = heartbeat.BEAT_SECONDS = 0.3
from batchctl.cli.app import main
main()
"""


def started(command, step="31"):
    wait_for((command.directory / f"started-{step}").exists)


def ended(process):
    stdout, stderr = process.communicate(timeout=60)
    assert "Traceback" not in stderr
    result = json.loads(stdout)
    return process.returncode, result["outcome"], [step["outcome"] for step in result["steps"]], result["reason"]


def test_stop_ends_the_step_and_the_run(batchctl):
    batchctl.configure(batch([("31", WAITS), ("32", "true")]))
    process = batchctl.start("run-batch", "--json")
    started(batchctl)
    done = batchctl("stop", "-v")
    assert f"Asked the run (pid {process.pid}) to end" in done.stdout
    code, outcome, steps, reason = ended(process)
    assert (code, outcome, steps) == (143, "stopped", ["stopped", "not_run"])
    assert reason == "`batchctl stop` asked for it"
    # What was stopped can go on.
    (batchctl.directory / "go_on").touch()
    assert batchctl.json("run-batch", "--resume")["outcome"] == "success"


def test_the_same_wish_twice_is_one(batchctl):
    """Two who want it do not take the grace away; a second signal and --now do."""
    line = "trap 'sleep 2; touch cleaned; exit 0' TERM; touch started-$BATCHCTL_STEP; while :; do sleep 0.1; done"
    batchctl.configure(batch([("31", line)], 'grace = "1m"'))
    process = batchctl.start("run-batch", "--json")
    started(batchctl)
    for _ in range(2):
        batchctl("stop")
    assert ended(process)[:3] == (143, "stopped", ["stopped"])
    assert (batchctl.directory / "cleaned").exists()
    assert batchctl.log.count("The run is to end now, with grace (1m;") == 1


def test_stop_after_the_step_lets_it_end(batchctl):
    batchctl.configure(batch([("31", WAITS), ("32", "touch never")], 'accounts = ["a", "b"]\nmax_parallel = 2'))
    process = batchctl.start("run-batch", "--json")
    started(batchctl)
    assert batchctl("stop", "--after-step").stdout == ""
    (batchctl.directory / "go_on").touch()
    code, outcome, steps, reason = ended(process)
    assert (code, outcome, steps) == (143, "stopped", ["success", "not_run"] * 2)
    assert reason == "`batchctl stop` asked for it"
    assert not (batchctl.directory / "never").exists()


@pytest.mark.any_user
def test_stop_after_the_last_step_changes_nothing(batchctl):
    batchctl.configure(batch([("31", "true"), ("32", WAITS)]))
    process = batchctl.start("run-batch", "--json")
    started(batchctl, "32")
    batchctl("stop", "--after-step")
    (batchctl.directory / "go_on").touch()
    assert ended(process)[:3] == (0, "success", ["success", "success"])


def test_stop_after_the_step_and_then_at_once(batchctl):
    batchctl.configure(batch([("31", STUBBORN)], 'grace = "1h"'))
    process = batchctl.start("run-batch", "--json")
    started(batchctl)
    batchctl("stop", "--after-step")
    batchctl("stop", "--now")
    assert ended(process)[:3] == (143, "stopped", ["stopped"])


@pytest.mark.any_user
def test_a_retry_is_not_begun_once_the_run_is_to_stop(batchctl):
    batchctl.configure(batch([("31", "touch started-31; exit 1", "retries = 3")]))
    process = batchctl.start("run-batch", "--json")
    started(batchctl)
    batchctl("stop", "--after-step")
    code, outcome, steps, _ = ended(process)
    assert (code, outcome, steps) == (1, "failed", ["failed"])


@pytest.mark.any_user
@pytest.mark.parametrize(
    ("option", "expected"), [([], "stopped"), (["--now"], "stopped"), (["--after-step"], "success")]
)
def test_stop_from_another_host(batchctl, tmp_path_factory, option, expected):
    batchctl.configure(batch([("31", STUBBORN if option == ["--now"] else WAITS), ("32", "true")], 'grace = "1h"'))
    other = replace(batchctl, directory=tmp_path_factory.mktemp("other"))
    other.configure(batch([("31", "true")]))
    process = replace(batchctl, program=(sys.executable, "-c", FAST_HEART)).start("run-batch", "--json")
    started(batchctl)
    done = other("stop", "-v", *option)
    assert "it looks every 60 s" in done.stdout
    if option == ["--after-step"]:
        wait_for(lambda: "The run is to end after its step" in batchctl.log)
        with psycopg.connect(batchctl.url) as connection:
            assert connection.execute("SELECT stop_requested FROM batchctl.run").fetchone() == ("after_step",)
        (batchctl.directory / "go_on").touch()
    code, outcome, steps, reason = ended(process)
    assert (code, outcome, steps) == (143, "stopped", [expected, "not_run"])
    assert reason == "`batchctl stop` asked for it"


def test_a_run_can_be_stopped_without_its_database(batchctl):
    batchctl.configure(batch([("31", WAITS)]))
    process = batchctl.start("run-batch", "--json")
    started(batchctl)
    batchctl.environment = {"BATCHCTL_DATABASE_URL": NOWHERE}
    batchctl("stop")
    assert ended(process)[0] == 143
    # Whether something runs elsewhere cannot be told without it.
    batchctl("stop", code=69)


@pytest.mark.any_user
def test_nothing_to_stop(batchctl):
    batchctl.configure(batch([("31", "true")]))
    assert batchctl("stop", "-v").stdout == "No run of daily is in progress.\n"
    assert "exclude each other" in batchctl("stop", "--now", "--after-step", code=2).stderr
    assert "no such batch" in batchctl("stop", "nosuch", code=2).stderr


def test_a_run_that_died_cannot_be_stopped(batchctl):
    batchctl.configure(batch([("31", WAITS)]))
    process = batchctl.start("run-batch")
    started(batchctl)
    process.kill()
    process.communicate()
    done = batchctl("stop", code=1)
    assert "has died" in done.stderr
    assert "batchctl recover" in done.stderr
    (batchctl.directory / "go_on").touch()


def test_a_number_that_another_process_has_by_now_is_not_signalled(batchctl):
    """The number in the lock file is believed only together with its start and its boot."""
    batchctl.configure(batch([("31", "true")]))
    batchctl("run-batch")
    sleeper = subprocess.Popen(["sleep", "60"])
    try:
        process = identify(sleeper.pid)
        holder = {**process._asdict(), "hostname": "h", "start_ticks": process.start_ticks + 1}
        lock = batchctl.directory / "state" / "lock" / "batch.daily.lock"
        lock.write_text(json.dumps({**holder, "started_at": "2026-01-01T00:00:00Z"}))
        assert batchctl("stop", "-v").stdout == "No run of daily is in progress.\n"
        assert not gone(sleeper.pid)
    finally:
        sleeper.kill()
        sleeper.wait()
