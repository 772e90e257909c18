"""How far aggregate is with a backlog, on a terminal."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from batchctl.logs import elapsed

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

    from batchctl.clock import Clock
    from batchctl.rollup.result import Advance

PATIENCE_SECONDS = 1.0
"""What is done sooner needs no progress, and is not to wait for the library that draws."""
BAR_COLUMNS = 30


class BacklogView:
    """A line for each grain with a backlog; drawn from when one takes long, gone in the end.

    Args:
        clock: For durations.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._grains: dict[tuple[str, str], tuple[Advance, float, float]] = {}
        self._live: Live | None = None
        self._timer = threading.Timer(PATIENCE_SECONDS, self._show)
        self._timer.daemon = True

    def update(self, advance: Advance) -> None:
        """Take in how far a grain is."""
        now = self._clock.monotonic()
        if not self._grains:
            self._timer.start()
        key = (advance.rollup, advance.grain)
        _, began, _ = self._grains.get(key, (advance, now, now))
        self._grains[key] = (advance, began, now)

    def close(self) -> None:
        """Take the lines away: the result says it all."""
        self._timer.cancel()
        if self._grains:
            self._timer.join()
        if self._live is not None:
            self._live.stop()

    def _show(self) -> None:
        from batchctl.cli.live import HarmlessLive

        self._live = HarmlessLive(get_renderable=self._draw, transient=True, refresh_per_second=4)
        self._live.start()

    def _draw(self) -> Table:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2))
        grains = list(self._grains.items())
        for (rollup, grain), (advance, began, last) in grains:
            at_work = (rollup, grain) == grains[-1][0] and advance.buckets < advance.waiting
            seconds = (self._clock.monotonic() if at_work else last) - began
            # Only up to the last chunk is it known what was read.
            rate = advance.source_rows / max(last - began, 0.001)
            table.add_row(
                Text(f"{rollup} {grain}"),
                ProgressBar(total=max(advance.waiting, 1), completed=advance.buckets, width=BAR_COLUMNS),
                Text(f"{advance.buckets:,} of {advance.waiting:,} buckets"),
                Text(f"{rate:,.0f} rows/s" if advance.source_rows else ""),
                Text(elapsed(seconds)),
            )
        return table
