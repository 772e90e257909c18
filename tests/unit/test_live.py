"""The view of a run: what is shown where not everything fits."""

from __future__ import annotations

import io
from datetime import timedelta

import pytest
from rich.console import Console

from batchctl.batch.plan import AccountPlan, Plan, PlannedStep
from batchctl.batch.result import StepResult
from batchctl.cli.live import LiveRun, counts, fitting


def result(account, step, outcome="success", *, running=False):
    return StepResult(account, step, None, 1, outcome, duration_seconds=1.0, log=f"/l/{account}/1.log", running=running)


def rows(count, **special):
    names = [f"s{number:02}" for number in range(count)]
    return {("a", name): special.get(name) for name in names}


def test_everything_is_shown_where_it_fits():
    assert fitting(rows(10), 10) == rows(10)
    assert fitting(rows(100), None) == rows(100)


def test_what_runs_and_what_failed_is_shown_first_and_in_order():
    special = {f"s{number:02}": result("a", f"s{number:02}") for number in range(40)}
    special["s05"] = result("a", "s05", "failed")
    special["s40"] = result("a", "s40", running=True)
    shown = fitting(rows(50, **special), 5)
    assert [step for _, step in shown] == ["s05", "s40", "s41", "s42"]
    assert counts(rows(50, **special).values()) == "in all: 39 success, 1 failed, 1 running, 9 waiting"


@pytest.fixture
def view():
    """A view of 40 steps on a terminal of 60 columns and 12 lines."""
    steps = [
        PlannedStep("load [eu]", f"[red]{number}" + "x" * 50, None, 1, timedelta(1), 0, ("true",), {})
        for number in range(40)
    ]
    made = LiveRun(
        Plan("daily", "daily", (), None, None, (AccountPlan("load [eu]", tuple((step,) for step in steps)),))
    )
    made._console = Console(file=io.StringIO(), width=60, height=12, force_terminal=True, color_system=None)
    for number, step in enumerate(steps[:30]):
        made._rows[step.account, step.step] = result(step.account, step.step, "failed" if number == 3 else "success")
    made.update(result(steps[30].account, steps[30].step, running=True))
    made._live.stop()
    made._console = Console(file=io.StringIO(), width=60, height=12, force_terminal=True, color_system=None)
    return made


def drawn(view):
    view._console.print(view._draw())
    return view._console.file.getvalue()


def test_what_is_drawn_fits_the_screen_and_has_names_as_they_are(view):
    text = drawn(view)
    assert text.count("\n") < 12
    assert all(len(line) <= 60 for line in text.splitlines())
    assert "load [eu]" in text
    assert "[red]30x" in text
    assert "[red]3x" in text
    assert "in all: 29 success, 1 failed, 1 running, 9 waiting" in text
    assert "output in /l/load [eu]" in text


def test_at_the_end_all_of_it_is_shown(view):
    view._over = True
    text = drawn(view)
    for number in range(40):
        assert f"[red]{number}x" in text
    assert "x" * 51 not in text
    assert sum(line.count("x") for line in text.splitlines()) >= 40 * 50
    assert "in all" not in text


def test_headings_are_whole_above_short_names():
    step = PlannedStep("a1", "1", None, 1, timedelta(1), 0, ("true",), {})
    made = LiveRun(Plan("daily", "daily", (), None, None, (AccountPlan("a1", ((step,),)),)))
    made._console = Console(file=io.StringIO(), width=80, height=12, force_terminal=True, color_system=None)
    for made._over in (False, True):
        assert drawn(made).splitlines()[0].split() == ["account", "step", "state", "time"]
        made._console = Console(file=io.StringIO(), width=80, height=12, force_terminal=True, color_system=None)
