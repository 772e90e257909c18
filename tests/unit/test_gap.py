"""The earliest next start, by values alone."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest

from batchctl.guard.gap import GapRule, due_after, earliest_start, refused

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


def test_other_lengths_are_counted_by_the_clock():
    assert due_after(NOON, 30 * HOUR, ZoneInfo("Europe/Berlin")) == NOON + 30 * HOUR
