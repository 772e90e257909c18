"""What steps do to their supervisor: leave things running, hide, fill disks, print without end, fail to start."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import PROGRAM, batch, gone, skip_or_fail, wait_for

HIDING = "(setsid env -i sh -c 'echo $$ >daemon; trap \"echo asked >asked\" TERM; while :; do sleep 0.1; done' &)"
"""A daemon that left the session, has another parent and no environment."""
DETACHED = (
    f"'{sys.executable}' -W ignore -c \"import subprocess; print(subprocess.Popen(['sleep', '300'], "
    'start_new_session=True).pid)" >detached'
)
"""One that has not even the descriptor, as all children of a Python program."""


@pytest.fixture
def pids(batchctl):
    """Names of files with process ids that must not survive the test."""
    names = []
    yield names
    for name in names:
        path = batchctl.directory / name
        if path.exists() and not gone(int(path.read_text())):
            os.kill(int(path.read_text()), signal.SIGKILL)


@pytest.mark.parametrize("way", ["timeout", "stop"])
def test_a_timeout_and_a_stop_reach_what_left_the_session(batchctl, pids, way):
    pids += ["daemon", "detached"]
    timeout = "2s" if way == "timeout" else "5m"
    # It runs on while the detached one prints its number, so both are there when the time is over.
    batchctl.configure(
        batch([("31", f"{HIDING}; {DETACHED}; touch ready; sleep 300", f'timeout = "{timeout}"')], 'grace = "1s"')
    )
    process = batchctl.start("run-batch", "--json")
    wait_for((batchctl.directory / "ready").exists)
    daemon, detached = batchctl.pid("daemon"), batchctl.pid("detached")
    if way == "stop":
        process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=60)
    outcome = "timeout" if way == "timeout" else "stopped"
    assert json.loads(stdout)["steps"][0]["outcome"] == outcome, stderr
    assert gone(daemon)
    assert gone(detached)
    assert (batchctl.directory / "asked").exists(), "it was asked before it was killed"
    assert "left processes alive" not in batchctl.log
    assert list((batchctl.directory / "state" / "run" / "daily").iterdir()) == []


def test_what_a_failed_attempt_left_is_ended_before_the_next_step(batchctl, pids):
    pids += ["daemon", "detached"]
    looks = (
        "for name in daemon detached; do grep -q 'State:.[^ZX]' /proc/$(cat $name)/status && touch beside; done; true"
    )
    batchctl.configure(batch([("31", f"{HIDING}; {DETACHED}; sleep 1; exit 3"), ("32", looks)], 'grace = "2s"'))
    result = batchctl.json("run-batch", code=3)
    assert [step["outcome"] for step in result["steps"]] == ["failed", "success"]
    assert result["steps"][0]["exit_code"] == 3
    assert gone(batchctl.pid("daemon"))
    assert gone(batchctl.pid("detached"))
    assert (batchctl.directory / "asked").exists(), "it was asked before it was killed"
    assert not (batchctl.directory / "beside").exists()
    assert batchctl.json("orphans")["orphans"] == []


def test_what_a_successful_step_leaves_is_named_when_it_ends(batchctl, pids):
    pids += ["daemon", "detached"]
    hiding = HIDING.replace("trap", ": trap")
    batchctl.configure(
        batch([("31", hiding), ("32", f"{DETACHED}; sleep 1.2"), ("33", "sleep 0.1")], 'leftovers = "ignore"')
    )
    batchctl("run-batch")
    daemon, detached = batchctl.pid("daemon"), batchctl.pid("detached")
    lines = [line.partition("| ")[2] for line in batchctl.log.splitlines()]
    first = lines.index(next(line for line in lines if f"pid {daemon}, step 31 of account default: sh" in line))
    second = lines.index(next(line for line in lines if f"pid {detached}, step 32 of account default: sleep" in line))
    assert lines[first].startswith("WARNING | Step 31 of account default left processes alive: ")
    assert lines[second].startswith("WARNING | Step 32 of account default left processes alive: ")
    assert first < second < lines.index(next(line for line in lines if "Step 33 of account default: success" in line))
    assert "the next start ignores them" in lines[-2]
    assert not gone(daemon)
    assert not gone(detached)


def test_a_grandchild_that_holds_the_output_holds_up_nothing(batchctl, pids):
    pids.append("agent")
    batchctl.configure(batch([("31", "sleep 300 & echo $! >agent; echo done"), ("32", "true")]))
    result = batchctl.json("run-batch")
    assert [step["outcome"] for step in result["steps"]] == ["success", "success"]
    assert result["steps"][0]["duration_seconds"] < 60
    assert Path(result["steps"][0]["log"]).read_text() == "done\n"
    assert batchctl.json("run-batch", "--force-gap", code=75)["reason"] == "orphans"


def test_output_over_its_cap_keeps_head_and_tail(batchctl):
    batchctl.configure(batch([("31", "seq 100000"), ("32", r"printf 'a\377%.0s' $(seq 4000)")], 'output_cap = "5kB"'))
    result = batchctl.json("run-batch")
    first, second = (Path(step["log"]).read_bytes() for step in result["steps"])
    assert len(first) <= 5000
    assert first.startswith(b"1\n2\n3\n")
    assert first.endswith(b"\n99999\n100000\n")
    assert b"bytes were cut here]\n" in first
    assert len(second) <= 5000
    assert b"a\xffa\xff" in second


def test_a_log_that_cannot_be_made_costs_the_output_alone(batchctl):
    planted = "mkdir -p state/log/daily/$BATCHCTL_RUN_ID; touch state/log/daily/$BATCHCTL_RUN_ID/b"
    batchctl.configure(batch([("30", planted), ("31", "touch ran.{account}; echo x")], 'accounts = ["a", "b"]'))
    done = batchctl("run-batch", "--json")
    result = json.loads(done.stdout)
    assert [step["outcome"] for step in result["steps"]] == ["success"] * 4
    assert (batchctl.directory / "ran.b").exists()
    assert "Step 31 of account b: its output is lost" in done.stderr
    assert "is not a directory" in done.stderr


def test_a_step_lock_that_cannot_be_made_fails_that_step_alone(batchctl):
    planted = "touch state/run/daily/$BATCHCTL_RUN_ID/steps/b"
    batchctl.configure(batch([("30", planted), ("31", "touch ran.{account}")], 'accounts = ["a", "b", "c"]'))
    done = batchctl("run-batch", "--json", code=3)
    result = json.loads(done.stdout)
    by_account = {step["account"]: step["outcome"] for step in result["steps"] if step["step"] == "31"}
    assert by_account == {"a": "success", "b": "failed", "c": "success"}
    assert "cannot be started" in done.stderr
    assert "is not a directory" in done.stderr


def test_a_full_disk_ends_neither_the_run_nor_the_step(batchctl, tmp_path):
    """The logs are on a file system of their own that has no room for another file."""
    if os.geteuid() != 0 or not shutil.which("unshare"):
        pytest.skip("mounting needs root and unshare")
    batchctl.configure(batch([("31", "echo x; touch ran"), ("32", "true")]))
    batchctl.config.write_text('log_dir = "logs"\n' + batchctl.config.read_text())
    (tmp_path / "logs").mkdir(mode=0o700)
    batchctl("status")
    mount = "mount -t tmpfs -o size=64k,nr_inodes=2,mode=700 none logs && exec"
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", f'{mount} "$0" --config batchctl.toml run-batch --json', PROGRAM],
        cwd=tmp_path, capture_output=True, text=True, check=False, env={"PATH": "/usr/bin:/bin"},
        stdin=subprocess.DEVNULL, timeout=60,
    )  # fmt: skip
    if "mount" in done.stderr and "batchctl" not in done.stderr:
        skip_or_fail(f"the kernel refuses a mount: {done.stderr}")
    assert done.returncode == 0, done
    assert [step["outcome"] for step in json.loads(done.stdout)["steps"]] == ["success", "success"]
    assert done.stderr.count("No space left on device") == 2
    assert (tmp_path / "ran").exists()


def test_a_start_from_where_ended_children_are_ignored(embedded_batchctl):
    """A parent that ignores SIGCHLD leaves that to what it starts; exit codes, the server's too, must be seen."""
    embedded_batchctl.configure(batch([("31", "exit 7"), ("32", "true")]))
    process = embedded_batchctl.start(
        "run-batch", "--json", preexec_fn=lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    )
    stdout, stderr = process.communicate(timeout=60)
    assert [step["exit_code"] for step in json.loads(stdout)["steps"]] == [7, 0], stderr


def test_a_log_file_that_cannot_be_written_is_said_once_and_changes_nothing(batchctl):
    batchctl.configure(batch([("31", "true"), ("32", "true")]))
    log = batchctl.directory / "state" / "log" / "daily.log"
    log.parent.mkdir(parents=True, mode=0o700)
    log.parent.parent.chmod(0o700)
    log.mkdir()
    done = batchctl("run-batch")
    assert done.stderr == f"batchctl: log {log} cannot be written: Is a directory; its lines are lost\n"
    log.rmdir()
    assert batchctl("run-batch", code=75).stderr == "", "the control"
