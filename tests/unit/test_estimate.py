"""How long a run is taken to last, by values alone."""

from __future__ import annotations

import logging
from datetime import timedelta

import pytest

from batchctl.batch.overrun import Overrun
from batchctl.config import Batch, Group, Step, parse_duration
from batchctl.schedule.estimate import Estimate, estimate
from batchctl.state.claim import PastRun, PastStep

HOUR = 3600.0


def steps(*ids, **options):
    return tuple(Step(id=each, command=("true",), **options) for each in ids)


def past(seconds, *taken):
    """Make a run of account a: step, quantity, seconds."""
    return PastRun(seconds, tuple(PastStep("a", *each) for each in taken))


def test_before_the_first_success_it_is_the_timeout():
    found = estimate(Batch(step=steps("31"), timeout=parse_duration("7h")), None, [])
    assert (found.seconds, found.runs, found.overdue_after) == (7 * HOUR, 0, None)


def test_it_is_the_median_as_long_as_no_quantity_changes():
    batch = Batch(step=steps("31"), accounts=("a",))
    runs = [past(seconds, ("31", 100, 1.0)) for seconds in (26 * HOUR, 25 * HOUR, 400 * HOUR, 27 * HOUR)]
    found = estimate(batch, None, runs)
    assert (found.seconds, found.runs, found.scaled) == (26.5 * HOUR, 4, False)
    assert str(found) == "26h30m (median of the last 4 successes)"


def test_a_run_whose_steps_were_not_recorded_is_no_change():
    assert estimate(Batch(step=steps("31")), None, [past(26 * HOUR)]).seconds == 26 * HOUR


def test_a_changed_quantity_is_seconds_per_unit_times_the_quantity():
    batch = Batch(step=(*steps("31", quantity=150), *steps("61")), accounts=("a",))
    run = past(26 * HOUR, ("31", 100, 20 * HOUR), ("61", 100, 6 * HOUR))
    found = estimate(batch, None, [run])
    assert (found.seconds, found.scaled) == (36 * HOUR, True)
    unchanged = Batch(step=steps("31", "61"), accounts=("a",))
    assert estimate(unchanged, None, [run]).seconds == 26 * HOUR, "the control"


def test_runs_of_both_quantities_are_converted_each_by_its_own():
    batch = Batch(step=steps("31", quantity=300), accounts=("a",))
    runs = [past(0, ("31", 300, 3300.0)), past(0, ("31", 100, 1000.0)), past(0, ("31", 200, 2400.0))]
    assert estimate(batch, None, runs).seconds == 3300, "the median of 3300, 3000 and 3600"


def test_a_quantity_of_nothing_has_no_seconds_per_unit():
    batch = Batch(step=steps("31", quantity=5), accounts=("a",))
    assert estimate(batch, None, [past(9, ("31", 0, 9.0))]).seconds == 9
    batch = Batch(step=steps("31", quantity=0), accounts=("a",))
    assert estimate(batch, None, [past(9, ("31", 5, 9.0))]).seconds == 0


@pytest.mark.parametrize(("parallel", "seconds"), [(False, 60), (True, 40)])
def test_a_parallel_group_takes_as_long_as_its_longest_step(parallel, seconds):
    batch = Batch(
        step=(*steps("1", "2", group="g", quantity=2), *steps("3", quantity=2)),
        accounts=("a",),
        group={"g": Group(parallel=parallel)},
    )
    run = past(30, ("1", 1, 10.0), ("2", 1, 10.0), ("3", 1, 10.0))
    assert estimate(batch, None, [run]).seconds == seconds
    assert estimate(batch, "g", [run]).seconds == seconds - 20, "a group is its own steps"


def test_a_group_that_never_ran_alone_is_known_by_its_steps_in_runs_of_the_whole_batch():
    batch = Batch(step=(*steps("31", "32", group="search"), *steps("61", group="upload")), accounts=("a",))
    runs = [
        past(3 + last, ("31", 100, 1.0), ("32", 100, 2.0), ("61", 100, last))._replace(of_batch=True)
        for last in (0.4, 1.0, 0.6)
    ]
    search, upload = (estimate(batch, group, runs) for group in ("search", "upload"))
    assert (search.seconds, search.runs, upload.seconds) == (3, 3, 0.6)
    assert str(search) == "3.0s (its steps in the last 3 successes of the whole batch)"
    more = Batch(step=(*batch.step, *steps("71", group="new")), accounts=("a",))
    unknown = estimate(more, "new", runs)
    assert (unknown.seconds, unknown.runs) == (30 * HOUR, 0), "no step of it ever ran"
    bare = [past(3.4)._replace(of_batch=True)]
    assert estimate(batch, "search", bare).runs == 0, "what a whole batch took says nothing about a group"


@pytest.mark.parametrize(("most", "seconds"), [(1, 70), (2, 50), (3, 40), (9, 40)])
def test_accounts_run_beside_each_other_as_many_as_may(most, seconds):
    batch = Batch(step=steps("1", quantity=1), accounts=("a", "b", "c"), max_parallel=most)
    taken = {"a": 1, "b": 2, "c": 4}
    run = PastRun(7, tuple(PastStep(account, "1", 10, 100.0 * units) for account, units in taken.items()))
    assert estimate(batch, None, [run]).seconds == seconds


def test_a_new_account_is_as_quick_as_the_others_and_a_new_step_takes_its_timeout():
    batch = Batch(step=steps("1"), accounts=("a", "new"))
    assert estimate(batch, None, [past(10, ("1", 100, 10.0))]).seconds == 20
    batch = Batch(step=(*steps("1"), *steps("new", timeout=parse_duration("1h"))), accounts=("a",))
    runs = [past(10, ("1", 100, 10.0))] * 9
    assert estimate(batch, None, runs).seconds == 10 + HOUR
    once = past(12, ("1", 100, 10.0), ("new", 100, 2.0))
    assert estimate(batch, None, [once, *runs]).seconds == 12, "one run is enough to know it"


class Ticking:
    """A clock that is told how late it is."""

    def __init__(self):
        self.seconds = 0.0

    def monotonic(self):
        return self.seconds


@pytest.mark.parametrize(("runs", "warnings"), [(10, 1), (0, 0)])
def test_a_run_that_exceeds_its_estimate_by_half_is_warned_of_once(runs, warnings, caplog):
    clock = Ticking()
    overrun = Overrun(Estimate(26 * HOUR, runs), 0.0, clock, logging.getLogger("overrun"))
    clock.seconds = 39 * HOUR
    overrun.look()
    assert not caplog.records, "by half, not by nearly half"
    for clock.seconds in (39 * HOUR + 60, 40 * HOUR, 80 * HOUR):
        overrun.look()
    assert [record.levelname for record in caplog.records] == ["WARNING"] * warnings
    if warnings:
        assert caplog.messages == [
            "Still running after 39h1m, which exceeds the estimate by half: 26h0m (median of the last 10 successes)"
        ]
    assert Estimate(26 * HOUR, runs).overdue_after == (timedelta(hours=39) if runs else None)


def test_a_run_of_seconds_is_not_overdue_before_batchctl_looks_at_it():
    assert [Estimate(seconds, 3).overdue_after.total_seconds() for seconds in (0.1, 3, 4, 60)] == [5, 5, 6, 90]
