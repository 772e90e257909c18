"""The view of a run on a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from batchctl.cli.terminal import harmless
from batchctl.clock import SystemClock
from batchctl.logs import elapsed

if TYPE_CHECKING:
    from batchctl.batch.plan import Plan
    from batchctl.batch.result import StepResult

STYLES = {"success": "green", "failed": "red", "timeout": "red", "stopped": "yellow", "not_run": "dim"}


class _Live(Live):
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
        self._rows: dict[tuple[str, str], StepResult | None] = {(step.account, step.step): None for step in plan.steps}
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
            self._live = _Live(get_renderable=self._draw, console=Console(), refresh_per_second=4)
            self._live.start()

    def close(self) -> None:
        """Leave the last state on the screen."""
        self._over = True
        if self._live is not None:
            self._live.stop()

    def _draw(self) -> Group:
        table = Table("account", "step", "", "time", box=None, pad_edge=False, header_style="bold")
        for (account, step), result in self._rows.items():
            if result is None:
                table.add_row(account, step, Text("not run" if self._over else "waiting", "dim"), "")
            elif result.running:
                passed = elapsed(self._clock.monotonic() - self._began[account, step])
                table.add_row(account, step, self._spinners[account, step], passed)
            else:
                outcome = Text(result.outcome, STYLES.get(result.outcome, ""))
                table.add_row(account, step, outcome, elapsed(result.duration_seconds or 0))
        directories = {str(Path(result.log).parent) for result in self._rows.values() if result and result.log}
        return Group(table, *(Text(f"output in {directory}", "dim", overflow="fold") for directory in directories))
