"""crontab.example: parsed as cron parses it, and each of its commands run as cron runs it."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import psycopg
import pytest
from cronsim import CronSim
from support import CRONTAB_CONFIGURATION, CRONTAB_EXAMPLE, FACT_EVENTS, skip_or_fail

from batchctl.clock import SystemClock
from batchctl.config import Rollup
from batchctl.schedule import cron
from batchctl.state.embedded import EmbeddedServer

PROJECT = Path(__file__).resolve().parents[2]
EXAMPLE = CRONTAB_EXAMPLE
PROGRAM = "/opt/batchctl/.venv/bin/batchctl"
CONFIG = "/etc/batchctl.toml"
CALL = f"{PROGRAM} --config {CONFIG}"
DAY = datetime(2026, 1, 1, tzinfo=UTC)
LIMIT = 60  # seconds; a line takes its sleep and a second or two
SKIPPED = 75

EVENTS = """
INSERT INTO fact_events
SELECT now() - interval '3 hours' + n * interval '1 second', 'view', 'item ' || n % 7, n
FROM generate_series(1, 3600) n;
"""


class Job(NamedTuple):
    """A crontab line as crontab(5) reads it."""

    schedule: str
    command: str
    stdin: str


class Installation(NamedTuple):
    """A program, and a configuration with a database of its own."""

    program: Path
    config: Path
    server: EmbeddedServer

    def run(self, *arguments: str) -> None:
        subprocess.run([self.program, "--config", self.config, *arguments], check=True, timeout=LIMIT)

    def totals(self) -> dict[str, tuple[int, int]]:
        counted = {"fact_events": "count(*), sum(value)"} | dict.fromkeys(
            ("agg_1m", "agg_5m", "agg_1h"), "coalesce(sum(events), 0), coalesce(sum(value_sum), 0)"
        )
        with psycopg.connect(**self.server.connection_parameters()) as connection:
            return {
                table: tuple(map(int, connection.execute(f"SELECT {columns} FROM {table}").fetchone()))
                for table, columns in counted.items()
            }


def unescape(command: str) -> tuple[str, str]:
    command, _, stdin = re.sub(r"(?<!\\)%", "\n", command).partition("\n")
    return command.replace("\\%", "%"), stdin.replace("\\%", "%")


def parse(text: str) -> tuple[dict[str, str], list[Job]]:
    """Read a user's crontab: assignments, and lines of five fields and a command."""
    environment, jobs = {}, []
    for line in text.splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if assignment := re.fullmatch(r"\s*(\w+)\s*=\s*(.*?)\s*", line):
            name, value = assignment.groups()
            environment[name] = value[1:-1] if re.fullmatch(r"(\"|').*\1", value) else value
        else:
            *fields, command = line.split(maxsplit=5)
            jobs.append(Job(" ".join(fields), *unescape(command)))
    return environment, jobs


def uncommented(text: str) -> list[Job]:
    """Read the lines that only a `# ` keeps from being jobs."""
    _, jobs = parse("\n".join(re.findall(r"^# ((?:[\d*][\d*/,-]* +){5}.*)$", text, re.MULTILINE)))
    return jobs


def start_of(job: Job) -> tuple[str, timedelta]:
    sleep = re.match(r"sleep (\d+); +/", job.command)
    return job.schedule, timedelta(seconds=int(sleep[1]) if sleep else 0)


def start(job: Job, installation: Installation, home: Path) -> subprocess.Popen[bytes]:
    """Start a job as cron does: sh -c, a bare environment, the home directory, no terminal."""
    environment, _ = parse(EXAMPLE.read_text())
    command = job.command.replace(PROGRAM, str(installation.program)).replace(CONFIG, str(installation.config))
    return subprocess.Popen(
        [environment["SHELL"], "-c", command],
        cwd=home,
        env={"HOME": str(home), "LOGNAME": pwd.getpwuid(os.geteuid()).pw_name, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def result(process: subprocess.Popen[bytes]) -> tuple[int, bytes, bytes]:
    stdout, stderr = process.communicate(timeout=LIMIT)
    return process.returncode, stdout, stderr


@pytest.fixture(scope="module")
def installation(tmp_path_factory):
    directory = tmp_path_factory.mktemp("crontab")
    config = directory / "batchctl.toml"
    config.write_text(CRONTAB_CONFIGURATION)
    server = EmbeddedServer(directory / "state" / "postgresql", SystemClock())
    try:
        server.start()
        with psycopg.connect(**server.connection_parameters()) as connection:
            connection.execute(FACT_EVENTS + EVENTS)
        installation = Installation(Path(sys.executable).with_name("batchctl"), config, server)
        installation.run("migrate")
        yield installation
    finally:
        server.stop()


@pytest.fixture
def home(tmp_path):
    return tmp_path


EXAMPLE_ENVIRONMENT, JOBS = parse(EXAMPLE.read_text())
ALTERNATIVE, WITH_PERCENT = uncommented(EXAMPLE.read_text())


@pytest.mark.parametrize(
    ("line", "job"),
    [
        ("0 1 * * *  date +\\%F", Job("0 1 * * *", "date +%F", "")),
        ("0 1 * * *\tcat%one%two \\% of", Job("0 1 * * *", "cat", "one\ntwo % of")),
        ("0 1 * * *  A=1 true", Job("0 1 * * *", "A=1 true", "")),
    ],
)
def test_the_parser_knows_what_cron_does_to_a_percent_sign(line, job):
    assert parse(f"A = 'b c'\n# {line}\n\n{line}\n") == ({"A": "b c"}, [job])


def test_the_schedules_are_the_promised_ones():
    assert [(start_of(job), job.command.rpartition(CALL)[2]) for job in JOBS] == [
        (("0 1 * * *", timedelta(0)), " run-batch daily"),
        (("* * * * *", timedelta(seconds=5)), " aggregate --grain 1m"),
        (("*/5 * * * *", timedelta(seconds=15)), " aggregate --grain 5m"),
        (("1 * * * *", timedelta(0)), " aggregate --grain 1h"),
    ]
    assert start_of(ALTERNATIVE) == ("* * * * *", timedelta(seconds=5))
    assert ALTERNATIVE.command.endswith(f"{CALL} aggregate")


def test_the_schedules_are_the_configurations_defaults():
    rollup = Rollup(source="s", time="t", measures={"events": "count(*)"})
    written = {job.command.rpartition("--grain ")[2]: start_of(job) for job in JOBS if "--grain" in job.command}
    assert written == {
        grain: (schedule, rollup.offset.get(grain, timedelta(0))) for grain, schedule in rollup.schedule.items()
    }


@pytest.mark.parametrize(
    ("job", "minutes"),
    [
        (JOBS[0], {60}),
        (JOBS[1], {*range(1440)}),
        (JOBS[2], {*range(0, 1440, 5)}),
        (JOBS[3], {*range(1, 1440, 60)}),
        (ALTERNATIVE, {*range(1440)}),
    ],
)
def test_the_schedules_mean_what_the_comments_say(job, minutes):
    assert cron.problem(job.schedule) is None
    times = CronSim(job.schedule, DAY - timedelta(minutes=1))
    found = set()
    while (moment := next(times)) < DAY + timedelta(days=1):
        found.add((moment - DAY) // timedelta(minutes=1))
    assert found == minutes


def test_every_line_names_the_program_and_the_configuration_by_their_absolute_paths():
    assert all(len(re.findall(rf"(?:^|; +){CALL} ", job.command)) == 1 for job in [*JOBS, ALTERNATIVE, WITH_PERCENT])
    assert all(job.stdin == "" for job in [*JOBS, ALTERNATIVE, WITH_PERCENT])


def test_crontab_show_asks_for_the_same_jobs(tmp_path):
    config = tmp_path / "batchctl.toml"
    config.write_text(CRONTAB_CONFIGURATION)
    arguments = [Path(sys.executable).with_name("batchctl"), "--config", config, "crontab", "show"]
    shown = subprocess.run(arguments, capture_output=True, text=True, check=True, env={"PATH": "/usr/bin:/bin"}).stdout
    shown = shown.replace(str(arguments[0]), PROGRAM).replace(str(config), CONFIG)
    environment, jobs = parse(shown)
    # A variable would hold for the lines of others below, so the batch's line carries its own.
    assert environment == {}
    path = f"/usr/bin/env PATH={EXAMPLE_ENVIRONMENT['PATH']} "
    assert jobs[0].command.startswith(path)
    assert [job._replace(command=job.command.removeprefix(path)) for job in jobs] == JOBS


def test_the_line_for_etc_cron_d_is_the_batch_with_a_user():
    ((schedule, user, command),) = re.findall(
        r"^#   ((?:\S+ ){4}\S+)  (\S+)  (/.*)$", EXAMPLE.read_text(), re.MULTILINE
    )
    assert (schedule, user, command) == (JOBS[0].schedule, "root", JOBS[0].command)


def test_the_readme_shows_these_lines():
    shown = re.findall(r"^```crontab\n(.*?)^```", (PROJECT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert [parse(block)[1] for block in shown] == [JOBS]
    assert set("".join(shown).splitlines()) <= set(EXAMPLE.read_text().splitlines())


def test_paths_are_set_and_nothing_is_expanded_in_an_assignment():
    assert EXAMPLE_ENVIRONMENT["SHELL"] == "/bin/sh"
    assert {"/usr/local/bin", "/usr/bin", "/bin"} <= set(EXAMPLE_ENVIRONMENT["PATH"].split(":"))
    assert not any("$" in value or "~" in value for value in EXAMPLE_ENVIRONMENT.values())
    assert "MAILTO" not in EXAMPLE_ENVIRONMENT


def test_debian_takes_the_file(tmp_path):
    crontab = shutil.which("crontab", path="/usr/bin:/bin")
    if crontab is None:
        skip_or_fail("cron is not installed (apt-get install cron)")
    # The -n of Debian 12 and later; to other crons it means other things.
    if b"dry run" not in subprocess.run([crontab, "-h"], capture_output=True, check=False).stderr:
        pytest.skip("this crontab has no dry run; the test with the real cron installs the lines")
    wrong = tmp_path / "wrong"
    wrong.write_text(EXAMPLE.read_text().replace("0 1 * * *", "0 1 * 13 *"))
    assert [
        subprocess.run([crontab, "-n", file], capture_output=True, check=False).returncode for file in (EXAMPLE, wrong)
    ] == [0, 1]


def test_every_line_does_its_work_and_prints_nothing(installation, home):
    began = time.monotonic()
    # All at once, as cron starts what falls on the same minute.
    running = [start(job, installation, home) for job in JOBS]
    assert [(job.command, result(process)) for job, process in zip(JOBS, running, strict=True)] == [
        (job.command, (0, b"", b"")) for job in JOBS
    ]
    assert time.monotonic() - began >= 15
    # Two minutes that overlap: one of them may find the grains taken.
    both = [result(process) for process in [start(ALTERNATIVE, installation, home) for _ in range(2)]]
    assert (0, b"", b"") in both
    assert set(both) <= {(0, b"", b""), (SKIPPED, b"", b"")}
    totals = installation.totals()
    assert totals == dict.fromkeys(totals, (3600, 3600 * 3601 // 2))
    assert list(home.iterdir()) == []


def test_the_line_with_a_percent_sign_writes_its_file_and_prints_nothing(installation, home):
    assert result(start(WITH_PERCENT, installation, home))[1:] == (b"", b"")
    (file,) = home.iterdir()
    assert re.fullmatch(r"batch-\d{4}-\d\d-\d\d\.log", file.name)
    assert "[daily]" in file.read_text()


def test_an_error_is_worth_a_mail(installation, home, tmp_path):
    broken = installation._replace(config=tmp_path / "missing.toml")
    code, stdout, stderr = result(start(JOBS[0], broken, home))
    assert (code, stdout, stderr.count(b"\n")) == (78, b"", 1)
    assert b"missing.toml" in stderr
