"""The wish to end a run early: from a signal, from `stop` on any host, or because the claim is no longer ours."""

from __future__ import annotations

import signal
import threading
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Stop(StrEnum):
    """How a run is asked to end."""

    STOP = "stop"
    AFTER_STEP = "after_step"
    NOW = "now"

    @property
    def words(self) -> str:
        """Say it for people."""
        return {Stop.STOP: "now, with grace", Stop.AFTER_STEP: "after its step", Stop.NOW: "at once"}[self]


STOP_SIGNALS = {Stop.STOP: signal.SIGRTMIN + 1, Stop.AFTER_STEP: signal.SIGUSR1, Stop.NOW: signal.SIGUSR2}
"""By which signal `stop` asks a run of its own host: none that anybody else sends."""
ASKED = "`batchctl stop` asked for it"


class Interruption:
    """What every waiting thread sees: how often the end was asked for, by what, and whether only after the step."""

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.signal: int | None = None
        self.reason: str | None = None
        self.count = 0
        self.after_step = False
        self.told: Callable[[Stop, str], None] = lambda _how, _reason: None
        """Called for each wish that changes something."""

    def receive(self, number: int) -> None:
        """Take a signal: one of those of `stop`, or the usual ones, of which the second one ends the grace."""
        for how, expected in STOP_SIGNALS.items():
            if number == expected:
                self.ask(how)
                return
        with self.condition:
            self.signal = self.signal or number
        self.request(Stop.STOP, f"batchctl received signal {number} ({signal.Signals(number).name})")

    def ask(self, how: Stop) -> None:
        """Take a wish of `stop`; one that asks for no more than was asked before changes nothing."""
        known = {Stop.AFTER_STEP: self.asked, Stop.STOP: self.count > 0, Stop.NOW: self.count > 1}
        if not known[how]:
            self.request(how, ASKED)

    def request(self, how: Stop, reason: str) -> None:
        """Ask for the end; a second request cuts the grace of the steps short."""
        with self.condition:
            self.reason = self.reason or reason
            if how is Stop.AFTER_STEP:
                self.after_step = True
            else:
                self.count += 2 if how is Stop.NOW else 1
            at_once = self.count > 1
            self.condition.notify_all()
        self.told(Stop.NOW if at_once else how, reason)

    @property
    def asked(self) -> bool:
        """Tell whether nothing more may be begun."""
        return self.count > 0 or self.after_step

    def look(self) -> None:
        """Let every waiting thread look at the clock: a machine that was suspended wakes up behind its deadlines."""
        with self.condition:
            self.condition.notify_all()

    def wait(self, seconds: float, over: Callable[[], bool]) -> None:
        """Wait that long, or until the end is asked for or the time is over by the clock."""
        with self.condition:
            self.condition.wait_for(lambda: self.asked or over(), seconds)
