"""The view of a run on a terminal."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console, Group
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from batchctl.cli.terminal import harmless
from batchctl.clock import SystemClock
from batchctl.logs import elapsed

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from batchctl.batch.plan import Plan
    from batchctl.batch.result import StepResult

Rows = dict[tuple[str, str], "StepResult | None"]
HEADINGS = ("account", "step")
OUTCOME_ROOM = 22
"""Columns of the terminal for an outcome, a duration, and the spaces between all columns."""
STYLES = {"success": "green", "failed": "red", "timeout": "red", "stopped": "yellow", "not_run": "dim"}


class HarmlessLive(Live):
    """Goes on in silence when the terminal goes away, also in the thread that refreshes it."""

    def start(self, refresh: bool = False) -> None:
        with harmless():
            super().start(refresh)

    def refresh(self) -> None:
        with harmless():
            super().refresh()

    def stop(self) -> None:
        with harmless():
            super().stop()


class LiveRun:
    """A table of the steps that follows the run; drawn first when the first step starts, so a skip draws nothing."""

    def __init__(self, plan: Plan) -> None:
        self._clock = SystemClock()
        self._console = Console()
        self._rows: Rows = {(step.account, step.step): None for step in plan.steps}
        self._began: dict[tuple[str, str], float] = {}
        self._spinners: dict[tuple[str, str], Spinner] = {}
        self._live: Live | None = None
        self._over = False

    def update(self, result: StepResult) -> None:
        """Take in what a step has become."""
        key = (result.account, result.step)
        self._rows[key] = result
        if result.running:
            self._began.setdefault(key, self._clock.monotonic())
            self._spinners.setdefault(key, Spinner("dots"))
        if self._live is None:
            self._live = HarmlessLive(get_renderable=self._draw, console=self._console, refresh_per_second=4)
            self._live.start()

    def close(self) -> None:
        """Leave the last state on the screen."""
        self._over = True
        if self._live is not None:
            self._live.stop()

    def _draw(self) -> Group:
        width, height = self._console.size
        footer = self._footer(width)
        # The last line stays free for the cursor, the first is the headings.
        shown = fitting(self._rows, None if self._over else height - 2 - len(footer))
        room = width - OUTCOME_ROOM
        longest = [max(cell_len(name[part]) for name in (HEADINGS, *self._rows)) for part in (0, 1)]
        account_room = min(longest[0], max(room // 2, room - longest[1]))
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name, most in zip(HEADINGS, (account_room, room - account_room), strict=True):
            # While it is drawn anew each row has one line; what is left on the screen has everything.
            table.add_column(
                name, no_wrap=not self._over, overflow="fold" if self._over else "ellipsis", max_width=most
            )
        table.add_column("state", no_wrap=True)
        table.add_column("time", no_wrap=True)
        for (account, step), result in shown.items():
            state, time = self._state((account, step), result)
            table.add_row(Text(account), Text(step), state, time)
        if len(shown) < len(self._rows):
            footer.insert(0, Text(counts(self._rows.values()), "dim"))
        return Group(table, *footer)

    def _state(self, key: tuple[str, str], result: StepResult | None) -> tuple[Text | Spinner, str]:
        if result is None:
            return Text("not run" if self._over else "waiting", "dim"), ""
        if result.running:
            return self._spinners[key], elapsed(self._clock.monotonic() - self._began[key])
        return Text(result.outcome, STYLES.get(result.outcome, "")), elapsed(result.duration_seconds or 0)

    def _footer(self, width: int) -> list[Text]:
        directories = {Path(result.log).parent for result in self._rows.values() if result and result.log}
        if not directories:
            return []
        # Each account has a directory of its own below that of the run.
        directory = directories.pop() if len(directories) == 1 else directories.pop().parent
        text = f"output in {directory}"
        return [Text(text[start : start + width], "dim") for start in range(0, len(text), width)]


def fitting(rows: Mapping[tuple[str, str], StepResult | None], most: int | None) -> Rows:
    """Choose the rows that fit on the screen, in their order: first what runs, then what failed, then what is next.

    Args:
        rows: What became of each step of each account so far.
        most: Lines that there are; one less is used if a line of counts is needed. None for all.
    """
    if most is None or len(rows) <= most:
        return dict(rows)

    def rank(item: tuple[int, StepResult | None]) -> tuple[int, int]:
        place, result = item
        if result is None:
            return 2, place
        if result.running:
            return 0, place
        # Of those that are over, the latest.
        return (3 if result.outcome == "success" else 1), -place

    chosen = sorted(enumerate(rows.values()), key=rank)[: max(most - 1, 1)]
    kept = {place for place, _ in chosen}
    return {key: result for place, (key, result) in enumerate(rows.items()) if place in kept}


def counts(results: Iterable[StepResult | None]) -> str:
    """Say of how many steps what has become."""
    found = Counter(
        "waiting" if result is None else "running" if result.running else result.outcome for result in results
    )
    return "in all: " + ", ".join(f"{count} {state}" for state, count in found.items())
