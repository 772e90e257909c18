"""What the doctor says of cron, the locale, time zones, and of itself in cron's environment."""

from __future__ import annotations

import json
import os
import pwd
import re
import subprocess
import sys
import textwrap
from datetime import UTC, datetime

import pytest
from support import gone, wait_for

from batchctl.clock import SystemClock
from batchctl.doctor import cron
from batchctl.doctor.cron import Lines, _allowed, _in_system
from batchctl.doctor.cron_environment import examine_as_cron
from batchctl.doctor.finding import CHECKS, error, exit_code, ok, raised, warning
from batchctl.doctor.surroundings import check_locale, check_timezone
from batchctl.errors import BatchctlError, ConfigurationError, DatabaseUnavailableError, ExitCode

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def states(findings):
    return [finding.state for finding in findings]


def test_the_exit_code_is_that_of_a_job():
    bad = [error("step", "a", "b"), warning("disk", "a", "b")]
    assert exit_code([ok("disk", "a"), warning("disk", "a", "b")]) == ExitCode.DONE
    assert exit_code(bad) == ExitCode.FAILED
    lost = raised("database", DatabaseUnavailableError("away"))
    assert exit_code([*bad, lost]) == ExitCode.DATABASE_UNREACHABLE
    assert exit_code([*bad, lost, raised("configuration", ConfigurationError("x; do y"))]) == ExitCode.CONFIGURATION


def test_an_error_is_split_into_what_was_found_and_what_to_do():
    found = raised("configuration", ConfigurationError("it is so; and so; do this"))
    assert (found.found, found.advice) == ("it is so; and so", "do this")
    assert raised("database", BatchctlError("it is so"), "do that").advice == "do that"


def test_locales():
    assert states(check_locale({"LANG": "C.UTF-8"})) == ["ok"]
    assert states(check_locale({"LANG": "C.UTF-8", "LC_ALL": "C"})) == ["warning"]
    assert states(check_locale({})) == ["warning"]
    (found,) = check_locale({"LANG": "xx_XX.UTF-8"})
    assert "not installed" in found.found


def zones(configured, environment=None, cron_zone=None, translated=False):
    return list(check_timezone(configured, NOW, environment or {}, cron_zone=cron_zone, translated=translated))


def test_time_zones_that_disagree():
    system = next(iter(zones(None)))
    assert system.state == "ok", system
    far = "Pacific/Kiritimati"  # where no machine that runs tests is set to
    (found,) = zones(far)
    assert (found.state, far in found.found) == ("warning", True)
    assert states(zones(far, translated=True)) == ["ok"]
    assert states(zones(None, {"TZ": far})) == ["warning"]
    assert states(zones(None, {"TZ": f":{far}"})) == ["warning"]
    assert states(zones(None, cron_zone=far)) == ["warning"]
    # London is an hour from UTC in summer only: one instant alone would not tell.
    london, utc = states(zones("Europe/London")), states(zones("UTC"))
    assert "warning" in london + utc


@pytest.mark.parametrize(
    ("allow", "deny", "allowed"),
    [
        (None, None, True),
        ("me\nyou\n", None, True),
        ("you\n", None, False),
        (None, "me\n", False),
        ("me\n", "me\n", True),
    ],
)
def test_who_may_have_a_crontab(tmp_path, allow, deny, allowed):
    for name, text in (("cron.allow", allow), ("cron.deny", deny)):
        if text is not None:
            (tmp_path / name).write_text(text)
    assert states(_allowed("me", tmp_path)) == ([] if allowed else ["error"])
    assert states(_allowed("root", tmp_path)) == []


def test_files_of_the_system_that_cron_would_pass_over(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("the files have to be root's")
    configuration = tmp_path / "batchctl.toml"
    line = f"* * * * * root /opt/bin/batchctl --config {configuration} aggregate\n"
    (tmp_path / "cron.d").mkdir()
    cases = {
        "batchctl": (line, 0o644),
        "batchctl.cron": (line, 0o644),
        "open": (line, 0o664),
        "short": (line[:-1], 0o644),
    }
    cases["comment"] = (f"# {line}", 0o644)
    for name, (text, mode) in cases.items():
        (tmp_path / "cron.d" / name).write_text(text)
        (tmp_path / "cron.d" / name).chmod(mode)
    (tmp_path / "crontab").write_text("# nothing of ours\n")
    found = {}
    for each in _in_system(configuration, tmp_path):
        (name,) = [name for name in cases if re.search(rf"/{re.escape(name)}[: ]", each.found)]
        found[name] = each.state
    assert found == {"batchctl": "ok", "batchctl.cron": "error", "open": "error", "short": "error"}


def test_the_path_that_cron_gives():
    line = "0 1 * * *  /usr/bin/env PATH=/opt/tools:/bin /opt/bin/batchctl --config /etc/b.toml run-batch daily"
    assert Lines(None, ()).path("daily") == "/usr/bin:/bin"
    assert Lines(b"PATH=/a:/b\n", ()).path("daily") == "/a:/b"
    assert Lines(b"PATH=/a:/b\n", (line,)).path("daily") == "/opt/tools:/bin"
    assert Lines(b'PATH = "/a"\n', (line,)).path("other") == "/a"
    assert [str(program) for program in Lines(None, (line,)).programs] == ["/opt/bin/batchctl"]


def test_a_cron_that_runs_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(cron, "PID_FILES", ())
    monkeypatch.setattr(cron, "DAEMONS", {"doctors-cron"})
    assert [each.state for each in cron.check_cron(SystemClock(), tmp_path)] in (["error"], ["warning"])
    program = tmp_path / "doctors-cron"
    program.symlink_to("/bin/sleep")
    process = subprocess.Popen([program, "60"])
    try:
        wait_for(lambda: cron.daemon() == process.pid, what="the daemon")
        assert states(cron.check_cron(SystemClock(), tmp_path)) == ["ok"]

        class Later(SystemClock):
            """As if the time zone had been set just now, and the daemon were older."""

            def now(self):
                return datetime.fromtimestamp(os.lstat("/etc/localtime").st_mtime - 1, UTC)

        assert states(cron.check_cron(Later(), tmp_path)) == ["warning"]
        process.kill()
        wait_for(lambda: gone(process.pid), what="its end")
        assert cron.daemon() is None, "a zombie starts nothing"
    finally:
        process.kill()
        process.wait()


def script(tmp_path, text):
    program = tmp_path / "batchctl"
    program.write_text(f"#!{sys.executable}\n{textwrap.dedent(text)}")
    program.chmod(0o755)
    return (str(program),)


def test_as_cron_nothing_is_set_but_what_cron_sets(tmp_path):
    program = script(
        tmp_path,
        """
        import json, os, sys
        values = dict(os.environ)
        values.pop("LC_CTYPE", None)  # Python's own, where there is no LANG
        for name in ("PWD", "OLDPWD", "SHLVL", "_"):
            values.pop(name, None)  # the shell's
        own_session = os.getsid(0) in (os.getpid(), os.getppid())
        found = [values, os.getcwd(), own_session, sys.stdout.isatty(), sys.argv[1:]]
        check = {"check": "program", "state": "ok", "found": json.dumps(found), "advice": None, "exit_code": None}
        print(json.dumps({"version": 1, "checks": [check]}))
        """,
    )
    first, missing, said = examine_as_cron((*program, "--config", "a b"), "/usr/bin", {"PGPASSWORD": "x", "OTHER": "y"})
    assert (first.check, first.state, missing.state) == ("environment", "ok", "warning")
    assert "PGPASSWORD" in missing.found
    assert "OTHER" not in missing.found
    environment, directory, own_session, terminal, arguments = json.loads(said.found)
    entry = pwd.getpwuid(os.geteuid())
    assert environment == {"HOME": entry.pw_dir, "LOGNAME": entry.pw_name, "SHELL": "/bin/sh", "PATH": "/usr/bin"}
    assert directory == os.path.realpath(entry.pw_dir)
    assert (own_session, terminal) == (True, False)
    assert arguments == ["--config", "a b", "doctor", "--json"]


def test_as_cron_a_program_that_does_not_start_is_said(tmp_path):
    with pytest.raises(BatchctlError, match=r"ended with 7 and said: oh no"):
        examine_as_cron(script(tmp_path, "import sys\nsys.stderr.write('oh no')\nsys.exit(7)"), "/usr/bin", {})
    with pytest.raises(BatchctlError, match="ended with 127"):
        examine_as_cron((str(tmp_path / "gone"),), "/usr/bin", {})


def test_the_checks_are_named_once():
    assert len(set(CHECKS)) == len(CHECKS)
