"""Machines as they are: rebooted, full, with a private /tmp, with clocks that are set, with terminals that go away."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest
from support import PROGRAM, batch, gone, skip_or_fail, wait_for
from terminal import Terminal

from batchctl.guard.identity import BOOT_ID, identify

DAY_SECONDS = 86_400
NEGATIVE = re.compile(r"[(\s,]-\d+(\.\d+)?[smhd]")
HIDDEN_STEP = "import os; os.closerange(3, 1000); os.execve('/bin/sleep', ['sleep', '300'], {})"
"""A step of which only its recorded process id is left: no lock that it inherited, no environment."""

MOVED_CLOCK = """\
import sys, time
from datetime import timedelta
from pathlib import Path
from batchctl import clock
from batchctl.cli.app import main

moved = Path(sys.argv.pop(1))
now, seconds = clock.SystemClock.now, time.time
clock.SystemClock.now = lambda self: now(self) + timedelta(seconds=int(moved.read_text()))
time.time = lambda: seconds() + int(moved.read_text())
main()
"""


@dataclass
class Namespace:
    """A mount namespace that lives until its process is killed."""

    process: subprocess.Popen

    @property
    def program(self) -> tuple[str, ...]:
        return ("nsenter", f"--target={self.process.pid}", "--mount", str(PROGRAM))

    def path(self, path: Path) -> Path:
        """Name a path of the namespace from outside."""
        return Path(f"/proc/{self.process.pid}/root{path}")


@contextmanager
def namespace(*mounts: str):
    """Make a mount namespace of its own with these mounts; they are gone with its last process."""
    lines = " && ".join(f"mount {mount}" for mount in mounts)
    process = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", f"{lines} && echo ready && exec sleep 600"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        if process.stdout.readline() != "ready\n":
            skip_or_fail(f"no mount namespaces here: {process.stderr.read()}")
        yield Namespace(process)
    finally:
        process.kill()
        process.communicate()


def runs(url):
    with psycopg.connect(url) as connection:
        return connection.execute("SELECT outcome FROM batchctl.run ORDER BY started_at").fetchall()


def recorded_step(url):
    with psycopg.connect(url) as connection:
        return connection.execute("SELECT pid FROM batchctl.step_run WHERE pid IS NOT NULL").fetchone()


@pytest.fixture
def orphan(batchctl):
    """A step that has outlived its batchctl and is known by its record alone."""
    command = json.dumps([sys.executable, "-c", HIDDEN_STEP])
    batchctl.configure(f'[batch.daily]\n[[batch.daily.step]]\nid = "31"\ncommand = {command}\n')
    process = batchctl.start("run-batch")
    (pid,) = wait_for(lambda: recorded(batchctl.url), what="the record of the step")
    process.kill()
    process.communicate()
    wait_for(lambda: Path(f"/proc/{pid}/comm").read_text() == "sleep\n", what="the hidden step")
    yield pid
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def recorded(url):
    """Return the recorded process id of the step, nothing before there is a schema."""
    with suppress(psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
        return recorded_step(url)
    return None


# Reboot and namespaces


def test_after_a_reboot_recorded_processes_are_others_even_with_the_same_number_and_start(batchctl, orphan):
    """The record fits a live process to the tick; only the boot is another."""
    assert identify(orphan).start_ticks
    with namespace(f"--bind {write(batchctl.directory / 'boot_id', 'another-boot')} {BOOT_ID}") as rebooted:
        assert batchctl.json("run-batch", code=75)["reason"] == "orphans"
        batchctl.configure(batch([("31", "true")]))
        after = replace(batchctl, program=rebooted.program)
        assert after.json("run-batch")["outcome"] == "success"
    assert runs(batchctl.url) == [("crashed",), ("success",)]


def write(path, text):
    path.write_text(text)
    return path


def test_two_private_tmps_are_two_hosts(batchctl):
    """The same state_dir in two namespaces: what one cannot see of the other, the table knows."""
    hidden = batchctl.directory / "tmp"
    hidden.mkdir()
    steps = batch([("31", "echo $$ > step.pid; while ! test -e over; do sleep 0.05; done")])
    text = f'timezone = "UTC"\nstate_dir = "tmp/state"\n[database]\nurl = {json.dumps(batchctl.url)}\n'
    batchctl.config.write_text(text + steps)
    private = f"-t tmpfs tmpfs {hidden}"
    with namespace(private) as one, namespace(private) as two:
        first, second = (replace(batchctl, program=each.program) for each in (one, two))
        process = first.start("run-batch", "--json")
        step = batchctl.pid()
        try:
            # From the other namespace, and from outside, where /tmp is the machine's own.
            for other in (second, batchctl):
                skipped = other.json("run-batch", code=75)
                assert (skipped["reason"], skipped["holder"]["pid"]) == ("running_elsewhere", process.pid)
            assert first.json("run-batch", code=75)["reason"] == "running"
            process.kill()
            process.communicate()
            for other in (second, batchctl):
                assert other.json("run-batch", code=75)["reason"] == "running_elsewhere"
            assert first.json("run-batch", code=75)["reason"] == "orphans"
        finally:
            (batchctl.directory / "over").touch()
        wait_for(lambda: gone(step))
        assert first.json("run-batch")["outcome"] == "success"
        assert second.json("run-batch", code=75)["reason"] == "gap"


# A full disk


@pytest.fixture
def small_disk(batchctl):
    """A state directory on a disk of 1 MB."""
    state = batchctl.directory / "state"
    state.mkdir(mode=0o700)
    with namespace(f"-t tmpfs -o size=1m,mode=700 tmpfs {state}") as disk:
        yield replace(batchctl, program=disk.program), disk.path(state)


def fill(directory):
    """Use up the space to the last byte, also what has become free since."""
    with suppress(OSError), (directory / "filler").open("ab", buffering=0) as file:
        while True:
            file.write(bytes(512))


@pytest.mark.parametrize("known", [False, True], ids=["the first start", "a later start"])
def test_a_disk_that_is_full_before_the_start(small_disk, known):
    batchctl, state = small_disk
    batchctl.configure(batch([("31", "touch ran")], 'min_gap = "0s"'))
    before = [("success",)] * known
    if known:
        batchctl("run-batch")
        (batchctl.directory / "ran").unlink()
    fill(state)
    full = os.strerror(errno.ENOSPC)
    done = batchctl("run-batch", code=78)
    error, *rest = done.stderr.splitlines()
    assert full in error
    # Whether the log has room for another line depends on how full its last block is.
    assert rest in (
        [],
        [f"batchctl: log {batchctl.directory}/state/log/daily.log cannot be written: {full}; its lines are lost"],
    )
    assert not (batchctl.directory / "ran").exists()
    (state / "filler").unlink()
    if known:
        assert runs(batchctl.url) == before
    assert batchctl.json("run-batch")["outcome"] == "success"
    assert runs(batchctl.url) == [*before, ("success",)]


def test_a_disk_that_becomes_full_in_the_middle(small_disk):
    batchctl, state = small_disk
    steps = [("31", "touch filling; while ! test -e full; do sleep 0.05; done"), ("32", "echo lost"), ("33", "true")]
    batchctl.configure(batch(steps, 'accounts = ["a", "b"]'))
    process = batchctl.start("run-batch", "--json")
    wait_for((batchctl.directory / "filling").exists)
    fill(state)
    (batchctl.directory / "full").touch()
    stdout, stderr = process.communicate(timeout=60)
    # What the step could not write is its own failure.
    assert process.returncode == 3, stderr
    outcomes = [step["outcome"] for step in json.loads(stdout)["steps"]]
    assert outcomes == ["success", "failed", "success"] * 2
    fill(state)
    batchctl("run-batch", "--force-gap", code=78)
    assert runs(batchctl.url) == [("partial",)]
    (state / "filler").unlink()
    assert batchctl.json("run-batch", code=75)["reason"] == "gap"
    assert batchctl.json("run-batch", "--force-gap")["outcome"] == "success"


def test_a_disk_without_room_for_another_file_in_the_middle(batchctl):
    """An account's first step needs a directory for its output; that there is none is this step's failure."""
    state = batchctl.directory / "state"
    state.mkdir(mode=0o700)
    full = 'for i in $(seq 10000); do true > "state/filler.$i" || break; done; true'
    with namespace(f"-t tmpfs -o size=1m,nr_inodes=100,mode=700 tmpfs {state}") as disk:
        inside = replace(batchctl, program=disk.program)
        batchctl.configure(batch([("31", f"test {{account}} = b || {{ {full}; }}")], 'accounts = ["a", "b"]'))
        result = inside.json("run-batch", code=3)
        assert [step["outcome"] for step in result["steps"]] == ["success", "failed"]
        assert runs(batchctl.url) == [("partial",)]
        for path in disk.path(state).glob("filler.*"):
            path.unlink()
        batchctl.configure(batch([("31", "true")]))
        assert inside.json("run-batch", "--force-gap")["outcome"] == "success"


# What is not text, what cannot be started


def test_an_environment_that_is_not_text_reaches_the_step_as_it_is(batchctl):
    batchctl.environment = {"LANG": "C", "ODD": os.fsdecode(b"\xff\xfe")}
    batchctl.configure(batch([("31", 'printf "%s" "$ODD"'), ("수집", "true")]))
    process = batchctl.start("run-batch", "-v", "--json")
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert Path(json.loads(stdout)["steps"][0]["log"]).read_bytes() == b"\xff\xfe"
    # ASCII is all that this locale has: the name is written with escapes, not lost, and nothing fails for it.
    assert re.search(r"Step (수집|\\uc218\\uc9d1) of account", stderr)
    assert "Step 수집 of account" in batchctl.log


@pytest.mark.parametrize(
    ("command", "code"),
    [(["./missing"], 127), (["missing-from-path"], 127), (["./plain"], 126), (["./directory"], 126), (["./bad"], None)],
    ids=str,
)
def test_a_command_that_cannot_be_started(batchctl, command, code):
    (batchctl.directory / "plain").write_text("no right to execute it")
    (batchctl.directory / "directory").mkdir()
    write(batchctl.directory / "bad", "#!/no/such/interpreter\n").chmod(0o755)
    code = 127 if code is None else code
    batchctl.configure(f'[batch.daily]\n[[batch.daily.step]]\nid = "31"\ncommand = {json.dumps(command)}\n')
    result = batchctl.json("run-batch", code=1)
    assert [(step["outcome"], step["exit_code"], step["signal"]) for step in result["steps"]] == [
        ("failed", code, None)
    ]
    assert f"cannot start '{command[0]}'" in batchctl.log


# Signals and terminals


def test_under_nohup_the_end_of_the_terminal_ends_nothing(batchctl):
    batchctl.configure(batch([("31", "echo $$ > step.pid; while ! test -e over; do sleep 0.05; done")]))
    process = batchctl.start("run-batch", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    step = batchctl.pid()
    for _ in range(2):
        process.send_signal(signal.SIGHUP)
        os.kill(step, signal.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None
    (batchctl.directory / "over").touch()
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert runs(batchctl.url) == [("success",)]


def test_two_terminals_at_once(batchctl):
    batchctl.configure(batch([("31", "echo $PPID >> ran; while ! test -e over; do sleep 0.05; done")]))
    batchctl("status")
    terminals = [Terminal(batchctl, "run-batch") for _ in range(2)]
    wait_for(lambda: any(terminal.process.poll() is not None for terminal in terminals), what="the skip")
    (batchctl.directory / "over").touch()
    ended = {terminal.process.pid: terminal.finish() for terminal in terminals}
    (winner,) = (pid for pid, (code, _) in ended.items() if code == 0)
    (refused,) = (text for code, text in ended.values() if code == 75)
    assert (batchctl.directory / "ran").read_text() == f"{winner}\n"
    assert f"pid {winner}" in " ".join(refused.split())
    assert "success" in ended[winner][1]


@pytest.mark.parametrize("how", ["Ctrl-C", "hang up"])
def test_a_terminal_ends_the_run_and_its_step(batchctl, how):
    batchctl.configure(batch([("31", "echo $$ > step.pid; exec sleep 300"), ("32", "true")]))
    terminal = Terminal(batchctl, "run-batch")
    step = batchctl.pid()
    if how == "Ctrl-C":
        os.write(terminal.master, b"\x03")
    else:
        terminal.hang_up()
    code, shown = terminal.finish()
    assert code == 128 + (signal.SIGINT if how == "Ctrl-C" else signal.SIGHUP), shown
    assert "Traceback" not in shown
    assert "bug" not in batchctl.log
    assert gone(step)
    assert runs(batchctl.url) == [("stopped",)]


def test_a_run_that_does_not_mind_goes_on_without_its_terminal(batchctl):
    batchctl.configure(batch([("31", "echo $$ > step.pid; while ! test -e over; do sleep 0.05; done"), ("32", "true")]))
    terminal = Terminal(batchctl, "run-batch", ignored=signal.SIGHUP)
    batchctl.pid()
    terminal.hang_up()
    (batchctl.directory / "over").touch()
    assert terminal.finish()[0] == 0
    assert "bug" not in batchctl.log
    assert runs(batchctl.url) == [("success",)]


# Clocks


@pytest.fixture
def moved(batchctl):
    """The command with a wall clock that a file moves, and the file."""
    program = write(batchctl.directory / "moved_clock.py", MOVED_CLOCK)
    seconds = write(batchctl.directory / "seconds", "0")
    return replace(batchctl, program=(sys.executable, str(program), str(seconds))), seconds


@pytest.mark.parametrize("days", [-1, 1])
def test_an_orphan_is_found_by_its_record_whatever_the_wall_clock_says(batchctl, orphan, moved, days):
    command, seconds = moved
    seconds.write_text(str(days * DAY_SECONDS))
    skipped = command.json("run-batch", code=75)
    assert (skipped["reason"], [each["pid"] for each in skipped["orphans"]]) == ("orphans", [orphan])
    os.kill(orphan, signal.SIGKILL)
    wait_for(lambda: gone(orphan))
    batchctl.configure(batch([("31", "true")]))
    assert command.json("run-batch")["outcome"] == "success"


def test_an_orphan_is_found_whatever_the_time_since_boot_seems_to_be(batchctl):
    """In a time namespace the kernel shifts ticks and monotonic clock; the lock and the marker do not mind."""
    if subprocess.run(["unshare", "--time", "true"], check=False, capture_output=True).returncode:
        skip_or_fail("no time namespaces here")
    batchctl.configure(batch([("31", "echo $$ > step.pid; exec sleep 300")]))
    process = batchctl.start("run-batch")
    step = batchctl.pid()
    shift = ("unshare", "--time", f"--boottime={DAY_SECONDS}", f"--monotonic={DAY_SECONDS}", "--fork", "--")
    shifted = replace(batchctl, program=(*shift, str(PROGRAM)))
    try:
        assert shifted.json("run-batch", code=75)["reason"] == "running"
        process.kill()
        process.communicate()
        skipped = shifted.json("run-batch", code=75)
        assert skipped["reason"] == "orphans"
        assert step in [orphan["pid"] for orphan in skipped["orphans"]]
    finally:
        os.kill(step, signal.SIGKILL)
    wait_for(lambda: gone(step))
    batchctl.configure(batch([("31", "true")]))
    assert shifted.json("run-batch")["outcome"] == "success"


@pytest.mark.any_user
@pytest.mark.parametrize("days", [-1, 1])
def test_a_clock_that_is_set_while_a_run_goes_on(batchctl, moved, days):
    command, seconds = moved
    batchctl.configure(batch([("31", "echo $$ > step.pid; while ! test -e over; do sleep 0.05; done"), ("32", "true")]))
    process = command.start("run-batch", "--json")
    batchctl.pid()
    seconds.write_text(str(days * DAY_SECONDS))
    skipped = command.json("run-batch", code=75)
    assert (skipped["reason"], skipped["holder"]["pid"]) == ("running", process.pid)
    for shown in ("status", "next", "history"):
        text = command(shown, "-v").stdout
        assert not NEGATIVE.search(text), text
    (batchctl.directory / "over").touch()
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 0, stderr
    result = json.loads(stdout)
    started_at, finished_at, next_at = (
        datetime.fromisoformat(result[key]) for key in ("started_at", "finished_at", "next_eligible_at")
    )
    assert timedelta(0) <= finished_at - started_at < timedelta(minutes=5)
    assert 0 <= result["duration_seconds"] < 300
    assert all(0 <= step["duration_seconds"] < 300 for step in result["steps"])
    # The gap is reckoned by the database's clock, which is right.
    assert abs(next_at - timedelta(hours=6) - datetime.now(UTC)) < timedelta(minutes=5)
    for setting in ("0", str(days * DAY_SECONDS)):
        seconds.write_text(setting)
        skipped = command.json("run-batch", code=75)
        assert (skipped["reason"], datetime.fromisoformat(skipped["next_eligible_at"])) == ("gap", next_at)
        assert not NEGATIVE.search(skipped["detail"]), skipped
    assert not NEGATIVE.search(batchctl.log), batchctl.log


@pytest.mark.any_user
@pytest.mark.parametrize(
    ("column", "options", "reason", "hours"),
    [("last_completed_at", "", "gap", 6), ("last_started_at", 'min_gap = "0s"\nevery = "8h"', "not_due", 8)],
)
def test_a_database_whose_clock_was_ahead_blocks_for_one_gap_at_most(batchctl, column, options, reason, hours):
    batchctl.configure(batch([("31", "true")], options))
    batchctl("run-batch")
    with psycopg.connect(batchctl.url) as connection:
        connection.execute(f"UPDATE batchctl.state SET {column} = now() + interval '30 days'")
    # The first start that notices takes the instant for now, and so does every later one.
    first, second = (batchctl.json("run-batch", code=75) for _ in range(2))
    assert first["reason"] == second["reason"] == reason
    assert first["next_eligible_at"] == second["next_eligible_at"]
    until = datetime.fromisoformat(first["next_eligible_at"]) - datetime.now(UTC)
    assert timedelta(hours=hours, minutes=-5) < until <= timedelta(hours=hours)
    assert not NEGATIVE.search(first["detail"]), first
    assert batchctl.json("run-batch", "--force-gap")["outcome"] == "success"
    with psycopg.connect(batchctl.url) as connection:
        ahead = connection.execute(f"SELECT count(*) FROM batchctl.state WHERE {column} > now()").fetchone()
    assert ahead == (0,)
