"""The warning that a run takes much longer than such runs did; it ends nothing and changes no outcome."""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchctl.logs import elapsed

if TYPE_CHECKING:
    import logging

    from batchctl.clock import Clock
    from batchctl.schedule.estimate import Estimate


class Overrun:
    """Looks now and then how long a run has lasted, and warns once when that exceeds the estimate by half.

    Args:
        expected: How long the job is taken to run; without a success before there is no warning.
        began: When the run began, by the monotonic clock.
    """

    def __init__(self, expected: Estimate, began: float, clock: Clock, log: logging.Logger) -> None:
        self._expected = expected
        self._began = began
        self._clock = clock
        self._log = log
        self._limit = expected.overdue_after

    def look(self) -> None:
        """Warn if it is time."""
        lasted = self._clock.monotonic() - self._began
        if self._limit is not None and lasted > self._limit.total_seconds():
            self._limit = None
            self._log.warning(
                "Still running after %s, which exceeds the estimate by half: %s", elapsed(lasted), self._expected
            )
