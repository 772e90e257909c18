"""run-batch as a crontab calls it: outcomes, skips, what is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from datetime import datetime, timedelta
from pathlib import Path

import psycopg
import pytest
from support import PROGRAM, batch, gone, wait_for

STEP_KEYS = {
    "account", "step", "group", "outcome", "exit_code", "signal", "attempts", "duration_seconds", "quantity", "log",
}  # fmt: skip
RESULT_KEYS = {
    "version", "batch", "group", "outcome", "reason", "run_id", "started_at", "finished_at", "duration_seconds",
    "next_eligible_at", "holder", "steps", "detail", "orphans",
}  # fmt: skip

SIX_STEPS = batch(
    [
        ("31", 'echo "search {step} {account} {quantity} {other}"', 'group = "search"', "quantity = 300"),
        ("32", "true", 'group = "search"'),
        ("33", "true", 'group = "search"'),
        ("61", "true", 'group = "upload"'),
        ("62", "true", 'group = "upload"'),
        ("63", "env | sort", 'group = "upload"'),
    ],
    'accounts = ["account1", "account2"]',
)


def parse(instant):
    return datetime.fromisoformat(instant)


@pytest.mark.any_user
@pytest.mark.each_server
def test_six_steps_for_two_accounts_in_order(batchctl):
    batchctl.configure(SIX_STEPS)
    result = batchctl.json("run-batch")
    assert set(result) == RESULT_KEYS
    assert result["outcome"] == "success"
    assert result["version"] == 1
    assert [(step["account"], step["step"]) for step in result["steps"]] == [
        (account, step) for account in ("account1", "account2") for step in ("31", "32", "33", "61", "62", "63")
    ]
    assert all(set(step) == STEP_KEYS for step in result["steps"])
    assert {step["quantity"] for step in result["steps"] if step["step"] == "31"} == {300}
    assert {step["quantity"] for step in result["steps"] if step["step"] == "32"} == {100}
    assert Path(result["steps"][0]["log"]).read_text() == "search 31 account1 300 {other}\n"
    environment = Path(result["steps"][5]["log"]).read_text()
    for expected in (
        "BATCHCTL_BATCH=daily", "BATCHCTL_ACCOUNT=account1", "BATCHCTL_STEP=63", "BATCHCTL_GROUP=upload",
        "BATCHCTL_QUANTITY=100", f"BATCHCTL_RUN_ID={result['run_id']}", "BATCHCTL_ATTEMPT=1", "BATCHCTL_DEADLINE=20",
    ):  # fmt: skip
        assert expected in environment
    with psycopg.connect(batchctl.url) as connection:
        rows = connection.execute(
            "SELECT account, step, outcome, exit_code, quantity FROM batchctl.step_run ORDER BY started_at"
        ).fetchall()
    assert [(row[0], row[1]) for row in rows] == [(step["account"], step["step"]) for step in result["steps"]]


def test_without_a_terminal_a_run_and_a_skip_print_nothing(batchctl):
    batchctl.configure(SIX_STEPS)
    done = batchctl("run-batch")
    assert (done.stdout, done.stderr) == ("", "")
    skipped = batchctl("run-batch", code=75)
    assert (skipped.stdout, skipped.stderr) == ("", "")
    assert "INFO | Run finished: success" in batchctl.log
    assert "WARNING | Completed" in batchctl.log
    assert "INFO | Completed" not in batchctl("run-batch", "-v", code=75).stderr
    assert "WARNING | Completed" in batchctl("-v", "run-batch", code=75).stderr


@pytest.mark.any_user
def test_the_log_lines_have_the_promised_shape(batchctl):
    batchctl.configure(SIX_STEPS)
    batchctl("run-batch")
    lines = [line.partition("] ")[2][22:] for line in batchctl.log.splitlines()]
    assert lines[0].startswith("INFO | Run started: 20")
    assert lines[1] == "INFO | Steps: 31=300, 32=100, 33=100, 61=100, 62=100, 63=100"
    assert lines[2] == "INFO | Account account1 started (own process)"
    assert batchctl.log.startswith("[daily] 20")


@pytest.mark.any_user
def test_a_second_start_is_skipped_for_six_hours(batchctl):
    batchctl.configure(SIX_STEPS)
    first = batchctl.json("run-batch")
    second = batchctl.json("run-batch", code=75)
    assert (second["outcome"], second["reason"], second["holder"]) == ("skipped", "gap", None)
    assert parse(second["next_eligible_at"]) - parse(first["finished_at"]) == timedelta(hours=6)
    assert first["next_eligible_at"] == second["next_eligible_at"]
    assert batchctl.json("run-batch", "--skip-exit-code", "0")["outcome"] == "skipped"
    assert batchctl.json("run-batch", "--force-gap")["outcome"] == "success"


@pytest.mark.any_user
@pytest.mark.each_server
def test_the_gap_is_measured_by_the_clock_of_the_database(batchctl):
    batchctl.configure(SIX_STEPS)
    batchctl("run-batch")
    with psycopg.connect(batchctl.url) as connection:
        connection.execute("UPDATE batchctl.state SET last_completed_at = last_completed_at - interval '6 hours'")
    assert batchctl.json("run-batch")["outcome"] == "success"


@pytest.mark.any_user
def test_a_failed_step_does_not_stop_the_others(batchctl):
    batchctl.configure(batch([("31", "exit 7"), ("32", "kill -9 $$"), ("33", "true")]))
    result = batchctl.json("run-batch", code=3)
    assert result["outcome"] == "partial"
    assert [(step["outcome"], step["exit_code"], step["signal"]) for step in result["steps"]] == [
        ("failed", 7, None),
        ("failed", None, 9),
        ("success", 0, None),
    ]


@pytest.mark.any_user
def test_a_command_that_does_not_exist_is_a_failed_step(batchctl):
    batchctl.configure(
        '[batch.daily]\n[[batch.daily.step]]\nid = "31"\ncommand = ["./no-such-program"]\n'
        '[[batch.daily.step]]\nid = "32"\ncommand = ["true"]\n'
    )
    result = batchctl.json("run-batch", code=3)
    assert [(step["outcome"], step["exit_code"]) for step in result["steps"]] == [("failed", 127), ("success", 0)]
    assert "cannot start './no-such-program'" in batchctl.log


@pytest.mark.any_user
def test_a_failed_step_is_tried_again(batchctl):
    # The first retry comes after ten seconds: the real delay, once.
    batchctl.configure(batch([("31", "test -e tried || { touch tried; exit 1; }", "retries = 1")]))
    result = batchctl.json("run-batch")
    assert (result["outcome"], result["steps"][0]["attempts"]) == ("success", 2)


def test_a_timeout_takes_the_whole_session_with_it(batchctl):
    stubborn = "trap '' TERM; echo $$ > child.pid; while :; do sleep 1; done"
    batchctl.configure(
        batch(
            [("31", f"echo $$ > parent.pid; sh -c {json.dumps(stubborn)} & wait", 'timeout = "1s"'), ("32", "true")],
            'grace = "1s"',
        )
    )
    result = batchctl.json("run-batch", code=3)
    assert result["outcome"] == "partial"
    assert [step["outcome"] for step in result["steps"]] == ["timeout", "success"]
    for name in ("parent.pid", "child.pid"):
        assert gone(int((batchctl.directory / name).read_text()))


def test_a_second_signal_kills_at_once(batchctl):
    batchctl.configure(batch([("31", "trap '' TERM; echo $$ > step.pid; while :; do sleep 1; done")], 'grace = "10m"'))
    process = batchctl.start("run-batch")
    pid = batchctl.pid()
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert not gone(pid)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM
    assert gone(pid)


@pytest.mark.each_server
def test_a_killed_batchctl_leaves_an_orphan_that_blocks_until_it_is_gone(batchctl):
    batchctl.configure(batch([("31", "echo $$ > step.pid; exec sleep 300")]))
    process = batchctl.start("run-batch")
    pid = batchctl.pid()
    process.kill()
    process.communicate()
    try:
        skipped = batchctl.json("run-batch", code=75)
        assert (skipped["outcome"], skipped["reason"]) == ("skipped", "orphans")
        assert f"pid {pid}" in batchctl.log
        assert not gone(pid), "looking must not kill"
    finally:
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: gone(pid))
    batchctl.configure(batch([("31", "true")]))
    assert batchctl.json("run-batch")["outcome"] == "success"
    outcomes = [entry["outcome"] for entry in batchctl.json("history")["entries"]]
    assert outcomes == ["success", "skipped", "crashed"]


def test_an_orphan_is_found_by_its_lock_or_its_marker_alone(batchctl):
    """The step closes every descriptor (no lock), or clears its environment (no marker); its record is lost too."""
    for line in ("exec env -i sleep 300", "exec 3>&- 4>&- 5>&- 6>&- 7>&- 8>&- 9>&-; sleep 300 & wait"):
        batchctl.configure(batch([("31", f"echo $$ > step.pid; {line}")], 'min_gap = "0s"'))
        process = batchctl.start("run-batch")
        pid = batchctl.pid()
        time.sleep(0.5)
        process.kill()
        process.communicate()
        with psycopg.connect(batchctl.url) as connection:
            connection.execute("UPDATE batchctl.step_run SET pid = NULL")
        try:
            assert batchctl.json("run-batch", code=75)["reason"] == "orphans"
        finally:
            os.killpg(pid, signal.SIGKILL)
        wait_for(lambda pid=pid: gone(pid))
        (batchctl.directory / "step.pid").unlink()


def test_what_a_dead_run_left_is_never_ignored(batchctl):
    batchctl.configure(batch([("31", "echo $$ > step.pid; exec sleep 300")], 'leftovers = "ignore"'))
    process = batchctl.start("run-batch")
    pid = batchctl.pid()
    process.kill()
    process.communicate()
    try:
        skipped = batchctl.json("run-batch", code=75)
        assert skipped["reason"] == "orphans"
        assert [orphan["pid"] for orphan in skipped["orphans"]] == [pid]
        assert f"pid {pid}" in skipped["detail"]
        assert f"pid {pid}" in batchctl.json("history")["entries"][0]["detail"]
    finally:
        os.kill(pid, signal.SIGKILL)


@pytest.mark.any_user
def test_a_crash_keeps_every_from_nothing(batchctl):
    batchctl.configure(batch([("31", "echo $$ > step.pid; exec sleep 300")], 'every = "48h"'))
    process = batchctl.start("run-batch")
    pid = batchctl.pid()
    process.kill()
    process.communicate()
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: gone(pid))
    batchctl.configure(batch([("31", "true")], 'every = "48h"'))
    assert batchctl.json("run-batch")["outcome"] == "success"


@pytest.mark.any_user
def test_the_deadline_that_ends_the_retries_ends_the_run(batchctl):
    batchctl.configure(batch([("31", "true"), ("32", "false", "retries = 5")], 'timeout = "2s"'))
    result = batchctl.json("run-batch", code=124)
    assert result["outcome"] == "timeout"
    assert [step["outcome"] for step in result["steps"]] == ["success", "failed"]


def test_a_signal_before_the_claim_starts_nothing_and_costs_no_gap(batchctl):
    batchctl.configure(batch([("31", "touch ran")]))
    batchctl("status")
    with psycopg.connect(batchctl.url) as connection:
        connection.execute("INSERT INTO batchctl.state (job) VALUES ('daily')")
        connection.commit()
        connection.execute("SELECT FROM batchctl.state FOR UPDATE")
        process = batchctl.start("run-batch")
        waiting = (
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        )
        with psycopg.connect(batchctl.url, autocommit=True) as watching:
            wait_for(lambda: watching.execute(waiting).fetchone()[0])
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert not (batchctl.directory / "ran").exists()
    assert batchctl.json("run-batch")["outcome"] == "success"


def test_a_start_does_not_wait_for_a_lock_that_somebody_keeps(batchctl):
    batchctl.configure(batch([("31", "touch ran")]))
    batchctl("status")
    with psycopg.connect(batchctl.url) as connection:
        connection.execute("INSERT INTO batchctl.state (job) VALUES ('daily')")
        connection.commit()
        connection.execute("SELECT FROM batchctl.state FOR UPDATE")
        done = batchctl("run-batch", code=69)
    assert "lock timeout" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (batchctl.directory / "ran").exists()


def test_what_cannot_be_made_before_a_run_is_not_claimed(batchctl):
    batchctl.configure(batch([("31", "true")]))
    batchctl("status")
    (batchctl.directory / "state").mkdir(mode=0o700, exist_ok=True)
    (batchctl.directory / "state" / "run").write_text("in the way")
    assert "not a directory" in batchctl("run-batch", code=78).stderr
    with psycopg.connect(batchctl.url) as connection:
        assert connection.execute("SELECT count(*) FROM batchctl.run").fetchone() == (0,)


@pytest.mark.parametrize("redirection", [">&-", ">/dev/full", ">&- 2>&-", "| true"])
def test_output_that_cannot_be_written_changes_nothing(batchctl, redirection):
    batchctl.configure(batch([("31", "true")], 'min_gap = "0s"'))
    line = f'"$0" --config batchctl.toml run-batch --json {redirection}'
    if "|" in redirection:
        line = f"{{ {line.partition('|')[0]}; echo $? >code; }} | true; exit $(cat code)"
    program = str(PROGRAM)
    for _ in range(2):
        done = subprocess.run(
            ["sh", "-c", line, program], cwd=batchctl.directory, env={"PATH": "/usr/bin:/bin"}, check=False,
            capture_output=True, stdin=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done
        assert "bug" not in done.stderr


def test_leftovers_may_be_ignored(batchctl):
    batchctl.configure(batch([("31", "setsid sleep 300 & echo $! >> agents")], 'leftovers = "ignore"\nmin_gap = "0s"'))
    batchctl("run-batch")
    try:
        assert "WARNING | The run left processes alive, the next start ignores them: pid" in batchctl.log
        batchctl("run-batch")
        assert "ignored as configured" in batchctl.log
        batchctl.configure(batch([("31", "true")], 'leftovers = "skip"\nmin_gap = "0s"'))
        assert batchctl.json("run-batch", code=75)["reason"] == "orphans"
    finally:
        for pid in (batchctl.directory / "agents").read_text().split():
            os.kill(int(pid), signal.SIGKILL)


def test_nothing_is_left_running_blocks_nothing(batchctl):
    batchctl.configure(batch([("31", "true")], 'min_gap = "0s"'))
    for _ in range(3):
        batchctl("run-batch")
    assert list((batchctl.directory / "state" / "run" / "daily").iterdir()) == []


@pytest.mark.any_user
@pytest.mark.each_server
def test_every_is_measured_from_the_start(batchctl):
    batchctl.configure(batch([("31", "true")], 'min_gap = "0s"\nevery = "30h"'))
    first = batchctl.json("run-batch")
    result = batchctl.json("run-batch", code=75)
    assert result["reason"] == "not_due"
    # Cron does not start at the same second each day, so a minute less is enough.
    assert parse(result["next_eligible_at"]) - parse(first["started_at"]) == timedelta(hours=30, seconds=-60)


@pytest.mark.any_user
def test_a_group_has_its_own_gap_and_the_batch_counts_them_all(batchctl):
    batchctl.configure(SIX_STEPS)
    result = batchctl.json("run-batch", "--group", "upload")
    assert result["group"] == "upload"
    assert {step["group"] for step in result["steps"]} == {"upload"}
    assert batchctl.json("run-batch", "--group", "upload", code=75)["reason"] == "gap"
    assert batchctl.json("run-batch", code=75)["reason"] == "gap"
    assert batchctl.json("run-batch", "--group", "search")["outcome"] == "success"


@pytest.mark.any_user
def test_accounts_side_by_side_and_a_parallel_group(batchctl):
    meet = "touch {account}.{step}; for i in $(seq 100); do test -e {other} && exit 0; sleep 0.1; done; exit 1"
    text = '[batch.daily]\naccounts = ["a", "b"]\nmax_parallel = 2\n'
    for step, other in (("1", "2"), ("2", "1")):
        line = meet.replace("{other}", "{account}." + other)
        text += f'[[batch.daily.step]]\nid = "{step}"\ngroup = "g"\ncommand = ["sh", "-c", {json.dumps(line)}]\n'
    both = "test -e a.done && test -e b.done && exit 0"
    wait_other = f"touch {{account}}.done; for i in $(seq 100); do {both}; sleep 0.1; done; exit 1"
    text += f'[[batch.daily.step]]\nid = "3"\ncommand = ["sh", "-c", {json.dumps(wait_other)}]\n'
    batchctl.configure(text + "[batch.daily.group.g]\nparallel = true\n")
    assert batchctl.json("run-batch")["outcome"] == "success"


@pytest.mark.any_user
def test_what_is_not_configured_is_wrong_usage(batchctl):
    batchctl.configure(SIX_STEPS)
    for arguments in (["nightly"], ["--step", "99"], ["--group", "x"], ["--account", "x"], ["--no-such-option"]):
        done = batchctl("run-batch", *arguments, code=2)
        assert done.stdout == ""
        assert "Traceback" not in done.stderr


def test_output_that_is_not_utf8_and_a_locale_without_utf8(batchctl):
    batchctl.environment = {"LC_ALL": "C"}
    batchctl.configure(batch([("31", r"printf '\377\376 caf\351'"), ("한글", "echo ü")]))
    result = batchctl.json("run-batch")
    assert Path(result["steps"][0]["log"]).read_bytes() == b"\xff\xfe caf\xe9"
    assert result["steps"][1]["step"] == "한글"
