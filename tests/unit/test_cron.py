"""Cron times, hours, zones."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest

from batchctl.schedule.cron import in_other_zone, inside_hours, local_zone, next_inside_hours, next_time, problem


@pytest.mark.parametrize("expression", ["0 1 * * *", "*/5 * * * *", "1 * * * *", "0 0-6,22 * jan mon-fri", "0 1 1 * *"])
def test_what_cron_takes_is_allowed(expression):
    assert problem(expression) is None


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "0 1 * *",
        "0 0 1 * * *",
        "61 * * * *",
        "0 1 * * * root",
        "@daily",
        "0 1 L * *",
        "0 1 * * 1#2",
        "0 0 31 2 *",
        "x",
    ],
)
def test_what_cron_does_not_take_is_refused(expression):
    assert "found" in problem(expression)


def test_times_are_local_and_returned_in_utc():
    after = datetime(2024, 1, 1, tzinfo=UTC)
    assert next_time("0 1 * * *", after, ZoneInfo("Asia/Seoul")) == datetime(2024, 1, 1, 16, tzinfo=UTC)


def test_a_repeated_hour_runs_once_and_a_missing_hour_runs_after_the_change():
    berlin = ZoneInfo("Europe/Berlin")
    missing = next_time("30 2 * * *", datetime(2024, 3, 30, 12, tzinfo=UTC), berlin)
    assert missing == datetime(2024, 3, 31, 1, tzinfo=UTC)
    repeated = next_time("30 2 * * *", datetime(2024, 10, 26, 12, tzinfo=UTC), berlin)
    assert next_time("30 2 * * *", repeated, berlin).date() == datetime(2024, 10, 28, tzinfo=UTC).date()


@pytest.mark.parametrize(
    ("hours", "time", "inside"),
    [
        ("", "12:00", True),
        ("0-6", "06:59", True),
        ("0-6", "07:00", False),
        ("22,23", "22:30", True),
        ("1", "00:59", False),
    ],
)
def test_hours_are_those_of_the_local_clock(hours, time, inside):
    now = datetime.fromisoformat(f"2024-06-01T{time}:30+09:00")
    assert inside_hours(hours, now, ZoneInfo("Asia/Seoul")) is inside


@pytest.mark.parametrize(
    ("instant", "inside"),
    [
        # Berlin's 2024-10-27 has 02:30 twice, its 2024-03-31 goes from 01:59 to 03:00.
        ("2024-10-27T00:30:00Z", True),
        ("2024-10-27T01:30:00Z", True),
        ("2024-10-27T02:00:00Z", True),
        ("2024-03-31T01:00:00Z", True),
        ("2024-03-31T05:00:00Z", False),
    ],
)
def test_hours_on_the_days_when_the_clocks_change(instant, inside):
    assert inside_hours("0-6", datetime.fromisoformat(instant), ZoneInfo("Europe/Berlin")) is inside


def test_the_first_minute_inside_the_hours_of_a_zone_off_the_hour():
    found = next_inside_hours("3", datetime(2024, 1, 1, tzinfo=UTC), ZoneInfo("Asia/Kathmandu"))
    assert found == datetime(2024, 1, 1, 21, 15, tzinfo=UTC)


def test_the_first_minute_inside_the_hours():
    now = datetime(2024, 6, 1, 7, 30, tzinfo=UTC)
    assert next_inside_hours("0-6", now, UTC) == datetime(2024, 6, 2, tzinfo=UTC)


def test_the_zone_of_the_configuration_or_of_the_system():
    assert str(local_zone("Asia/Seoul")) == "Asia/Seoul"
    assert local_zone(None).utcoffset(datetime(2024, 1, 1)) is not None


def cron_times(expression, zone, until):
    time, found = datetime(2026, 1, 1, tzinfo=UTC), []
    while (time := next_time(expression, time, zone)) < until:
        found.append(time)
    return found


@pytest.mark.parametrize(
    ("expression", "zone", "other", "expected"),
    [
        ("0 1 * * *", "Asia/Seoul", "UTC", "0 16 * * *"),
        ("30 23,1 * * *", "UTC", "Asia/Seoul", "30 8,10 * * *"),
        ("*/20 0-12/6 * * *", "Asia/Seoul", "UTC", "*/20 3,15,21 * * *"),
        ("0 1 * * *", "Asia/Kolkata", "UTC", "30 19 * * *"),
        ("*/20 * * * *", "Asia/Kolkata", "UTC", "10,30,50 * * * *"),
        ("*/5 * * * *", "Asia/Kolkata", "America/New_York", "*/5 * * * *"),
        ("1 * * * *", "America/New_York", "UTC", "1 * * * *"),
        ("0 1 * * *", "Europe/London", "Europe/Berlin", "0 2 * * *"),
        ("0 1 * * *", "Europe/Paris", "Europe/Berlin", "0 1 * * *"),
        ("0 12 1 * mon", "Asia/Seoul", "UTC", "0 3 1 * mon"),
    ],
)
def test_a_schedule_of_one_zone_is_the_same_times_in_another(expression, zone, other, expected):
    start, until = datetime(2026, 1, 1, tzinfo=UTC), datetime(2027, 6, 1, tzinfo=UTC)
    assert in_other_zone(expression, ZoneInfo(zone), ZoneInfo(other), start) == expected
    found = cron_times(expression, ZoneInfo(zone), until if "* * * *" not in expression else start.replace(month=4))
    assert found
    assert found == cron_times(expected, ZoneInfo(other), found[-1] + timedelta(seconds=1))


@pytest.mark.parametrize(
    ("expression", "zone", "other"),
    [
        ("0 1 * * *", "America/New_York", "UTC"),
        ("0 1 * * *", "Asia/Seoul", "Europe/Berlin"),
        # Europe and America change their clocks on different days.
        ("0 1 * * *", "Europe/Berlin", "America/New_York"),
        # In the other zone these are partly on another day, or not the same minutes in each hour.
        ("0 1 1 * *", "Asia/Seoul", "UTC"),
        ("0 1 * * mon", "Asia/Seoul", "UTC"),
        ("0,45 1 * * *", "Asia/Kolkata", "UTC"),
    ],
)
def test_a_schedule_that_no_line_of_another_zone_is_right_for_is_not_translated(expression, zone, other):
    assert in_other_zone(expression, ZoneInfo(zone), ZoneInfo(other), datetime(2026, 1, 1, tzinfo=UTC)) is None
