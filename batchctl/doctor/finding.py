"""What a check found, and what to do about it (pure)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from batchctl.errors import ConfigurationError, DatabaseUnavailableError, ExitCode

if TYPE_CHECKING:
    from collections.abc import Iterable

State = Literal["ok", "warning", "error"]

CHECKS = (
    "environment", "program", "configuration", "locale", "timezone", "state_dir", "log_dir", "disk", "cron", "crontab",
    "step", "schedule", "database", "clock", "journal", "rollup", "orphans", "job",
)  # fmt: skip
"""What is checked, in this order."""

LOOK_AGAIN = "see to that, then call `batchctl doctor` again"


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's.

    Args:
        check: What was checked, one of CHECKS.
        state: ok; warning: it works, but not as one should want it; error: a job fails, or never starts.
        found: What was found.
        advice: What to do; empty if nothing has to be done.
        exit_code: Of an error: the code with which a job would end for it.
    """

    check: str
    state: State
    found: str
    advice: str = ""
    exit_code: ExitCode = ExitCode.FAILED


def ok(check: str, found: str) -> Finding:
    """Find nothing to do."""
    return Finding(check, "ok", found)


def warning(check: str, found: str, advice: str) -> Finding:
    """Find what works, but not as one should want it."""
    return Finding(check, "warning", found, advice)


def error(check: str, found: str, advice: str, exit_code: ExitCode = ExitCode.FAILED) -> Finding:
    """Find what makes a job fail, or never start."""
    return Finding(check, "error", found, advice, exit_code)


def raised(check: str, problem: BaseException, advice: str = LOOK_AGAIN) -> Finding:
    """Turn an error that a job would have met into what was found.

    Args:
        check: What was checked.
        problem: The error; if it is one of ours, its message ends with what to do, behind a semicolon.
        advice: What to do where the message does not say it.
    """
    if isinstance(problem, OSError):
        where = f"{problem.filename}: " if problem.filename else ""
        return error(check, f"{where}{problem.strerror or problem}", advice)
    code = ExitCode.FAILED
    if isinstance(problem, ConfigurationError | DatabaseUnavailableError):
        code = problem.exit_code
    found, said, rest = " ".join(str(problem).split()).rpartition("; ")
    return error(check, found, rest, code) if said else error(check, rest, advice, code)


def exit_code(findings: Iterable[Finding]) -> ExitCode:
    """Choose the exit code: what a job would end with, else 1 for any other error, else 0."""
    codes = {finding.exit_code for finding in findings if finding.state == "error"}
    for code in (ExitCode.CONFIGURATION, ExitCode.DATABASE_UNREACHABLE, ExitCode.FAILED):
        if code in codes:
            return code
    return ExitCode.DONE
