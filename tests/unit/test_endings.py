"""What the end of a child means, and how lines and durations read."""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest

from batchctl.batch.process import Ending, interpret
from batchctl.logs import JsonLine, Line, elapsed, rfc3339


@pytest.mark.parametrize(
    ("returncode", "ended_by", "ending"),
    [
        (0, None, Ending("success", 0)),
        (7, None, Ending("failed", 7, None, "exit code 7")),
        (75, None, Ending("failed", 75, None, "exit code 75")),
        (-9, None, Ending("failed", None, 9, "killed by signal 9 (SIGKILL)")),
        (-64, None, Ending("failed", None, 64, "killed by signal 64 (SIGRTMAX)")),
        (-15, "timeout", Ending("timeout", None, 15, "why")),
        (0, "timeout", Ending("timeout", 0, None, "why")),
        (-2, "stopped", Ending("stopped", None, 2, "why")),
        (None, "timeout", Ending("timeout", None, None, "why")),
    ],
)
def test_exit_code_signal_and_reason_are_kept_apart(returncode, ended_by, ending):
    assert interpret(returncode, ended_by, "why" if ended_by else None) == ending


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0.4s"), (59.94, "59.9s"), (725, "12m5s"), (14400, "4h0m"), (93600, "26h0m")]
)
def test_durations_for_people(seconds, text):
    assert elapsed(seconds) == text
    assert elapsed(timedelta(seconds=seconds)) == text


def record(message="Run started", **extra):
    made = logging.LogRecord("batchctl.daily", logging.INFO, "", 0, message, (), None)
    made.__dict__.update({"at": datetime(2023, 12, 31, 16, tzinfo=UTC), **extra})
    return made


def test_a_line_is_one_line_in_local_time():
    line = Line(ZoneInfo("Asia/Seoul"))
    assert line.format(record()) == "[daily] 2024-01-01 01:00:00 | INFO | Run started"
    assert line.format(record("one\ntwo")) == "[daily] 2024-01-01 01:00:00 | INFO | one two"


def test_the_same_as_json():
    assert JsonLine(UTC).format(record("ü")) == (
        '{"at": "2023-12-31T16:00:00Z", "level": "INFO", "name": "daily", "message": "ü"}'
    )


def test_instants_for_programs():
    assert rfc3339(datetime(2024, 1, 1, 9, 0, 0, 5, tzinfo=ZoneInfo("Asia/Seoul"))) == "2024-01-01T00:00:00.000005Z"
    assert rfc3339(None) is None
