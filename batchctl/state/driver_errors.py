"""What the driver's errors mean, by SQLSTATE."""

from __future__ import annotations

import re

import psycopg

from batchctl.errors import BatchctlError, ConfigurationError, DatabaseRefusedError, DatabaseUnavailableError

UNDEFINED = {"42P01", "3F000", "42703"}
"""SQLSTATE of a missing table, schema or column."""
READ_ONLY = "25006"
"""SQLSTATE of a standby, or of a database that was made read-only."""
IN_THE_WAY = {"40P01", "55P03"}
"""SQLSTATE of a deadlock and of a lock that was not free in time."""
PASSING = {*IN_THE_WAY, "40001", "57014"}
"""The same, a serialization failure, and a statement that took too long or was canceled."""
LASTING = ("22", "23")
"""Classes of SQLSTATE that the same statement will meet again: wrong data, a violated constraint."""


class DatabaseBusyError(DatabaseUnavailableError):
    """The database was reached; something that passes kept a statement from its end."""


class WrongDataError(DatabaseRefusedError):
    """The server will never take these values."""


class MissingObjectError(DatabaseRefusedError):
    """A table, schema or column that a statement names does not exist."""


def translate(error: psycopg.Error, place: str) -> BatchctlError:
    """Turn a driver error into ours, by SQLSTATE."""
    state = error.sqlstate
    text = " ".join((error.diag.message_primary or str(error) or type(error).__name__).split())
    if state is None:
        if isinstance(error, psycopg.OperationalError):
            return DatabaseUnavailableError(f"{place} cannot be reached: {_without_noise(text)}")
        return DatabaseRefusedError(f"{place}: {text}")
    if state in PASSING:
        blamed = "; another session is in the way, pg_locks shows which" if state in IN_THE_WAY else ""
        return DatabaseBusyError(f"{place}: {text}{blamed}")
    # Connection lost, out of resources, an I/O error, shutting down.
    if state[:2] in ("08", "53", "58") or state[:3] == "57P" or state == READ_ONLY:
        return DatabaseUnavailableError(f"{place} is not available: {text}")
    if state == "42501":
        return ConfigurationError(f"{place}: {text}; grant the right, or connect as a role that has it")
    kind = (
        MissingObjectError if state in UNDEFINED else WrongDataError if state[:2] in LASTING else DatabaseRefusedError
    )
    return kind(f"{place}: {text} (SQLSTATE {state})")


def _without_noise(text: str) -> str:
    """Cut libpq's advice, which repeats itself for each address tried."""
    return re.sub(r" Is the server running [^?]*\?", "", text)
