"""What is said of a path that this user may not use."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from batchctl.errors import ConfigurationError
from batchctl.paths import explained, private_directory

SOMEBODY = 65534


@pytest.fixture
def directory():
    """A directory that other users can reach."""
    made = Path(tempfile.mkdtemp())
    made.chmod(0o755)
    yield made
    os.seteuid(os.getuid())
    for path in (made, *made.rglob("*")):
        path.chmod(0o700)
    shutil.rmtree(made)


def closed(directory, mode=0o700):
    """Make a directory that this user may not enter: root becomes somebody else, others lose the right."""
    state = directory / "state"
    (state / "lock").mkdir(parents=True)
    state.chmod(mode if os.geteuid() == 0 else 0)
    if os.geteuid() == 0:
        os.seteuid(SOMEBODY)
    return state


def refusal(path):
    try:
        path.stat()
    except OSError as error:
        return error
    raise AssertionError(f"{path} can be seen")


def test_the_directory_that_refuses_is_named_with_its_owner_and_mode(directory):
    state = closed(directory)
    error = refusal(state / "lock" / "x.lock")
    said = str(explained(error, [state]))
    assert said.startswith(f"{state}/lock/x.lock cannot be used: {state} ")
    whose = (
        "belongs to root (mode 0700), but batchctl runs as" if os.getuid() == 0 else "closed to its owner (mode 0000)"
    )
    assert whose in said
    with pytest.raises(ConfigurationError) as raised:
        private_directory(state / "lock")
    assert f"cannot make the directory {state}/lock: {state} " in str(raised.value)
    assert whose in str(raised.value)


def test_only_what_lies_below_the_directories_and_cannot_be_used_is_explained(directory):
    state = closed(directory)
    error = refusal(state / "lock")
    assert explained(error, [state]) is not None
    assert explained(error, [directory / "other"]) is None
    assert explained(error, []) is None
    assert explained(FileNotFoundError(2, "No such file", str(state / "x")), [state]) is None
    assert explained(PermissionError(13, "Permission denied"), [state]) is None
    assert explained(ValueError(str(state)), [state]) is None


def test_a_name_that_is_too_long_is_explained(directory):
    long = directory / ("x" * 300)
    assert str(explained(refusal(long), [directory])) == (
        f"{long} cannot be used: File name too long; choose another state_dir or log_dir"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root is let in whatever the mode")
def test_a_directory_that_is_closed_to_its_owner_is_refused(directory):
    closed(directory)
    with pytest.raises(ConfigurationError, match=r"is closed to its owner .mode 0000.; chmod u.rwx it"):
        private_directory(directory / "state")
