"""What became of a start and of each step: frozen, for render.py to show."""

from __future__ import annotations

from dataclasses import dataclass
from signal import SIGTERM
from typing import TYPE_CHECKING

from batchctl.errors import ExitCode

if TYPE_CHECKING:
    from datetime import datetime

    from batchctl.guard.liveness import Orphan


@dataclass(frozen=True)
class StepResult:
    """What became of a step for an account; `not_run` until it has started."""

    account: str
    step: str
    group: str | None
    quantity: int
    outcome: str = "not_run"
    exit_code: int | None = None
    signal: int | None = None
    reason: str | None = None
    attempts: int = 0
    duration_seconds: float | None = None
    log: str | None = None
    running: bool = False


@dataclass(frozen=True)
class HolderShown:
    """Who is in the way."""

    host: str
    pid: int
    started_at: datetime


@dataclass(frozen=True)
class RunResult:
    """What became of a start; `reason` is a skip reason, or what ended the run in words."""

    batch: str
    group: str | None
    outcome: str
    reason: str | None = None
    run_id: str | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    duration_seconds: float | None = None
    next_eligible_at: datetime | None = None
    holder: HolderShown | None = None
    steps: tuple[StepResult, ...] = ()
    message: str = ""
    signal: int | None = None
    orphans: tuple[Orphan, ...] = ()

    @property
    def exit_code(self) -> int:
        """Say it as a number; --skip-exit-code is the caller's."""
        if self.outcome == "stopped":
            # Asked for in another way than by a signal, a run ends as if by the usual one.
            return ExitCode.SIGNAL + (self.signal or SIGTERM)
        return {
            "success": ExitCode.DONE,
            "partial": ExitCode.PARTIAL,
            "failed": ExitCode.FAILED,
            "timeout": ExitCode.DEADLINE,
            "skipped": ExitCode.SKIPPED,
        }[self.outcome]
