"""Never two at once: many starts at the same instant, two groups, two state directories, no database."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest
from support import NOWHERE, batch, skip_or_fail

STARTS = 32
ROUNDS = 3


def one_step(line, options=""):
    return batch([("31", line, 'group = "a"')], options)


UNTIL_REFUSED = "while ! test -e refused; do sleep 0.05; done"
TWO_GROUPS = one_step(f"echo x >> ran; {UNTIL_REFUSED}") + (
    f'[[batch.daily.step]]\nid = "61"\ngroup = "b"\ncommand = ["sh", "-c", "echo x >> ran; {UNTIL_REFUSED}"]\n'
)


def finish(processes):
    """Wait for all and return what each printed with its exit code and process id."""
    results = []
    for process in processes:
        stdout, stderr = process.communicate(timeout=120)
        assert "Traceback" not in stderr, stderr
        results.append((process.returncode, process.pid, json.loads(stdout) if stdout else None))
    return results


def race(processes, *directories):
    """Let the steps end once all starts but one have been refused."""
    deadline = time.monotonic() + 100
    while sum(process.poll() is None for process in processes) > 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    for directory in directories:
        (directory / "refused").touch()
    return finish(processes)


@pytest.mark.any_user
@pytest.mark.crowd
@pytest.mark.each_server
def test_of_32_starts_at_the_same_instant_one_runs(batchctl, server):
    """On a database without a schema; the step runs until all others have been refused."""
    batchctl.configure(one_step(f"echo $PPID >> ran; {UNTIL_REFUSED}", 'timeout = "5m"'))
    # The guards are the same on every server; one of them sees all rounds.
    for round_number in range(ROUNDS if server._binaries is None else 1):
        with psycopg.connect(batchctl.url) as connection:
            connection.execute("DROP SCHEMA IF EXISTS batchctl CASCADE")
        (batchctl.directory / "refused").unlink(missing_ok=True)
        (batchctl.directory / "ran").unlink(missing_ok=True)
        results = race([batchctl.start("run-batch", "--json") for _ in range(STARTS)], batchctl.directory)
        codes = Counter(code for code, _, _ in results)
        assert codes == {0: 1, 75: STARTS - 1}, f"round {round_number}: {codes}"
        winner = next(pid for code, pid, _ in results if code == 0)
        refused = [result for code, _, result in results if code == 75]
        assert {result["reason"] for result in refused} == {"running"}
        assert {result["holder"]["pid"] for result in refused} == {winner}
        assert {result["holder"]["host"] for result in refused} == {socket.gethostname()}
        assert (batchctl.directory / "ran").read_text() == f"{winner}\n"
        # What the database could not take within two seconds waits in the journal, until a command records it.
        batchctl("history")
        with psycopg.connect(batchctl.url) as connection:
            assert connection.execute("SELECT count(*) FROM batchctl.run").fetchone() == (1,)
            count = connection.execute("SELECT count(*) FROM batchctl.skip WHERE reason = 'running'").fetchone()
            assert count == (STARTS - 1,)


@pytest.mark.any_user
def test_without_the_file_lock_the_same_start_would_run_twice(batchctl, tmp_path_factory):
    """The control: with a lock of its own for each start, only the state table is left, and it names another guard."""
    others = []
    for number in range(4):
        other = replace(batchctl, directory=tmp_path_factory.mktemp(f"host{number}"))
        other.configure(one_step(UNTIL_REFUSED, 'min_gap = "0s"'))
        others.append(other)
    results = race([other.start("run-batch", "--json") for other in others], *(other.directory for other in others))
    assert Counter(code for code, _, _ in results) == {0: 1, 75: 3}
    assert {result["reason"] for code, _, result in results if code == 75} == {"running_elsewhere"}


def test_two_groups_at_the_same_instant(batchctl):
    batchctl.configure(TWO_GROUPS)
    processes = [batchctl.start("run-batch", "--group", group, "--json") for group in ("a", "b")]
    results = race(processes, batchctl.directory)
    assert Counter(code for code, _, _ in results) == {0: 1, 75: 1}
    assert next(result["reason"] for code, _, result in results if code == 75) == "running"
    assert (batchctl.directory / "ran").read_text() == "x\n"


@pytest.mark.any_user
@pytest.mark.each_server
def test_two_state_directories_on_one_database(batchctl, tmp_path_factory):
    other = replace(batchctl, directory=tmp_path_factory.mktemp("other"))
    for host in (batchctl, other):
        host.configure(TWO_GROUPS)
    processes = [host.start("run-batch", "--json") for host in (batchctl, other)]
    results = race(processes, batchctl.directory, other.directory)
    assert Counter(code for code, _, _ in results) == {0: 1, 75: 1}
    winner = next(pid for code, pid, _ in results if code == 0)
    refused = next(result for code, _, result in results if code == 75)
    assert (refused["reason"], refused["holder"]["pid"]) == ("running_elsewhere", winner)
    # The gap is the database's, so it holds on the other host too.
    for host in (batchctl, other):
        assert host.json("run-batch", code=75)["reason"] == "gap"


def test_the_lock_file_removed_while_held(batchctl):
    batchctl.configure(one_step(f"touch started; {UNTIL_REFUSED}"))
    process = batchctl.start("run-batch")
    while not (batchctl.directory / "started").exists():
        time.sleep(0.02)
    time.sleep(0.3)
    (batchctl.directory / "state" / "lock" / "batch.daily.lock").unlink()
    result = batchctl.json("run-batch", code=75)
    assert (result["reason"], result["holder"]["pid"]) == ("running", process.pid)
    (batchctl.directory / "refused").touch()
    process.communicate(timeout=30)
    assert process.returncode == 0


@pytest.mark.any_user
def test_a_database_that_is_down(batchctl):
    batchctl.url = NOWHERE
    batchctl.configure(one_step("touch ran"))
    for command in (["run-batch"], ["status"], ["history"]):
        began = time.monotonic()
        done = batchctl(*command, code=69)
        assert time.monotonic() - began < 10
        assert done.stdout == ""
        assert done.stderr.count("\n") == 1
        assert "cannot be reached" in done.stderr
    assert not (batchctl.directory / "ran").exists()


@pytest.mark.any_user
def test_a_server_that_accepts_and_never_answers(batchctl):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        batchctl.url = f"postgresql://nobody@127.0.0.1:{silent.getsockname()[1]}/none"
        batchctl.configure(one_step("touch ran"))
        began = time.monotonic()
        done = batchctl("run-batch", code=69)
        assert done.stderr.count("\n") == 1
        assert time.monotonic() - began < 10


@pytest.mark.any_user
def test_a_password_is_never_shown(batchctl):
    for url in (
        "postgresql://me:sesame@127.0.0.1:1/none",
        "host=x sesame bad",
        "postgresql://me:sesame@[bad/none",
        "postgresql://me:open@sesame@127.0.0.1/none",
        "postgresql://me:open/sesame@127.0.0.1:1/none",
    ):
        batchctl.url = url
        batchctl.configure(one_step("true"))
        done = batchctl("run-batch", "-vv", code=None)
        assert done.returncode in (69, 78)
        assert "sesame" not in done.stdout + done.stderr + batchctl.log


def test_a_skip_decided_by_the_lock_does_not_wait_for_the_database(batchctl):
    batchctl.configure(one_step(f"touch started; {UNTIL_REFUSED}"))
    process = batchctl.start("run-batch")
    while not (batchctl.directory / "started").exists():
        time.sleep(0.02)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql://nobody@127.0.0.1:{silent.getsockname()[1]}/none"
        batchctl.environment = {"BATCHCTL_DATABASE_URL": url}
        began = time.monotonic()
        assert batchctl.json("run-batch", code=75)["reason"] == "running"
        assert time.monotonic() - began < 6
    batchctl.environment = {}
    (batchctl.directory / "refused").touch()
    process.communicate(timeout=30)
    journals = list((batchctl.directory / "state" / "journal").iterdir())
    assert len(journals) == 1, "the skip waits for its own database"


@pytest.mark.parametrize(
    "path",
    [
        "state",
        "state/lock",
        "state/lock/batch.daily.lock",
        "state/host_id",
        "state/log",
        "state/run",
        "state/run/daily",
    ],
    ids=str,
)
def test_a_symbolic_link_in_the_state_directory_is_refused(batchctl, tmp_path_factory, path):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    link = batchctl.directory / path
    link.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    target = elsewhere / "target"
    if path.endswith((".lock", "_id")):
        target.touch()
    else:
        target.mkdir()
    link.symlink_to(target)
    batchctl.configure(one_step("touch ran"))
    done = batchctl("run-batch", code=78)
    assert "symbolic link" in done.stderr
    assert not (batchctl.directory / "ran").exists()


def test_modes_of_what_batchctl_makes_and_did_not_make(batchctl):
    batchctl.configure(one_step("true"))
    before = {path: path.stat() for path in [batchctl.directory, *batchctl.directory.parents]}
    batchctl("run-batch")
    for path, stat in before.items():
        now = path.stat()
        assert (now.st_mode, now.st_uid, now.st_gid) == (stat.st_mode, stat.st_uid, stat.st_gid)
    for path in (batchctl.directory / "state").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path
    assert (batchctl.directory / "state").stat().st_mode & 0o777 == 0o700


def test_the_state_directory_of_another_user_is_refused(batchctl):
    if os.geteuid() != 0:
        skip_or_fail("only root can make a directory of another user")
    state = batchctl.directory / "state"
    state.mkdir(mode=0o700)
    os.chown(state, 65534, -1)
    batchctl.configure(one_step("true"))
    done = batchctl("run-batch", code=78)
    assert "belongs to user id 65534" in done.stderr


def test_a_crash_of_the_machine_between_two_runs(batchctl):
    """Another boot: the process ids of the dead run mean nothing any more, even if they are in use."""
    batchctl.configure(one_step("true", 'min_gap = "0s"'))
    batchctl("run-batch")
    host = (batchctl.directory / "state" / "host_id").read_text().strip()
    with psycopg.connect(batchctl.url) as connection:
        connection.execute(
            "UPDATE batchctl.run SET outcome = NULL, finished_at = NULL, boot_id = 'another', pid = 1, host = %s",
            [host],
        )
        connection.execute("UPDATE batchctl.step_run SET finished_at = NULL, outcome = NULL, pid = 1")
    assert batchctl.json("run-batch")["outcome"] == "success"
    assert [entry["outcome"] for entry in batchctl.json("history")["entries"]] == ["success", "crashed"]


def test_a_lock_file_with_the_data_of_a_dead_holder_names_nobody_else(batchctl):
    batchctl.configure(one_step(f"touch started; {UNTIL_REFUSED}"))
    lock = batchctl.directory / "state" / "lock" / "batch.daily.lock"
    for path in (batchctl.directory / "state", lock.parent):
        path.mkdir(mode=0o700)
    gone = subprocess.run(["true"], check=True) and 4_000_000
    lock.write_text(
        json.dumps(
            {"hostname": "old", "pid": gone, "start_ticks": 1, "boot_id": "x", "started_at": "2020-01-01T00:00:00Z"}
        )
    )
    lock.chmod(0o600)
    process = batchctl.start("run-batch")
    while not (batchctl.directory / "started").exists():
        time.sleep(0.02)
    assert batchctl.json("run-batch", code=75)["holder"]["pid"] == process.pid
    (batchctl.directory / "refused").touch()
    process.communicate(timeout=30)
    assert Path(lock).read_text() == ""
