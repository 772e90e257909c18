"""Reads the sales that the demo loads, and checks every line before anything is started."""

from __future__ import annotations

import csv
import gzip
import io
import os
import re
import stat
import tempfile
import zlib
from contextlib import contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple, TextIO

from batchctl.errors import ConfigurationError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SHIPPED = Path(__file__).with_name("online_retail_day.csv.gz")
COLUMNS = ("invoice", "stock_code", "quantity", "invoiced_at", "unit_price", "customer_id", "country")
LONGEST_SHOWN = 80
GZIP = b"\x1f\x8b"
WHOLE, LARGEST = re.compile(r"[+-]?[0-9]{1,10}"), 2**31 - 1
PRICE = re.compile(r"[+-]?[0-9]{1,10}(\.[0-9]{1,10})?")
VALUE_LIMIT = Decimal(10**10 - 1)
"""Of numeric(12,2)."""


class Sample(NamedTuple):
    """Checked lines in one form: comma separated, times in UTC; a temporary file that goes when it is closed."""

    file: IO[bytes]
    events: int
    first: datetime
    last: datetime


@contextmanager
def read_sample(path: Path, before: datetime) -> Iterator[Sample]:
    """Read and check a CSV file, plain or gzip.

    Args:
        path: The file.
        before: Its events have to be older, so that all their buckets are closed.

    Raises:
        UsageError: there is no such file.
        ConfigurationError: it holds something else than sales; names the line, what was found and what is allowed.
    """
    with tempfile.TemporaryFile() as file:
        try:
            sample = _copy(path, file, before)
        except UnicodeDecodeError as error:
            raise ConfigurationError(
                f"{path}: found the byte 0x{error.object[error.start]:02x}, expected UTF-8"
            ) from None
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ConfigurationError(f"{path}: the gzip file is damaged ({error})") from None
        except OSError as error:
            raise ConfigurationError(f"{path} cannot be read and copied: {error.strerror or error}") from error
        file.seek(0)
        yield sample


def _copy(path: Path, file: IO[bytes], before: datetime) -> Sample:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    events, first, last = 0, datetime.max.replace(tzinfo=UTC), datetime.min.replace(tzinfo=UTC)
    with _open(path) as lines:
        for number, row in _rows(path, lines):
            try:
                at, checked = _check(row, before)
            except ValueError as error:
                raise ConfigurationError(f"{path}: line {number}: {error}") from None
            writer.writerow(checked)
            events, first, last = events + 1, min(first, at), max(last, at)
    if not events:
        raise ConfigurationError(f"{path}: found no line below the heading, expected at least one sale")
    text.flush()
    text.detach()
    return Sample(file, events, first, last)


@contextmanager
def _open(path: Path) -> Iterator[TextIO]:
    try:
        # Non-blocking, or a named pipe that nobody writes to would be waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        problem = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"--data {path}: {problem}; expected a CSV file, plain or gzip") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UsageError(f"--data {path} is not a regular file; expected a CSV file, plain or gzip")
    with os.fdopen(descriptor, "rb") as raw:
        packed = raw.peek(len(GZIP))[: len(GZIP)] == GZIP
        with io.TextIOWrapper(gzip.GzipFile(fileobj=raw) if packed else raw, "utf-8-sig", newline="") as lines:
            yield lines


def _rows(path: Path, lines: TextIO) -> Iterator[tuple[int, dict[str, str]]]:
    reader = csv.reader(lines, strict=True)
    try:
        heading = next(reader, [])
        if missing := [column for column in COLUMNS if column not in heading]:
            raise ConfigurationError(
                f"{path}: line 1: no column {', '.join(missing)}; found {_brief(','.join(heading))}, "
                f"expected {','.join(COLUMNS)}"
            )
        for row in reader:
            if len(row) == len(heading):
                yield reader.line_num, dict(zip(heading, row, strict=True))
            elif row:
                raise ConfigurationError(
                    f"{path}: line {reader.line_num}: found {len(row)} fields, expected {len(heading)} as in line 1"
                )
    except csv.Error as error:
        raise ConfigurationError(f"{path}: line {reader.line_num}: {error}; expected comma separated text") from None


def _check(row: dict[str, str], before: datetime) -> tuple[datetime, Sequence[str]]:
    """Return the time of a sale and its line in the form that the steps read.

    Raises:
        ValueError: names the column, what was found and what is allowed.
    """
    for column in COLUMNS:
        if "\0" in row[column]:
            raise ValueError(f"{column}: found a NUL character, expected text")
    quantity, price = row["quantity"].strip(), row["unit_price"].strip()
    if not WHOLE.fullmatch(quantity) or abs(int(quantity)) > LARGEST:
        raise ValueError(f"quantity: found {_brief(quantity)}, expected a whole number such as 6 or -2")
    if not PRICE.fullmatch(price):
        raise ValueError(f"unit_price: found {_brief(price)}, expected a number such as 2.55")
    if abs(int(quantity) * Decimal(price)) >= VALUE_LIMIT:
        raise ValueError(
            f"quantity, unit_price: found {quantity} times {price}, expected a product below {VALUE_LIMIT:,}"
        )
    at = _time(row["invoiced_at"].strip())
    if at >= before:
        raise ValueError(
            f"invoiced_at: found {row['invoiced_at']}, expected a time before {before:%Y-%m-%d %H:%M} UTC, "
            "because a later hour is not over yet"
        )
    known = {"quantity": quantity, "unit_price": price, "invoiced_at": at.isoformat(sep=" ")}
    return at, [known.get(column, row[column]) for column in COLUMNS]


def _time(text: str) -> datetime:
    try:
        found = datetime.fromisoformat(text)
        return found.astimezone(UTC) if found.tzinfo else found.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise ValueError(
            f"invoiced_at: found {_brief(text)}, expected a time such as 2010-12-01 08:26:00+00 (UTC without an offset)"
        ) from None


def _brief(text: str) -> str:
    return repr(text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}...")
