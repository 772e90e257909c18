"""status, history, next, init, migrate: what they print, on a terminal and for programs."""

from __future__ import annotations

import os
import signal
import subprocess
import tomllib
from datetime import datetime, timedelta

import psycopg
import pytest
from support import PROGRAM, batch, wait_for

pytestmark = pytest.mark.any_user

GROUPS = batch([("31", "true", 'group = "search"'), ("61", "true", 'group = "upload"')], 'schedule = "0 1 * * *"') + (
    '[batch.daily.group.upload]\nschedule = "0 13 * * *"\n'
    '[rollup.trend]\nsource = "fact_events"\ntime = "occurred_at"\n[rollup.trend.measures]\nevents = "count(*)"\n'
)
STATUS_KEYS = {
    "job", "state", "last_started_at", "last_completed_at", "last_outcome", "next_eligible_at", "estimate_seconds",
    "estimate_runs", "expected_end_at", "overdue", "pid", "host", "paused", "enabled", "schedule", "hours",
}  # fmt: skip


GUARDS = ["lock", "orphans", "elsewhere", "enabled", "paused", "hours", "gap", "every"]


def parse(instant):
    return datetime.fromisoformat(instant)


def test_status_before_during_and_after_a_run(batchctl):
    line = "touch started; while ! test -e go; do sleep 0.05; done"
    batchctl.configure(GROUPS.replace('["sh", "-c", "true"]', f'["sh", "-c", "{line}"]', 1))
    before = batchctl.json("status")
    assert [job["job"] for job in before["jobs"]] == [
        "daily", "daily/search", "daily/upload", "trend/1m", "trend/5m", "trend/1h",
    ]  # fmt: skip
    assert all(set(job) == STATUS_KEYS for job in before["jobs"])
    assert {job["state"] for job in before["jobs"]} == {"idle"}

    process = batchctl.start("run-batch")
    wait_for((batchctl.directory / "started").exists)
    during = {job["job"]: job for job in batchctl.json("status")["jobs"]}
    assert (during["daily"]["state"], during["daily"]["pid"]) == ("running", process.pid)
    assert during["trend/1m"]["state"] == "idle"
    answer = batchctl.json("next", "daily")["jobs"][0]
    assert answer["estimated"]
    lock = next(guard for guard in answer["guards"] if guard["guard"] == "lock")
    assert not lock["allows"]
    assert f"pid {process.pid}" in lock["text"]
    (batchctl.directory / "go").touch()
    process.communicate(timeout=30)

    after = {job["job"]: job for job in batchctl.json("status")["jobs"]}
    assert (after["daily"]["state"], after["daily"]["last_outcome"]) == ("idle", "success")
    completed = parse(after["daily"]["last_completed_at"])
    assert parse(after["daily"]["next_eligible_at"]) - completed == timedelta(hours=6)


def test_status_does_not_believe_a_row_of_a_dead_run(batchctl):
    batchctl.configure(batch([("31", "echo $$ >step.pid; exec sleep 300")]))
    process = batchctl.start("run-batch", start_new_session=True)
    pid = batchctl.pid()
    process.kill()
    process.communicate()
    assert batchctl.json("status")["jobs"][0]["state"] == "idle"
    for line in batchctl("history").stdout.splitlines()[1:]:
        assert "no end yet" in line
    os.kill(pid, signal.SIGKILL)


def test_next_is_the_first_cron_time_that_every_guard_allows(batchctl):
    batchctl.configure(GROUPS)
    first = batchctl.json("next", "daily", "--at", "2030-01-01T00:00:00Z")["jobs"]
    assert [job["job"] for job in first] == ["daily", "daily/upload"]
    assert first[0]["next_start_at"] == "2030-01-01T01:00:00Z"
    batchctl("run-batch")
    with psycopg.connect(batchctl.url) as connection:
        # As if the run had ended at 20:00, so that 01:00 comes five hours later: too early.
        connection.execute("UPDATE batchctl.state SET last_completed_at = '2030-01-01 20:00Z'")
    following = {job["job"]: job for job in batchctl.json("next", "--at", "2030-01-01T21:00:00Z")["jobs"]}
    assert following["daily"]["next_start_at"] == "2030-01-03T01:00:00Z"
    assert following["daily/upload"]["next_start_at"] == "2030-01-02T13:00:00Z"
    assert following["trend/5m"]["next_start_at"] == "2030-01-01T21:00:00Z"
    text = batchctl("next", "daily", "--at", "2030-01-01T21:00").stdout
    assert "daily: 2030-01-03 01:00:00\n" in text
    assert "gap: until 2030-01-02 02:00:00" in text


def test_next_of_a_disabled_batch_is_never(batchctl):
    batchctl.configure(GROUPS.replace("schedule", "enabled = false\nschedule", 1))
    answer = batchctl.json("next", "daily")["jobs"][0]
    assert answer["next_start_at"] is None
    refusing = {guard["guard"] for guard in answer["guards"] if not guard["allows"]}
    assert refusing == {"enabled"}
    assert batchctl("next", "daily").stdout.startswith("daily: no start in sight (enabled)\n")
    jobs = {job["job"]: job for job in batchctl.json("status")["jobs"]}
    assert (jobs["daily"]["enabled"], jobs["daily/upload"]["enabled"], jobs["trend/1m"]["enabled"]) == (
        False, False, True,
    )  # fmt: skip
    lines = batchctl("status").stdout.splitlines()
    assert [("disabled" in line, "idle" in line) for line in lines[1:]] == [(True, True)] * 3 + [(False, True)] * 3


def test_next_names_every_when_that_refuses_longer(batchctl):
    options = 'schedule = "0 1 * * *"\nmin_gap = "1h"\nevery = "20h"'
    batchctl.configure(batch([("31", "true")], options))
    batchctl("run-batch")
    guards = {guard["guard"]: guard for guard in batchctl.json("next")["jobs"][0]["guards"]}
    assert list(guards) == GUARDS, "in the order in which a start asks them"
    assert [name for name, guard in guards.items() if not guard["allows"]] == ["gap", "every"]
    assert parse(guards["every"]["until"]) > parse(guards["gap"]["until"])
    due = parse(batchctl.json("next")["jobs"][0]["next_eligible_at"])
    assert due == parse(guards["every"]["until"])
    batchctl.configure(batch([("31", "true")], options.replace("20h", "")))
    guards = {guard["guard"]: guard["allows"] for guard in batchctl.json("next")["jobs"][0]["guards"]}
    assert [name for name, allows in guards.items() if not allows] == ["gap"], "the control"


def test_next_without_any_schedule_says_so(batchctl):
    batchctl.configure(batch([("31", "true")]))
    assert batchctl("next").stdout == "No job has a schedule; `batchctl next JOB` asks about one.\n"
    assert batchctl.json("next")["jobs"] == []


def test_history_of_a_job_that_never_was_is_wrong_usage(batchctl):
    batchctl.configure(GROUPS)
    batchctl("run-batch", "--step", "31")
    done = batchctl("history", "nosuch", code=2)
    known = "daily, daily/search, daily/upload, trend, trend/1m, trend/5m, trend/1h"
    assert done.stderr == f"batchctl: no such job: nosuch; known: {known}\n"
    assert batchctl.json("history", "trend")["entries"] == []
    batchctl.configure(batch([("31", "true")], name="other"))
    assert len(batchctl.json("history", "daily")["entries"]) == 1, "it is no longer configured, but recorded"


def test_a_dry_run_prints_command_lines_with_the_tokens_filled_in(batchctl):
    batchctl.configure(
        """[batch.daily]
accounts = ["load [eu]"]
[[batch.daily.step]]
id = "31"
group = "search"
quantity = 7
command = ["sh", "-c", "echo {batch} {step} {group} {quantity} {run_id} $x", "{account}", "{other}"]
"""
    )
    shown = batchctl("run-batch", "--dry-run").stdout
    assert "sh -c 'echo daily 31 search 7 {run_id} $x' 'load [eu]' '{other}'" in shown
    assert batchctl.json("run-batch", "--dry-run")["steps"][0]["command"][3] == "{account}"


def test_history_counts_a_series_of_skips_in_one_row(batchctl):
    batchctl.configure(GROUPS + "")
    with psycopg.connect(batchctl.url) as connection:
        connection.execute("CREATE TABLE fact_events (occurred_at timestamptz)")
    batchctl("migrate")
    text = batchctl.config.read_text().replace("[rollup.trend]", "[rollup.trend]\nenabled = false")
    batchctl.config.write_text(text)
    for _ in range(3):
        assert batchctl.json("aggregate", "--grain", "1m", code=75)["rollups"][0]["reason"] == "disabled"
    entries = batchctl.json("history", "trend")["entries"]
    assert [(entry["job"], entry["reason"], entry["count"]) for entry in entries] == [("trend/1m", "disabled", 3)]


def test_init_writes_a_starter_that_runs_and_never_overwrites(embedded_batchctl):
    command = embedded_batchctl
    done = command("init", "-v")
    assert done.stdout.startswith(f"Wrote {command.config}")
    starter = command.config.read_text()
    tomllib.loads(starter)
    assert "already" not in starter
    assert "is left alone" in command("init", code=78).stderr
    assert command.config.read_text() == starter
    command.config.write_text('state_dir = "state"\n' + starter)
    assert command.json("run-batch")["outcome"] == "success"


@pytest.mark.each_server
def test_migrate_prints_its_sql_and_executes_none_of_it(batchctl):
    batchctl.configure(GROUPS)
    with psycopg.connect(batchctl.url) as connection:
        connection.execute("CREATE TABLE fact_events (occurred_at timestamptz)")
    statements = batchctl("migrate", "--dry-run").stdout
    assert 'CREATE TABLE "batchctl".state' in statements
    assert "TRIGGER" in statements
    with psycopg.connect(batchctl.url) as connection:
        assert connection.execute("SELECT to_regnamespace('batchctl')").fetchone() == (None,)
    assert "Made the tables and triggers of trend." in batchctl("migrate", "-v").stdout
    assert "Nothing to do." in batchctl("migrate", "-v").stdout
    batchctl("migrate", "--drop", "trend")
    with psycopg.connect(batchctl.url) as connection:
        assert connection.execute("SELECT to_regclass('agg_1m')").fetchone() == (None,)
    assert "is not in the database" in batchctl("migrate", "--drop", "trend", code=2).stderr


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("status >/dev/full", 1),
        ("history >&-", 1),
        ("run-batch --dry-run >/dev/full", 1),
        ("stop >/dev/full", 0),
        ("status | true", 0),
    ],
)
def test_what_exists_to_print_and_cannot_has_failed(batchctl, line, code):
    batchctl.configure(GROUPS)
    batchctl("status")
    called, _, pipe = f'"$0" --config batchctl.toml {line}'.partition("|")
    if pipe:
        called = f"{{ {called}; echo $? >code; }} |{pipe}; exit $(cat code)"
    done = subprocess.run(
        ["sh", "-c", called, str(PROGRAM)], cwd=batchctl.directory, env={"PATH": "/usr/bin:/bin"}, check=False,
        capture_output=True, stdin=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert done.returncode == code, done
    assert done.stderr.count("standard output cannot be written") == code
