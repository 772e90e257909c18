"""Cron times one after another, over the changes of the clocks."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import islice, pairwise
from zoneinfo import ZoneInfo

import pytest

from batchctl.schedule.times import cron_times, marked_times, period, repeating_times

LONDON = ZoneInfo("Europe/London")


def test_the_beginning_counts():
    begin = datetime(2026, 1, 1, 1, tzinfo=UTC)
    assert next(cron_times("0 1 * * *", begin, UTC)) == begin


def test_two_times_that_a_change_puts_together_are_one_start():
    times = list(islice(cron_times("0 1,2 * * *", datetime(2026, 3, 28, 12, tzinfo=UTC), LONDON), 3))
    assert times == [
        datetime(2026, 3, 29, 1, tzinfo=UTC),
        *(datetime(2026, 3, 30, hour, tzinfo=UTC) for hour in (0, 1)),
    ]


@pytest.mark.parametrize("expression", ["0,45 1 * * *", "*/20 * * * *", "30 */3 * * *"])
@pytest.mark.parametrize("hour", [0, 1])
def test_times_only_go_forward_wherever_one_begins_in_a_repeated_hour(expression, hour):
    begin = datetime(2026, 10, 25, hour, 10, tzinfo=UTC)
    times = [begin, *islice(cron_times(expression, begin, LONDON), 20)]
    assert all(earlier < later for earlier, later in pairwise(times))


def test_what_is_missing_is_said_at_the_next_cron_time_only():
    begin = datetime(2026, 3, 27, tzinfo=UTC)
    times = list(marked_times("30 1 * * *", begin, begin + timedelta(days=5), LONDON))
    assert [time.daylight_saving for time in times] == [None, None, "missing", None, None]
    assert times[2].note.startswith("01:30 does not exist on 2026-03-29")


@pytest.mark.parametrize(
    ("expression", "days"),
    [("0 1 * * *", 1), ("0 1 * * 1-5", 7), ("0 1 */2 * *", 1461), ("0 1 29 2 *", 1461), ("0 1 1 * 1", 10227)],
)
def test_a_schedule_repeats_after_its_period(expression, days):
    assert period((expression,)) == timedelta(days=days)
    begin = datetime(2024, 1, 1, tzinfo=UTC)
    real = list(islice(cron_times(expression, begin, UTC), 15))
    assert list(islice(repeating_times(expression, begin), 15)) == real
