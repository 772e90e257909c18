"""crontab show, install, remove: on the real crontab of a user who is made for the test."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from cron_of_system import SPOOL, TOOLS, cron_daemon, cron_to_itself, crontab, crontab_of_root, processes_naming
from support import CRONTAB_CONFIGURATION, FACT_EVENTS, Command, embedded_connection, skip_or_fail, wait_for

from batchctl.clock import SystemClock
from batchctl.schedule.crontab_lines import DEFAULT_PATH
from batchctl.state.embedded import EmbeddedServer

SOMEBODY = "batchctl-cron"
FOREIGN = (
    b"# my jobs, by hand\n"
    b'MAILTO=""\nPATH=/usr/bin:/bin\n\n'
    b"30 2 * * 0\t/usr/bin/true \\%  # weekly \xe9\r\n"
    b"  @reboot printf 'a\\r\\n'\n#\0\b\n"
)
DENIED = Path("/etc/cron.deny")


def spooled(user: str) -> bytes | None:
    """Read the file itself, without Debian's three lines above; `crontab -l` does not show every byte as it is."""
    try:
        return (SPOOL / user).read_bytes().split(b"\n", 3)[3]
    except FileNotFoundError:
        return None


class Somebody(Command):
    """The program as a user who has a crontab of the own."""

    def crontab(self, *arguments: str, text: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            ["crontab", "-u", SOMEBODY, *arguments],
            input=text,
            capture_output=True,
            check=False,
            env={"PATH": TOOLS, "LC_ALL": "C"},
        )

    @property
    def lines(self) -> bytes | None:
        return spooled(SOMEBODY)

    def has(self, text: bytes | None) -> None:
        """Give the user this crontab."""
        done = self.crontab("-r") if text is None else self.crontab("-", text=text)
        assert done.returncode == 0 or text is None, done
        assert self.lines == text


@contextmanager
def made(name):
    subprocess.run(["useradd", "-M", "-s", "/bin/sh", name], check=True, env={"PATH": TOOLS})
    try:
        yield pwd.getpwnam(name)
    finally:
        subprocess.run(["crontab", "-u", name, "-r"], check=False, capture_output=True, env={"PATH": TOOLS})
        subprocess.run(["userdel", name], check=True, capture_output=True, env={"PATH": TOOLS})


@pytest.fixture(scope="module")
def account():
    if os.geteuid() != 0:
        pytest.skip("only root may make a user for the test")
    for tool in ("crontab", "useradd", "setpriv"):
        if shutil.which(tool, path=TOOLS) is None:
            skip_or_fail(f"{tool} is not installed")
    with made(SOMEBODY) as found:
        yield found


@pytest.fixture
def somebody(account):
    # Below /tmp itself, because pytest's directories are root's.
    directory = Path(tempfile.mkdtemp())
    os.chown(directory, account.pw_uid, account.pw_gid)
    identity = (f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--clear-groups")
    command = Somebody(directory, None, program=("setpriv", *identity, sys.executable, "-m", "batchctl"))
    command.config.write_text(CRONTAB_CONFIGURATION)
    try:
        if command("--version", code=None).returncode != 0:
            skip_or_fail("another user cannot read this Python or its packages")
        command.has(None)
        yield command
    finally:
        command.crontab("-r")
        shutil.rmtree(directory)


@pytest.mark.parametrize("before", [None, FOREIGN, b"# a comment without a newline", b"A=1\n\n\n"])
def test_install_twice_and_remove_leave_the_crontab_as_it_was(somebody, before):
    somebody.has(before)
    shown = somebody("crontab", "show").stdout.encode()
    for _ in range(2):
        done = somebody("crontab", "install", "--yes")
        assert (done.stdout, done.stderr) == ("", "")
        installed = somebody.lines
        added = b"" if before is None else before if before.endswith(b"\n") else before + b"\n"
        assert installed.startswith(added)
        assert installed.removeprefix(added).replace(b" (newline added above)", b"") == shown
    assert "as it should be" in somebody("-v", "crontab", "install", "--yes").stdout
    done = somebody("crontab", "remove", "--yes")
    assert (done.stdout, done.stderr) == ("", "")
    assert somebody.lines == before
    assert "as it should be" in somebody("-v", "crontab", "remove", "--yes").stdout
    assert somebody.lines == before


def test_a_changed_configuration_changes_its_lines_alone(somebody):
    somebody.has(FOREIGN)
    somebody("crontab", "install", "--yes")
    below = b"15 3 * * * /usr/bin/false\n"
    somebody.has(somebody.lines + below)
    installed = somebody.lines
    somebody.config.write_text(CRONTAB_CONFIGURATION.replace('"0 1 * * *"', '"0 4 * * *"'))
    done = somebody("-v", "crontab", "install", "--yes")
    assert [line[:12] for line in done.stdout.splitlines() if line.startswith(("-0", "+0"))] == [
        "-0 1 * * *  ",
        "+0 4 * * *  ",
    ]
    assert somebody.lines == installed.replace(b"\n0 1 * * *", b"\n0 4 * * *")
    somebody("crontab", "remove", "--yes")
    assert somebody.lines == FOREIGN + below


def test_two_configurations_share_a_crontab(somebody):
    somebody.has(FOREIGN)
    other = somebody.directory / "it's 100% mine.toml"
    other.write_text(CRONTAB_CONFIGURATION)
    somebody("crontab", "install", "--yes")
    first = somebody.lines
    somebody("--config", str(other), "crontab", "install", "--yes")
    assert somebody.lines.startswith(first)
    somebody("crontab", "remove", "--yes")
    assert b"100\\% mine" in somebody.lines
    assert str(somebody.config).encode() not in somebody.lines
    # The configuration is gone, its lines have to go all the same.
    other.unlink()
    somebody("--config", str(other), "crontab", "remove", "--yes")
    assert somebody.lines == FOREIGN


@pytest.mark.parametrize("action", ["install", "remove"])
def test_without_a_terminal_it_has_to_be_told(somebody, action):
    somebody.has(FOREIGN)
    done = somebody("crontab", action, code=2)
    assert done.stdout == ""
    assert "give --yes" in done.stderr
    assert somebody.lines == FOREIGN


@contextmanager
def at_a_terminal(somebody, *arguments):
    """Start the program on a terminal; lend a function that reads until a text is there, and one that types."""
    primary, secondary = os.openpty()
    process = somebody.start(*arguments, stdin=secondary, stdout=secondary, stderr=secondary, text=False)
    os.close(secondary)
    seen = b""

    def read_until(text: bytes) -> str:
        nonlocal seen
        while text not in seen:
            seen += os.read(primary, 4096)
        return seen.decode()

    def answer(text: bytes) -> int:
        os.write(primary, text)
        return process.wait(timeout=60)

    try:
        yield read_until, answer
    finally:
        process.kill()
        process.wait()
        os.close(primary)


@pytest.mark.parametrize(("answer", "code"), [(b"y\n", 0), (b"n\n", 1), (b"\n", 1), (b"\x04", 1)])
def test_on_a_terminal_it_shows_the_difference_and_asks(somebody, answer, code):
    somebody.has(FOREIGN)
    with at_a_terminal(somebody, "crontab", "install") as (read_until, type_in):
        shown = read_until(b"Change the crontab? [y/N] ")
        assert "+++ crontab, new" in shown
        assert f"+# BEGIN batchctl {somebody.config}" in shown
        assert somebody.lines == FOREIGN
        assert type_in(answer) == code
        read_until(b"Installed the lines" if code == 0 else b"Nothing changed")
    assert (somebody.lines != FOREIGN) == (code == 0)


def test_a_crontab_that_was_changed_since_it_was_shown_is_left_alone(somebody):
    somebody.has(FOREIGN)
    with at_a_terminal(somebody, "crontab", "install") as (read_until, type_in):
        read_until(b"[y/N] ")
        somebody.has(FOREIGN + b"0 5 * * * true\n")
        assert type_in(b"y\n") == 1
        read_until(b"was changed meanwhile")
    assert somebody.lines == FOREIGN + b"0 5 * * * true\n"


def test_damaged_markers_are_left_to_a_person(somebody):
    somebody("crontab", "install", "--yes")
    damaged = somebody.lines.replace(b"# END", b"# end")
    somebody.has(damaged)
    for action in ("install", "remove"):
        done = somebody("crontab", action, "--yes", code=1)
        assert f"line 1 (# BEGIN batchctl {somebody.config}): has no END below it" in done.stderr
        assert "crontab -e" in done.stderr
        assert done.stderr.count("\n") == 1
    assert somebody.lines == damaged


def test_what_crontab_refuses_is_said_in_its_words(somebody):
    somebody.has(FOREIGN)
    long = somebody.directory / ("x" * 200) / ("y" * 200) / ("z" * 200) / ("w" * 200) / ("v" * 200)
    long.mkdir(parents=True)
    shutil.copy(somebody.config, long / "batchctl.toml")
    done = somebody("--config", str(long / "batchctl.toml"), "crontab", "install", "--yes", code=1)
    assert "the crontab was not changed: crontab says (exit code 1)" in done.stderr
    assert "command too long" in done.stderr
    assert somebody.lines == FOREIGN


def test_a_user_who_may_have_no_crontab_is_told_so(somebody):
    if DENIED.exists() or DENIED.with_name("cron.allow").exists():
        pytest.skip("who may have a crontab is set up on this machine")
    DENIED.write_text(f"{SOMEBODY}\n")
    try:
        done = somebody("crontab", "install", "--yes", code=1)
    finally:
        DENIED.unlink()
    assert "the crontab cannot be read" in done.stderr
    assert f"You ({SOMEBODY}) are not allowed to use this program" in done.stderr
    assert somebody.lines is None


def test_a_line_by_hand_that_starts_the_same_is_named(somebody):
    by_hand = f"0 1 * * * /opt/batchctl --config {somebody.config} run-batch daily\n".encode()
    somebody.has(by_hand)
    done = somebody("crontab", "install", "--yes")
    assert "warning: line 1 of the crontab is outside the markers" in done.stderr
    assert somebody.lines.startswith(by_hand)


# Without a crontab of the own


@pytest.fixture
def anybody(tmp_path):
    command = Command(tmp_path, None)
    command.configure(CRONTAB_CONFIGURATION.partition("embedded = true\n")[2])
    return command


def test_show_needs_no_crontab_and_prints_what_the_configuration_asks_for(anybody):
    anybody.environment = {"PATH": "/nonexistent"}
    done = anybody("crontab", "show")
    first, *_, last = done.stdout.splitlines()
    assert first == f"# BEGIN batchctl {anybody.config}"
    assert last == f"# END batchctl {anybody.config}"
    assert f"{anybody.program[0]} --config {anybody.config} aggregate --grain 1h" in done.stdout
    assert anybody("crontab", "show", "--yes", code=2).stdout == ""


def test_a_missing_crontab_program_is_named(anybody):
    anybody.environment = {"PATH": "/nonexistent"}
    for action in ("install", "remove"):
        done = anybody("crontab", action, "--yes", code=1)
        assert "crontab is not found in PATH; install cron" in done.stderr


def test_a_configuration_without_a_schedule_is_told_so(anybody):
    anybody.configure("")
    for action in (["show"], ["install", "--yes"]):
        done = anybody("crontab", *action, code=78)
        assert f"{anybody.config}: nothing has a schedule" in done.stderr


def test_a_database_that_cron_will_not_know_is_named(anybody):
    anybody.environment = {"BATCHCTL_DATABASE_URL": "postgresql://u:secret@h/d"}
    done = anybody("crontab", "show")
    assert "warning: $BATCHCTL_DATABASE_URL is set here, but not under cron" in done.stderr
    assert "secret" not in done.stderr + done.stdout


# Under cron


ARRIVE = "INSERT INTO fact_events SELECT now() - interval '3 hours', 'view', 'item', n FROM generate_series(1, 25) n"


def test_cron_runs_the_lines_and_the_others_keep_their_environment(tmp_path):
    if os.geteuid() != 0:
        skip_or_fail("only root may start cron and change root's crontab")
    if shutil.which("cron", path=TOOLS) is None or shutil.which("crontab", path=TOOLS) is None:
        skip_or_fail("cron is not installed (apt-get install cron)")
    # What means something to the shell and to cron, in a path.
    config = tmp_path / 'it\'s 100% "mine" & $HOME.toml'
    config.write_text(CRONTAB_CONFIGURATION.replace('"0 1 * * *"', '"* * * * *"').replace('"echo"', '"collect"'))
    tools = tmp_path / "to ols%"
    tools.mkdir()
    (tools / "collect").write_text(f'#!/bin/sh\necho "$PATH" >{tmp_path}/path\n')
    (tools / "collect").chmod(0o755)
    before = f'MAILTO=""\nPATH=/bin:/usr/bin:/foreign\n* * * * * env >{tmp_path}/above\n# unfinished \r'.encode()
    below = f"* * * * * env >{tmp_path}/below\n".encode()
    command = Command(tmp_path, None, {"PATH": f"{tools}:/usr/bin:/bin"})

    def query(statement):
        with embedded_connection(tmp_path) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchone()[0] if cursor.description else None

    def batchctl(*arguments):
        command("--config", str(config), *arguments)

    server = EmbeddedServer(tmp_path / "state" / "postgresql", SystemClock())
    try:
        server.start()
        query(FACT_EVENTS)
        batchctl("migrate")
        query(ARRIVE)
        with cron_to_itself(), crontab_of_root(before):
            batchctl("crontab", "install", "--yes")
            batchctl("crontab", "install", "--yes")
            installed = spooled("root")
            assert installed.startswith(before + b"\n# BEGIN batchctl ")
            assert b"100\\% " in installed
            crontab("-", text=installed + below)
            with cron_daemon():
                wait_for(lambda: query("SELECT coalesce(sum(events), 0) FROM agg_1m") == 25, 150, "the rollup")
                for name in ("path", "above", "below"):
                    wait_for((tmp_path / name).exists, 70, name)
            batchctl("crontab", "remove", "--yes")
            assert spooled("root") == before + b"\n" + below
    finally:
        # A job that cron has just started would start the server again. A shell that waits for its second still has the
        # name quoted.
        wait_for(lambda: not processes_naming(tmp_path), 90, "the end of cron's jobs")
        server.stop()
    assert (tmp_path / "path").read_text() == f"{tools}:{':'.join(DEFAULT_PATH)}\n"
    for name in ("above", "below"):
        assert "PATH=/bin:/usr/bin:/foreign" in (tmp_path / name).read_text().splitlines()
