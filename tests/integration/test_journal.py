"""What could not be recorded is recorded once, in order, and never lost."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from batchctl.batch.run import Claimed
from batchctl.clock import SystemClock
from batchctl.errors import DatabaseUnavailableError
from batchctl.state.database import Database
from batchctl.state.driver_errors import WrongDataError
from batchctl.state.journal import Journal


def make(tmp_path, **parameters):
    database = Database({"host": "h", "dbname": "d", **parameters}, "batchctl", SystemClock())
    return Journal(tmp_path, database, SystemClock())


def replay(journal, failing=None, error=None):
    seen = []

    def write(name, values):
        if values["n"] == failing:
            raise error
        seen.append((name, values["n"]))

    if isinstance(error, DatabaseUnavailableError):
        with pytest.raises(DatabaseUnavailableError):
            journal.replay(write)
    else:
        journal.replay(write)
    return seen


def test_records_are_replayed_once_and_in_order(tmp_path):
    journal = make(tmp_path)
    assert replay(journal) == []
    for number in range(3):
        journal.append("step_finished", {"n": number, "at": datetime.now(UTC), "duration": timedelta(seconds=1)})
    assert replay(journal) == [("step_finished", number) for number in range(3)]
    assert replay(journal) == []


def test_a_database_that_goes_away_again_loses_nothing(tmp_path):
    journal = make(tmp_path)
    for number in range(3):
        journal.append("run_finished", {"n": number})
    assert [number for _, number in replay(journal, 1, DatabaseUnavailableError("away"))] == [0]
    journal.append("run_finished", {"n": 3})
    # Records may be repeated; none is missing and their order holds.
    assert [number for _, number in replay(journal)] == [0, 1, 2, 3]


def test_what_the_database_will_never_take_is_put_aside_and_kept(tmp_path):
    journal = make(tmp_path)
    for number in range(3):
        journal.append("step_started", {"n": number})
    with journal.path.open("ab") as file:
        file.write(b"torn by a full disk")
    assert [number for _, number in replay(journal, 1, WrongDataError("no such run"))] == [0, 2]
    assert replay(journal) == []
    kept = journal.path.with_suffix(".refused").read_bytes().splitlines()
    assert len(kept) == 2
    assert kept[1] == b"torn by a full disk"


def test_another_database_is_told_nothing(tmp_path):
    make(tmp_path).append("skip", {"n": 1})
    assert replay(make(tmp_path, dbname="other")) == []
    assert len(replay(make(tmp_path))) == 1


def test_the_time_of_a_record_is_the_databases_whatever_the_host_thinks():
    class Host:
        def now(self):
            raise AssertionError("the host's clock is not asked")

        def monotonic(self):
            return 107.0

    start = datetime(2024, 1, 1, tzinfo=UTC)
    assert Claimed(None, {}, start, 100.0, 100.0, None, None).now(Host()) == start + timedelta(seconds=7)
