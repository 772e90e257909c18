"""The view of a backlog: when it is drawn, and what it says."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from batchctl.cli import progress
from batchctl.cli.progress import BacklogView
from batchctl.rollup.result import Advance


class Clock:
    """A clock that the test moves."""

    now = 100.0

    def monotonic(self):
        return self.now


def lines(view):
    console = Console(file=io.StringIO(), width=100)
    console.print(view._draw())
    return [" ".join(line.split()) for line in console.file.getvalue().splitlines()]


@pytest.fixture
def view():
    made = BacklogView(Clock())
    yield made
    made.close()


def test_nothing_is_drawn_of_a_backlog_that_is_done_at_once(view):
    view.update(Advance("trend", "1m", 10, 0, 0))
    view.update(Advance("trend", "1m", 10, 10, 100))
    view.close()
    assert view._live is None


def test_a_long_one_is_drawn(monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE_SECONDS", 0)
    long = BacklogView(Clock())
    long.update(Advance("trend", "1m", 10, 0, 0))
    long._timer.join()
    long.close()
    assert long._live is not None


def test_a_grain_that_is_done_keeps_its_figures_while_the_next_goes_on(view):
    view.update(Advance("trend", "1m", 1000, 0, 0))
    view._clock.now += 2
    view.update(Advance("trend", "1m", 1000, 1000, 50_000))
    view._clock.now += 1
    view.update(Advance("trend", "5m", 200, 0, 0))
    view._clock.now += 60
    first, second = lines(view)
    assert first.startswith("trend 1m")
    assert first.endswith("1,000 of 1,000 buckets 25,000 rows/s 2.0s")
    assert second.endswith("0 of 200 buckets 1m0s")
