"""The doctor as people and cron call it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess

import psycopg
from cron_of_system import TOOLS, cron_to_itself, crontab, crontab_of_root, installed_crontab
from support import FACT_EVENTS, NOWHERE, PROGRAM, ROLLUP, Command, batch, skip_or_fail

from batchctl.doctor.finding import CHECKS

KEYS = {"check", "state", "found", "advice", "exit_code"}
DAILY = batch([("31", "true")], 'schedule = "0 1 * * *"')


def checks(batchctl, *arguments, code=None):
    """Call the doctor and return what it found, by check."""
    document = batchctl.json("doctor", *arguments, code=code)
    assert document.keys() == {"version", "checks"}
    found = {}
    for each in document["checks"]:
        assert each.keys() == KEYS
        assert (each["advice"] is not None) == (each["state"] != "ok")
        assert (each["exit_code"] is not None) == (each["state"] == "error")
        found.setdefault(each["check"], []).append(each)
    assert found.keys() <= set(CHECKS)
    return found


def worst(found, *names):
    """The worst state of some checks, or of all."""
    states = {each["state"] for name in names or found for each in found.get(name, [])}
    return next(state for state in ("error", "warning", "ok") if state in states)


MACHINE = ("environment", "program", "cron", "crontab", "state_dir", "disk", "locale", "timezone")
"""Checks that depend on the machine that runs the tests."""


def test_a_healthy_configuration(batchctl):
    batchctl.configure(DAILY + ROLLUP)
    with psycopg.connect(batchctl.url) as connection:
        connection.execute(FACT_EVENTS)
    batchctl("migrate")
    batchctl("aggregate")
    found = checks(batchctl)
    well = ("configuration", "step", "database", "clock", "journal", "rollup", "orphans", "job")
    assert {name: worst(found, name) for name in found if name not in MACHINE} == dict.fromkeys(well, "ok")
    # Plain lines, and a summary.
    done = batchctl("doctor", code=None)
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["state", "check", "found"]
    assert re.fullmatch(r"\d+ errors?, \d+ warnings?, \d+ ok\.", lines[-1])
    for line in lines[1:-1]:
        assert line.startswith("ok ") or ". Do: " in line, line
    assert done.stderr == ""
    # -q leaves out what is well.
    quiet = batchctl("doctor", "-q", code=None).stdout.splitlines()
    assert not [line for line in quiet if line.startswith("ok ")]


def test_looking_changes_nothing(batchctl):
    batchctl.configure(DAILY)
    before = sorted(path.name for path in batchctl.directory.rglob("*"))
    batchctl("doctor", code=None)
    assert sorted(path.name for path in batchctl.directory.rglob("*")) == before
    with psycopg.connect(batchctl.url) as connection:
        assert connection.execute("SELECT to_regnamespace('batchctl')").fetchone() == (None,)


def test_without_a_configuration_the_rest_is_checked(tmp_path):
    found = checks(Command(tmp_path, None), code=78)
    (wrong,) = found["configuration"]
    assert (wrong["state"], wrong["exit_code"]) == ("error", 78)
    assert "no such configuration file" in wrong["found"]
    assert {"program", "cron", "locale"} <= found.keys()
    assert "database" not in found


def test_a_broken_configuration(batchctl):
    batchctl.config.write_text("[batch\n")
    (wrong,) = checks(batchctl, code=78)["configuration"]
    assert "not valid TOML" in wrong["found"]


def test_a_database_that_is_down_hides_nothing_else(tmp_path):
    batchctl = Command(tmp_path, NOWHERE.replace("nobody@", "nobody:hush@"))
    batchctl.configure(batch([("31", "true")]) + '[[batch.daily.step]]\nid = "32"\ncommand = ["nope"]\n')
    batchctl.config.chmod(0o644)
    found = checks(batchctl, code=69)
    assert [each["exit_code"] for each in found["database"]] == [69]
    assert worst(found, "step") == "error"
    assert found["orphans"][0]["state"] == "ok"
    for arguments in (["doctor"], ["doctor", "--json"], ["doctor", "--as-cron"]):
        done = batchctl(*arguments, code=69)
        assert "hush" not in done.stdout + done.stderr


def test_a_step_that_fails_only_under_cron(batchctl):
    batchctl.configure(batch([("31", "true")]))
    tool = batchctl.directory / "bin" / "tool"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    batchctl.config.write_text(batchctl.config.read_text().replace('"sh", "-c", "true"', '"tool"'))
    batchctl.environment["PATH"] = f"{tool.parent}:/usr/bin:/bin"
    (wrong,) = checks(batchctl)["step"]
    assert wrong["state"] == "error"
    assert str(tool) in wrong["found"]
    # Another test may just now have a PATH in root's crontab.
    with cron_to_itself():
        under_cron = batchctl("doctor", "--as-cron", code=1).stdout
    assert under_cron.count("there is no tool in PATH=/usr/bin:/bin") == 1
    assert "tool is not found" not in under_cron, "once is enough"


def test_what_only_this_shell_knows_is_missing_under_cron(batchctl):
    batchctl.configure(batch([("31", "true")]))
    batchctl.environment["BATCHCTL_CONFIG"] = str(batchctl.config)

    def call(*arguments):
        environment = {"PATH": "/usr/bin:/bin", "BATCHCTL_CONFIG": str(batchctl.config)}
        command = [PROGRAM, *arguments, "doctor", "--as-cron", "--json"]
        done = subprocess.run(
            command, env=environment, cwd=batchctl.directory, capture_output=True, text=True, check=False
        )
        return done.returncode, json.loads(done.stdout)["checks"]

    code, found = call()
    (nothing,) = [each for each in found if each["found"].startswith("no configuration file")]
    assert code == 78
    assert f"`batchctl doctor --as-cron --config {batchctl.config}`" in nothing["advice"]
    assert "init" not in nothing["advice"]
    code, found = call("--config", "batchctl.toml")
    assert code == 78, "a relative path leads elsewhere from the home directory"
    assert any("batchctl.toml: no such configuration file" in each["found"] for each in found)
    assert any("BATCHCTL_CONFIG" in each["found"] for each in found if each["check"] == "environment")
    code, found = call("--config", str(batchctl.config))
    assert code != 78
    assert any(each["check"] == "database" and each["state"] == "ok" for each in found)


def test_without_home_and_without_crontab(batchctl):
    batchctl.configure(DAILY)
    process = batchctl.start("doctor", "--json", env={"PATH": "/nowhere"})
    found = json.loads(process.communicate(timeout=60)[0])["checks"]
    crontab = [each for each in found if each["check"] == "crontab"]
    assert [each["state"] for each in crontab] == ["error"]
    assert "crontab is not found in PATH" in crontab[0]["found"]


def test_what_a_killed_run_left_is_named(batchctl):
    batchctl.configure(batch([("31", "echo $$ >step.pid; exec sleep 60")]))
    process = batchctl.start("run-batch")
    pid = batchctl.pid()
    process.kill()
    process.communicate()
    try:
        found = checks(batchctl)["orphans"]
        texts = " ".join(each["found"] for each in found)
        assert worst({"orphans": found}) == "warning"
        assert "died without an end" in texts
        assert f"pid {pid} alive" in texts
    finally:
        os.kill(pid, signal.SIGKILL)


def test_a_database_that_never_answers_is_given_up(own_server, tmp_path):
    """A server that was stopped by a signal still takes connections, and says nothing."""
    parameters = own_server.connection_parameters()
    batchctl = Command(tmp_path, psycopg.conninfo.make_conninfo(**parameters))
    batchctl.configure(DAILY)
    postmaster = int((own_server._data / "postmaster.pid").read_text().split()[0])
    os.kill(postmaster, signal.SIGSTOP)
    try:
        found = checks(batchctl, code=69)
    finally:
        os.kill(postmaster, signal.SIGCONT)
    assert worst(found, "database") == "error"
    assert found["step"][0]["state"] == "ok"


def write(text):
    assert crontab("-", text=text).returncode == 0


def test_the_lines_of_a_crontab(tmp_path):
    if shutil.which("crontab", path=TOOLS) is None:
        skip_or_fail("cron is not installed (apt-get install cron)")
    with cron_to_itself(), crontab_of_root(b"# nothing\n"):
        look_at_crontabs(Command(tmp_path, NOWHERE))


def look_at_crontabs(batchctl):
    batchctl.configure(DAILY)

    def lines():
        return [(each["state"], each["found"]) for each in checks(batchctl)["crontab"]]

    ((state, text),) = lines()
    assert (state, "no line of this user's crontab names" in text) == ("warning", True)
    batchctl("crontab", "install", "--yes")
    assert [state for state, _ in lines()] == ["ok"]
    # By a relative name it is found here only, but the lines name it, so that is no matter.
    assert worst(checks(batchctl), "configuration") != "warning"
    installed = installed_crontab()
    write(installed.replace(b"0 1 * * *", b"0 2 * * *"))
    ((state, text),) = lines()
    assert (state, "0 2 * * *" in text, "0 1 * * *" in text) == ("warning", True, True)
    # A line by hand that starts the same is named, one that starts nothing is not.
    for command, expected in ((b"run-batch", ["warning", "ok"]), (b"status", ["ok"])):
        line = b"0 3 * * * %s --config %s %s\n" % (bytes(PROGRAM), bytes(batchctl.config), command)
        write(installed + line)
        assert [state for state, _ in lines()] == expected
    # The program that the lines name is looked at too, and the markers.
    write(installed.replace(bytes(PROGRAM), b"/opt/gone/bin/batchctl"))
    programs = {each["found"].split()[0]: each["state"] for each in checks(batchctl)["program"]}
    assert programs["/opt/gone/bin/batchctl"] == "error"
    write(installed.replace(b"# END", b"# The end"))
    ((state, text),) = lines()
    assert (state, "damaged" in text) == ("error", True)
