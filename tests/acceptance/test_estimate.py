"""Estimates, the warning of an overrun, and what next answers, through the installed command."""

from __future__ import annotations

import os
import signal
from datetime import datetime, timedelta
from pathlib import Path

import psycopg
import pytest
from support import batch, wait_for

pytestmark = pytest.mark.any_user

GO = "touch started; while ! test -e go; do sleep 0.05; done"


def parse(instant):
    return datetime.fromisoformat(instant)


def guards_of(answer):
    return {guard["guard"]: guard for guard in answer["guards"]}


@pytest.mark.each_server
def test_the_estimate_follows_the_quantity_of_each_step(batchctl):
    steps = [("31", "sleep 0.4", "quantity = {}"), ("61", "sleep 0.2")]
    accounts = 'min_gap = "0s"\naccounts = ["a", "b"]\nmax_parallel = {}\n'
    configured = batch(steps, accounts)
    batchctl.configure(configured.format(2, 100))
    before = batchctl.json("status")["jobs"][0]
    assert (before["estimate_seconds"], before["estimate_runs"]) == (30 * 3600, 0)
    result = batchctl.json("run-batch")
    status = batchctl.json("status")["jobs"][0]
    assert status["estimate_runs"] == 1
    assert status["estimate_seconds"] == pytest.approx(result["duration_seconds"], abs=0.01), "nothing changed"

    with psycopg.connect(batchctl.url) as connection:
        took = {
            (account, step): seconds
            for account, step, seconds in connection.execute(
                "SELECT account, step, extract(epoch FROM finished_at - started_at)::float8 FROM batchctl.step_run"
            )
        }
    by_account = [took[account, "31"] * 10 + took[account, "61"] for account in ("a", "b")]
    for parallel, expected in ((2, max(by_account)), (1, sum(by_account))):
        batchctl.configure(configured.format(parallel, 1000))
        status = batchctl.json("status")["jobs"][0]
        assert status["estimate_seconds"] == pytest.approx(expected, abs=0.01)
    # The claim uses the same: a gap of so many times the new estimate.
    batchctl.configure(batch(steps, f"{accounts}gap_factor = 100").format(1, 1000))
    skip = batchctl.json("run-batch", code=75)
    assert skip["reason"] == "gap"
    gap = parse(skip["next_eligible_at"]) - parse(result["finished_at"])
    assert gap.total_seconds() == pytest.approx(100 * sum(by_account), abs=1)
    assert batchctl.json("next", "daily")["jobs"][0]["next_eligible_at"] == skip["next_eligible_at"]
    text = guards_of(batchctl.json("next", "daily")["jobs"][0])["gap"]["text"]
    assert "100 times" in text
    assert "the last success, by today's quantities" in text


def test_a_run_that_exceeds_its_estimate_by_half_is_a_warning_and_nothing_else(batchctl):
    batchctl.configure(batch([("31", "test -e slow || exit 0; " + GO)], 'min_gap = "0s"\nschedule = "0 1 * * *"'))
    batchctl("run-batch")
    with psycopg.connect(batchctl.url) as connection:
        connection.execute("UPDATE batchctl.run SET duration = '1s'")
    (batchctl.directory / "slow").touch()
    process = batchctl.start("run-batch")
    wait_for((batchctl.directory / "started").exists)
    wait_for(lambda: "exceeds the estimate by half" in batchctl.log, what="the warning")
    running = batchctl.json("status")["jobs"][0]
    assert (running["state"], running["overdue"]) == ("running", True)
    assert parse(running["expected_end_at"]) - parse(running["last_started_at"]) < timedelta(seconds=3)
    assert ", overdue, estimated end 2" in batchctl("status").stdout
    lock = guards_of(batchctl.json("next")["jobs"][0])["lock"]
    assert not lock["allows"]
    assert "should have ended at" in lock["text"]
    assert "taken to end now" in lock["text"]
    later = guards_of(batchctl.json("next", "--at", "2100-01-01")["jobs"][0])["lock"]
    assert later["allows"]
    (batchctl.directory / "go").touch()
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 0
    warnings = [line for line in batchctl.log.splitlines() if "exceeds the estimate" in line]
    assert len(warnings) == 1
    assert "| WARNING | Still running after " in warnings[0]
    assert warnings[0].endswith("1.0s (the last success)")
    assert not batchctl.json("status")["jobs"][0]["overdue"]


def test_next_knows_what_an_earlier_run_left(batchctl):
    batchctl.configure(batch([("31", "echo $$ >step.pid; exec sleep 300")], 'schedule = "0 1 * * *"\nevery = "48h"'))
    process = batchctl.start("run-batch", start_new_session=True)
    pid = batchctl.pid()
    own = batchctl.json("next")["jobs"][0]
    assert own["estimated"]
    assert guards_of(own)["orphans"]["allows"], "what belongs to a run that lives is no orphan"
    process.kill()
    process.communicate()
    answer = batchctl.json("next")["jobs"][0]
    orphans = guards_of(answer)["orphans"]
    assert not orphans["allows"]
    assert f"pid {pid}, step 31 of account default: sleep" in orphans["text"]
    assert (answer["next_start_at"], answer["next_eligible_at"]) == (None, None)
    assert batchctl("next").stdout.startswith("daily: no start in sight (orphans)\n")
    assert batchctl.json("run-batch", code=75)["reason"] == "orphans", "as next says"
    os.kill(pid, signal.SIGKILL)
    answer = batchctl.json("next")["jobs"][0]
    assert all(guard["allows"] for guard in answer["guards"]), "nor does the start of a run that died count"
    assert answer["next_start_at"] is not None
    assert batchctl.json("run-batch", "--dry-run")["steps"]


def test_next_sees_a_run_on_another_host_until_it_is_estimated_to_end(batchctl):
    batchctl.configure(batch([("31", "true")], 'min_gap = "6h"\nschedule = "0 * * * *"'))
    batchctl("run-batch")
    with psycopg.connect(batchctl.url) as connection:
        connection.execute(
            "UPDATE batchctl.run SET duration = '10h', started_at = now() - interval '50h',"
            " finished_at = now() - interval '40h'"
        )
        connection.execute(
            "INSERT INTO batchctl.run (run_id, batch, job, groups, host, hostname, boot_id, pid, pid_start_ticks,"
            " started_at, claimed_until, whole, config_hash) VALUES ('r2', 'daily', 'daily', '{}', 'other', 'far',"
            " 'other', 4711, 1, now() - interval '2h', now() + interval '1 day', true, '')"
        )
        connection.execute(
            "UPDATE batchctl.state SET last_run_id = 'r2', last_started_at = now() - interval '2h' RETURNING job"
        )
        now = connection.execute("SELECT now()").fetchone()[0]
    assert batchctl.json("run-batch", code=75)["reason"] == "running_elsewhere"
    answer = batchctl.json("next")["jobs"][0]
    elsewhere = guards_of(answer)["elsewhere"]
    assert not elsewhere["allows"]
    assert elsewhere["text"].startswith("running: pid 4711 on far, since ")
    assert "10h0m (the last success)" in elsewhere["text"]
    assert abs(parse(elsewhere["until"]) - now - timedelta(hours=8)) < timedelta(seconds=1)
    start = parse(answer["next_start_at"])
    assert now + timedelta(hours=14) <= start < now + timedelta(hours=15), "its end, six hours, the next full hour"
    assert answer["estimated"]
    with psycopg.connect(batchctl.url) as connection:
        # As if it had been another state directory of this machine, whose run has died.
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        connection.execute("UPDATE batchctl.run SET boot_id = %s, pid = 4000000 WHERE run_id = 'r2'", [boot_id])
    assert batchctl.json("status")["jobs"][0]["state"] == "idle"
    elsewhere = guards_of(batchctl.json("next")["jobs"][0])["elsewhere"]
    assert not elsewhere["allows"]
    assert elsewhere["text"].startswith("died (pid 4000000 on far, ")
    assert abs(parse(elsewhere["until"]) - now - timedelta(days=1)) < timedelta(seconds=1)
    assert batchctl.json("run-batch", code=75)["reason"] == "running_elsewhere", "as next says"
    with psycopg.connect(batchctl.url) as connection:
        connection.execute("UPDATE batchctl.run SET claimed_until = now() - interval '1s' WHERE run_id = 'r2'")
    assert guards_of(batchctl.json("next")["jobs"][0])["elsewhere"]["allows"], "its claim is over"


def test_a_group_waits_for_another_one_but_has_a_gap_and_an_estimate_of_its_own(batchctl):
    steps = [("31", GO, 'group = "search"'), ("61", "true", 'group = "upload"')]
    batchctl.configure(batch(steps, 'timeout = "2h"'))
    process = batchctl.start("run-batch", "--group", "search")
    wait_for((batchctl.directory / "started").exists)
    states = {job["job"]: job["state"] for job in batchctl.json("status")["jobs"]}
    assert states == {"daily": "running", "daily/search": "running", "daily/upload": "idle"}
    answer = batchctl.json("next", "daily/upload")["jobs"][0]
    guards = guards_of(answer)
    assert (guards["lock"]["allows"], guards["gap"]["text"]) == (False, "nothing completed before")
    assert answer["next_eligible_at"] == guards["lock"]["until"]
    whole = batchctl.json("next", "daily")["jobs"][0]
    assert parse(whole["next_eligible_at"]) - parse(answer["next_eligible_at"]) == timedelta(hours=6)
    (batchctl.directory / "go").touch()
    process.communicate(timeout=60)
    with psycopg.connect(batchctl.url) as connection:
        connection.execute("UPDATE batchctl.run SET duration = '1h'")
    estimates = {job["job"]: job["estimate_seconds"] for job in batchctl.json("status")["jobs"]}
    assert estimates == {"daily": 7200, "daily/search": 3600, "daily/upload": 7200}


def test_next_of_a_job_without_a_schedule_says_from_when_on_it_may_start(batchctl):
    batchctl.configure(batch([("31", "true", 'group = "search"')], 'hours = "3,4"'))
    answer = batchctl.json("next", "daily/search", "--at", "2030-01-01T05:00Z")["jobs"][0]
    assert (answer["schedule"], answer["next_start_at"]) == ("", None)
    assert answer["next_eligible_at"] == "2030-01-02T03:00:00Z"
    text = batchctl("next", "daily", "--at", "2030-01-01T05:00").stdout
    assert text.startswith("daily: no schedule; may start from 2030-01-02 03:00:00 on\n")
    assert "  hours: outside 3,4; next at 2030-01-02 03:00:00\n" in text
    assert (
        batchctl("next", "nosuch", code=2).stderr == "batchctl: no such job: nosuch; configured: daily, daily/search\n"
    )
    assert batchctl("next", "daily", "--at", "soon", code=2).stderr.count("\n") == 1
    for far in ("9999-12-31T23:59:59", "0001-01-01"):
        assert "expected a year from 1970 to 2199" in batchctl("next", "daily", "--at", far, code=2).stderr


def test_next_names_a_cron_time_that_does_not_exist(batchctl):
    batchctl.configure(batch([("31", "true")], 'schedule = "30 1 * * *"'))
    batchctl.config.write_text(batchctl.config.read_text().replace('"UTC"', '"Europe/London"'))
    answer = batchctl.json("next", "--at", "2026-03-29T00:00:00Z")["jobs"][0]
    assert (answer["next_start_at"], answer["moved"]) == ("2026-03-29T01:00:00Z", True)
    text = batchctl("next", "--at", "2026-03-29T00:00:00Z").stdout
    assert text.startswith(
        "daily: 2026-03-29 02:00:00\n  schedule: 30 1 * * * (this local time does not exist that day"
    )
    assert not batchctl.json("next", "--at", "2026-03-30T00:00:00Z")["jobs"][0]["moved"]


def test_status_shows_schedule_hours_and_estimates(batchctl):
    rollup = '[rollup.trend]\nsource = "e"\ntime = "t"\nhours = "6-22"\n[rollup.trend.measures]\nn = "count(*)"\n'
    batchctl.configure(batch([("31", "true")], 'schedule = "0 1 * * *"\nhours = "1"\ntimeout = "7h"') + rollup)
    jobs = {job["job"]: job for job in batchctl.json("status")["jobs"]}
    assert (jobs["daily"]["schedule"], jobs["daily"]["hours"]) == ("0 1 * * *", "1")
    assert (jobs["trend/5m"]["schedule"], jobs["trend/5m"]["hours"]) == ("*/5 * * * *", "6-22")
    assert (jobs["trend/5m"]["estimate_seconds"], jobs["trend/5m"]["estimate_runs"]) == (None, None)
    lines = batchctl("status").stdout.splitlines()
    assert lines[1].endswith("hours 1, timeout 7h0m")
    assert lines[2].endswith("hours 6-22")
    # One line of configuration changes how often a rollup runs.
    text = batchctl.config.read_text().replace('hours = "6-22"', 'schedule = { "1m" = "*/2 * * * *" }')
    batchctl.config.write_text(text)
    jobs = {job["job"]: job for job in batchctl.json("status")["jobs"]}
    assert (jobs["trend/1m"]["schedule"], jobs["trend/1m"]["hours"]) == ("*/2 * * * *", "")
