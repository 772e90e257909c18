"""Log lines: one shape for files and streams, local time in front, as text or JSON."""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
from contextlib import suppress
from datetime import UTC, datetime, timedelta, tzinfo
from typing import TYPE_CHECKING, ClassVar

from batchctl.paths import private_directory

if TYPE_CHECKING:
    from pathlib import Path

SHOWN_TIME = "%Y-%m-%d %H:%M:%S"
MINUTE, HOUR = 60, 3600


def shown(instant: datetime, zone: tzinfo) -> str:
    """Write an instant for people: local, to the second."""
    return instant.astimezone(zone).strftime(SHOWN_TIME)


def rfc3339(instant: datetime | None) -> str | None:
    """Write an instant for programs: UTC, to the microsecond if it has any."""
    return None if instant is None else instant.astimezone(UTC).isoformat().replace("+00:00", "Z")


def elapsed(duration: timedelta | float) -> str:
    """Write a duration for people: 26h0m, 12m5s, 4.2s."""
    seconds = duration.total_seconds() if isinstance(duration, timedelta) else duration
    if seconds >= HOUR:
        return f"{int(seconds // HOUR)}h{int(seconds % HOUR // MINUTE)}m"
    if seconds >= MINUTE:
        return f"{int(seconds // MINUTE)}m{int(seconds % MINUTE)}s"
    return f"{seconds:.1f}s"


class Line(logging.Formatter):
    """`[daily] 2024-01-01 01:00:00 | INFO | Run started`; a record may carry its own instant as `at`."""

    def __init__(self, zone: tzinfo) -> None:
        super().__init__()
        self._zone = zone

    def format(self, record: logging.LogRecord) -> str:
        name = record.name.rpartition("batchctl.")[2]
        # One record is one line, whatever an error message may contain.
        message = " ".join(record.getMessage().split("\n"))
        return f"[{name}] {shown(self.instant(record), self._zone)} | {record.levelname} | {message}"

    def instant(self, record: logging.LogRecord) -> datetime:
        """Return the instant that a record is about."""
        at: datetime | None = getattr(record, "at", None)
        return at or datetime.fromtimestamp(record.created, UTC)


class JsonLine(Line):
    """The same as one JSON object for each line."""

    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(
            {
                "at": rfc3339(self.instant(record)),
                "level": record.levelname,
                "name": record.name.rpartition("batchctl.")[2],
                "message": record.getMessage(),
            },
            ensure_ascii=False,
        )


class PrivateFile(logging.Handler):
    """Appends to a file that only its owner can read; each line is one write, so that processes do not mix theirs."""

    complained: ClassVar[bool] = False
    """Whether this process has said that lines are lost: once is enough."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        line = f"{self.format(record)}\n".encode(errors="replace")
        # A log is a side channel: a full disk must not end a batch of 26 hours.
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
            try:
                if os.write(descriptor, line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            finally:
                os.close(descriptor)
        except OSError as error:
            self._complain(error)

    def _complain(self, error: OSError) -> None:
        if not PrivateFile.complained:
            PrivateFile.complained = True
            with suppress(OSError, ValueError, AttributeError):
                sys.stderr.write(
                    f"batchctl: log {self._path} cannot be written: {error.strerror}; its lines are lost\n"
                )
                sys.stderr.flush()


class StandardError(logging.Handler):
    """Writes to standard error as it is at that moment, so that a view on the terminal can make room for a line."""

    def emit(self, record: logging.LogRecord) -> None:
        # Nobody may be reading any more.
        with suppress(OSError, ValueError, AttributeError):
            sys.stderr.write(f"{self.format(record)}\n")
            sys.stderr.flush()


def set_up(
    name: str, *, log_dir: Path | None, zone: tzinfo, verbosity: int, form: str, file_level: int = logging.INFO
) -> logging.Logger:
    """Make the logger of a batch or rollup.

    Args:
        name: The batch or rollup, which is also the name of its file.
        log_dir: Directory of the log files; None for no file.
        zone: Zone of the lines' times.
        verbosity: Less than 0: errors only; 0: errors; 1: also INFO; 2: also DEBUG. For standard error, not the file.
        form: text or json.
        file_level: What goes into the file; DEBUG if the stream shows it.
    """
    logger = logging.getLogger(f"batchctl.{name}")
    logger.propagate = False
    for handler in tuple(logger.handlers):
        logger.removeHandler(handler)
    formatter = (JsonLine if form == "json" else Line)(zone)
    stream = StandardError()
    stream.setLevel({1: logging.INFO}.get(verbosity, logging.DEBUG if verbosity > 1 else logging.ERROR))
    handlers: list[logging.Handler] = [stream]
    if log_dir is not None:
        file = PrivateFile(private_directory(log_dir) / f"{name}.log")
        file.setLevel(min(file_level, logging.DEBUG if verbosity > 1 else file_level))
        handlers.append(file)
    for handler in handlers:
        handler.setFormatter(formatter)
        logger.addHandler(handler)
    logger.setLevel(min(handler.level for handler in handlers))
    return logger
