"""A journal on a disk without room: a record is there as a whole or not at all, and never spoils another."""

from __future__ import annotations

import resource
import signal
from contextlib import contextmanager

import pytest

from batchctl.clock import SystemClock
from batchctl.errors import ConfigurationError
from batchctl.state.database import Database
from batchctl.state.journal import Journal


@pytest.fixture
def journal(tmp_path):
    return Journal(tmp_path, Database({"host": "h", "dbname": "d"}, "batchctl", SystemClock()), SystemClock())


@contextmanager
def room_for(size):
    """Let no file grow beyond that; the kernel then writes what fits, as it does on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)


def replayed(journal):
    seen = []
    journal.replay(lambda _, values: seen.append(values["n"]))
    return seen


def test_a_record_that_finds_no_room_spoils_no_other(journal):
    journal.append("skip", {"n": 1})
    with room_for(journal.path.stat().st_size + 5), pytest.raises(ConfigurationError, match="cannot be used"):
        journal.append("skip", {"n": 2})
    journal.append("skip", {"n": 3})
    assert replayed(journal) == [1, 3]


def test_half_a_record_that_a_crash_left_spoils_no_other(journal):
    journal.append("skip", {"n": 1})
    with journal.path.open("ab") as file:
        file.write(b'{"name":"skip","val')
    journal.append("skip", {"n": 3})
    assert replayed(journal) == [1, 3]
    assert journal.path.with_suffix(".refused").read_bytes() == b'{"name":"skip","val\n'
