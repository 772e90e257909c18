"""The lines of crontab.example under Debian's cron: new events arrive in agg_1m, and nobody gets a mail."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import stat
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psycopg
import pytest
from cron_of_system import TOOLS, cron_daemon, cron_to_itself, crontab_of_root, processes_naming
from support import CRONTAB_CONFIGURATION, CRONTAB_EXAMPLE, FACT_EVENTS, skip_or_fail

from batchctl.clock import SystemClock
from batchctl.state.embedded import EmbeddedServer

EXAMPLE = CRONTAB_EXAMPLE
PROGRAM = "/opt/batchctl/.venv/bin/batchctl"
CONFIG = "/etc/batchctl.toml"
SENDMAIL = Path("/usr/sbin/sendmail")
EVENTS = 25
LIMIT = 150  # seconds; cron needs up to one minute, and second 5 of the one after the events
JOBS_LIMIT = 90  # seconds for the last jobs to end

ARRIVE = "INSERT INTO fact_events SELECT now(), 'view', 'item ' || n %% 3, n FROM generate_series(1, %s) n"


class Installation(NamedTuple):
    """A program, and a configuration with a database of its own."""

    program: Path
    config: Path
    server: EmbeddedServer

    def query(self, statement: str, *parameters: object) -> tuple[object, ...] | None:
        with psycopg.connect(**self.server.connection_parameters()) as connection:
            cursor = connection.execute(statement, parameters)
            return cursor.fetchone() if cursor.description else None


def wait_for(condition, limit: float, step: float = 0.5) -> bool:
    end = time.monotonic() + limit
    while not condition():
        if time.monotonic() >= end:
            return False
        time.sleep(step)
    return True


@contextmanager
def mails_of_cron(directory: Path):
    """Lend a shell for the crontab, and a function that returns what cron has mailed."""
    shell = Path("/bin/sh")
    kept = f'"$(mktemp {directory}/mail.XXXXXX)"'
    own = not SENDMAIL.exists()
    if own:
        # Without a sendmail cron throws away what the jobs print.
        SENDMAIL.write_text(f"#!/bin/sh\nexec cat >{kept}\n")
        SENDMAIL.chmod(0o755)
    else:
        # Not to be replaced on a machine that sends mails: a shell in between keeps what the jobs print.
        shell = directory / "shell"
        shell.write_text(
            f'#!/bin/sh\nout={directory}/$$\n/bin/sh "$@" >$out 2>&1\n'
            f'[ ! -s $out ] || {{ echo "$2"; cat $out; }} >{kept}\nrm $out\n'
        )
        shell.chmod(0o755)
    try:
        yield shell, lambda: [path.read_text(errors="replace") for path in directory.glob("mail.*")]
    finally:
        if own:
            SENDMAIL.unlink()


@pytest.fixture
def installation(tmp_path):
    program = Path(sys.executable).with_name("batchctl")
    config = tmp_path / "batchctl.toml"
    config.write_text(CRONTAB_CONFIGURATION)
    server = EmbeddedServer(tmp_path / "state" / "postgresql", SystemClock())
    installation = Installation(program, config, server)
    try:
        server.start()
        installation.query(FACT_EVENTS)
        subprocess.run([program, "--config", config, "migrate"], check=True, timeout=60)
        yield installation
    finally:
        # A job that cron has just started would start the server again.
        ended = wait_for(lambda: not processes_naming(config), JOBS_LIMIT)
        server.stop()
        assert ended, processes_naming(config)


def test_new_events_are_aggregated_within_two_minutes_and_without_a_mail(tmp_path, request):
    if os.geteuid() != 0:
        skip_or_fail("only root may start cron and change root's crontab")
    if shutil.which("cron", path=TOOLS) is None or shutil.which("crontab", path=TOOLS) is None:
        skip_or_fail("cron is not installed (apt-get install cron)")
    installation = request.getfixturevalue("installation")
    mails = tmp_path / "mails"
    mails.mkdir()
    lines = EXAMPLE.read_text().replace(PROGRAM, str(installation.program)).replace(CONFIG, str(installation.config))
    seen = tmp_path / "environment"
    controls = f"* * * * * echo hello\n* * * * * env >{seen}\n"

    with (
        cron_to_itself(),
        mails_of_cron(mails) as (shell, received),
        cron_daemon(),
        crontab_of_root((lines.replace("SHELL=/bin/sh", f"SHELL={shell}") + controls).encode()),
    ):
        installation.query(ARRIVE, EVENTS)
        began = time.monotonic()
        query = "SELECT coalesce(sum(events), 0), coalesce(sum(value_sum), 0) FROM agg_1m"
        expected = (EVENTS, EVENTS * (EVENTS + 1) // 2)
        arrived = wait_for(lambda: installation.query(query) == expected, LIMIT)
        took = time.monotonic() - began
        # The mail of a line is sent when it ends, and the last to end started with the one that was waited for.
        wait_for(lambda: received() and not processes_naming(installation.config), 30)
        time.sleep(1)
        mails_received = received()

    hello = [mail for mail in mails_received if "echo hello" in mail and mail.endswith("\nhello\n")]
    assert hello, f"cron mailed nothing of a line that prints, so no mail proves nothing; {mails_received}"
    assert [mail for mail in mails_received if mail not in hello] == []
    assert arrived, f"after {took:.0f} s agg_1m has {installation.query(query)}"
    assert took <= 125
    environment = dict(re.findall(r"^(\w+)=(.*)$", seen.read_text(), re.MULTILINE))
    assert environment["PATH"] == re.search(r"^PATH=(.*)$", EXAMPLE.read_text(), re.MULTILINE)[1]
    assert environment["HOME"] == pwd.getpwuid(0).pw_dir
    assert "TERM" not in environment
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700
