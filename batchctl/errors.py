"""Exit codes, and the errors that a user is expected to meet."""

from __future__ import annotations

import re
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class ExitCode(IntEnum):
    """Tell a crontab or a script how a command ended (BSD sysexits where one fits)."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    PARTIAL = 3
    DATABASE_UNREACHABLE = 69
    BUG = 70
    SKIPPED = 75
    CONFIGURATION = 78
    DEADLINE = 124
    SIGNAL = 128


MEANING = {
    ExitCode.DONE: "done; for aggregate also: nothing to aggregate",
    ExitCode.FAILED: 'failed: no step succeeded, or on_failure = "stop"; aggregation failed',
    ExitCode.USAGE: "wrong usage",
    ExitCode.PARTIAL: "partial: some steps failed or timed out, at least one succeeded",
    ExitCode.DATABASE_UNREACHABLE: "database unreachable, nothing was started",
    ExitCode.BUG: "a bug in batchctl",
    ExitCode.SKIPPED: "skipped, whatever the reason (--skip-exit-code changes it)",
    ExitCode.CONFIGURATION: "configuration error",
    ExitCode.DEADLINE: "the batch deadline ended the run",
    ExitCode.SIGNAL: "128+N: ended by signal N",
}


def choices(names: Iterable[str]) -> str:
    """List names for a message; in quotes where somebody could misread one."""
    shown = [name if re.fullmatch(r"[A-Za-z0-9_./-]+", name) else repr(name) for name in names]
    return ", ".join(shown) or "(none)"


class BatchctlError(Exception):
    """Something went wrong that the user can do something about; the message says what, on what, and what to do."""

    exit_code = ExitCode.FAILED


class UsageError(BatchctlError):
    """A command line asks for something that does not exist or does not fit together."""

    exit_code = ExitCode.USAGE


class ConfigurationError(BatchctlError):
    """The configuration, or what it points at, has to be changed before anything can run."""

    exit_code = ExitCode.CONFIGURATION


class DatabaseUnavailableError(BatchctlError):
    """The database cannot be reached or was lost."""

    exit_code = ExitCode.DATABASE_UNREACHABLE


class DatabaseRefusedError(BatchctlError):
    """The database was reached and refused a statement."""
