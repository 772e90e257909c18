"""The earliest next start, by values alone."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest

from batchctl.guard.gap import GapRule, due_after, earliest_start, refused
from batchctl.schedule.cron import next_time

HOUR = timedelta(hours=1)
NOON = datetime(2024, 6, 1, 12, tzinfo=UTC)


def rule(**changes):
    return GapRule(
        **{"min_gap": 6 * HOUR, "gap_factor": 0, "every": timedelta(0), "zone": UTC, **changes}  # type: ignore[arg-type]
    )


def test_the_first_start_is_free():
    assert earliest_start(rule(), last_completed_at=None, last_started_at=None, estimate=HOUR) is None


def test_six_hours_after_a_completion():
    refusal = earliest_start(rule(), last_completed_at=NOON, last_started_at=NOON - 26 * HOUR, estimate=26 * HOUR)
    assert (refusal.reason, refusal.next_eligible_at) == ("gap", NOON + 6 * HOUR)
    assert refused(refusal, NOON + 6 * HOUR - timedelta(microseconds=1))
    assert not refused(refusal, NOON + 6 * HOUR)


@pytest.mark.parametrize(("factor", "hours"), [(0, 6), (0.1, 6), (1.2, 31.2)])
def test_the_gap_grows_with_the_estimate_but_never_below_the_minimum(factor, hours):
    refusal = earliest_start(rule(gap_factor=factor), last_completed_at=NOON, last_started_at=None, estimate=26 * HOUR)
    assert refusal.next_eligible_at == NOON + hours * HOUR


def test_every_counts_from_the_start_and_the_later_rule_decides():
    both = rule(every=48 * HOUR)
    refusal = earliest_start(both, last_completed_at=NOON, last_started_at=NOON - 26 * HOUR, estimate=HOUR)
    assert (refusal.reason, refusal.next_eligible_at) == ("not_due", NOON + 22 * HOUR - timedelta(seconds=60))
    refusal = earliest_start(both, last_completed_at=NOON, last_started_at=NOON - 47 * HOUR, estimate=HOUR)
    assert refusal.reason == "gap"


@pytest.mark.parametrize(
    ("start", "due"),
    [
        # 2024-03-31 has 23 hours in Berlin, 2024-10-27 has 25.
        (datetime(2024, 3, 30, 12, tzinfo=UTC), datetime(2024, 3, 31, 11, tzinfo=UTC)),
        (datetime(2024, 10, 26, 12, tzinfo=UTC), datetime(2024, 10, 27, 13, tzinfo=UTC)),
    ],
)
def test_whole_days_are_local_days(start, due):
    assert due_after(start, timedelta(days=1), ZoneInfo("Europe/Berlin")) == due


def london(*moment, fold=0):
    return datetime(*moment, tzinfo=ZoneInfo("Europe/London"), fold=fold).astimezone(UTC)


@pytest.mark.parametrize(
    ("start", "days", "due"),
    [
        # 2026-03-29 has no 01:00 to 01:59: cron starts what stands there at 02:00.
        (london(2026, 3, 28, 1, 0), 1, london(2026, 3, 29, 2, 0)),
        (london(2026, 3, 28, 1, 30), 1, london(2026, 3, 29, 2, 0)),
        (london(2026, 3, 27, 1, 59, 59), 2, london(2026, 3, 29, 2, 0)),
        (london(2026, 3, 28, 0, 59), 1, london(2026, 3, 29, 0, 59)),
        (london(2026, 3, 28, 2, 0), 1, london(2026, 3, 29, 2, 0)),
        # There it is that start of 01:00, so the next one is due at 01:00 again.
        (london(2026, 3, 29, 2, 0), 1, london(2026, 3, 30, 1, 0)),
        (london(2026, 3, 29, 2, 0, 59), 1, london(2026, 3, 30, 1, 0, 59)),
        (london(2026, 3, 29, 2, 1), 1, london(2026, 3, 30, 2, 1)),
        (london(2026, 3, 29, 0, 59), 1, london(2026, 3, 30, 0, 59)),
        # 2026-10-25 has them twice.
        (london(2026, 10, 24, 1, 30), 1, london(2026, 10, 25, 1, 30, fold=0)),
        (london(2026, 10, 25, 1, 30, fold=0), 1, london(2026, 10, 26, 1, 30)),
        (london(2026, 10, 25, 1, 30, fold=1), 1, london(2026, 10, 26, 1, 30)),
        (london(2026, 10, 25, 1, 0, fold=1), 1, london(2026, 10, 26, 1, 0)),
    ],
    ids=str,
)
def test_a_local_time_that_does_not_exist_or_exists_twice(start, days, due):
    assert due_after(start, timedelta(days=days), ZoneInfo("Europe/London")) == due


def test_a_day_that_does_not_exist_at_all():
    apia = ZoneInfo("Pacific/Apia")
    start = datetime(2011, 12, 29, 12, tzinfo=apia)
    assert due_after(start, timedelta(days=1), apia) == datetime(2011, 12, 31, 0, tzinfo=apia)


def test_each_daily_cron_time_of_a_year_is_allowed_by_every_day():
    """By the times that the cron library gives, 59 seconds early after one that was 59 seconds late."""
    for zone in (ZoneInfo("Europe/London"), ZoneInfo("Australia/Lord_Howe")):
        for hour in (1, 2):
            due = next_time(f"30 {hour} * * *", datetime(2026, 1, 1, tzinfo=UTC), zone)
            for _ in range(365):
                start = due
                due = next_time(f"30 {hour} * * *", start, zone)
                daily = rule(every=timedelta(days=1), zone=zone)
                late = start + timedelta(seconds=59)
                refusal = earliest_start(daily, last_completed_at=None, last_started_at=late, estimate=HOUR)
                assert not refused(refusal, due), (zone, start, due)
                assert refused(refusal, due - 2 * HOUR), (zone, start, due)


def test_other_lengths_are_counted_by_the_clock():
    assert due_after(NOON, 30 * HOUR, ZoneInfo("Europe/Berlin")) == NOON + 30 * HOUR
