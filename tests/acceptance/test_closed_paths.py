"""Paths that the caller may not enter, or that are gone: the error says which, whose and what to do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from support import PROGRAM, ROLLUP, Command, batch, skip_or_fail


@pytest.mark.parametrize("arguments", [["run-batch"], ["status"], ["orphans"], ["stop"], ["aggregate"], ["history"]])
def test_a_state_directory_that_may_not_be_entered_is_no_bug(arguments):
    directory = Path(tempfile.mkdtemp())
    directory.chmod(0o755)
    command = Command(directory, None)
    command.configure(batch([("31", "true")]) + ROLLUP)
    state = directory / "state"
    state.mkdir(mode=0o700)
    if os.geteuid() == 0:
        if not shutil.which("setpriv"):
            skip_or_fail("setpriv is not installed")
        somebody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        command.program = (*somebody, sys.executable, "-m", "batchctl")
        whose = "belongs to"
    else:
        state.chmod(0)
        whose = "is closed to its owner (mode 0000)"
    try:
        done = command(*arguments, code=None)
        if done.returncode in (126, 127) or "No module" in done.stderr:
            skip_or_fail("another user cannot read this Python or its packages")
        assert done.returncode == 78, done
        assert f"{state} {whose}" in done.stderr
        assert "bug" not in done.stderr
        assert done.stdout == ""
    finally:
        state.chmod(0o700)
        shutil.rmtree(directory)


def test_a_working_directory_that_was_removed(tmp_path):
    directory = tmp_path / "gone"
    directory.mkdir()
    line = f'cd {directory} && rmdir {directory} && exec "$0" "$@"'
    done = subprocess.run(
        ["sh", "-c", line, str(PROGRAM), "demo"], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    assert (done.returncode, done.stderr) == (
        78, "batchctl: the working directory was removed; change to another one\n",
    )  # fmt: skip
