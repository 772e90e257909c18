"""One chunk of dirty buckets of a grain: one transaction."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from batchctl.errors import BatchctlError, DatabaseUnavailableError
from batchctl.rollup.bucket import Bucket
from batchctl.state.database import sql

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from datetime import datetime
    from logging import Logger

    from batchctl.clock import Clock
    from batchctl.rollup.queue import Range
    from batchctl.rollup.work import Work

TIMED_OUT = "57014"
"""SQLSTATE of a statement that was ended by its timeout, or by an administrator."""


@dataclass(frozen=True)
class Chunk:
    """What one transaction did, or failed to do."""

    buckets: tuple[tuple[int, str], ...]
    """The buckets taken, in order: seconds since 1970, and as they are shown."""
    source_rows: int = 0
    events: int = 0
    rows_written: int = 0
    rows_deleted: int = 0
    duration_seconds: float = 0.0
    failure: str | None = None
    """Why the transaction was undone: something in the rows of at least one of the buckets."""


def refresh_chunk(work: Work, span: Range, clock: Clock, log: Logger, *, hold: str = "hold") -> Chunk | None:
    """Recompute the buckets of a range in a transaction; None if the job is held elsewhere.

    Args:
        work: The grain.
        span: The range.
        clock: Measures the duration.
        log: Takes the lines.
        hold: How the job is locked: `join_holder` for a session that works for the holder.
    """
    attempt = Attempt(work, clock, log)
    try:
        with work.session.transaction():
            if not work.hold(hold):
                return None
            attempt.take(span)
    except BatchctlError as error:
        return attempt.failed(error)
    return attempt.succeeded()


class Attempt:
    """One attempt to recompute buckets, in a transaction that holds the job.

    First is seen what waits, then the source is read, in two statements: the second sees at least what the first saw.
    A writer that commits in between leaves a note, which the first did not see; its bucket is computed again.

    Args:
        work: The grain.
        clock: Measures the duration.
        log: Takes the lines.
    """

    def __init__(self, work: Work, clock: Clock, log: Logger) -> None:
        self._work, self._clock, self._log = work, clock, log
        self._at, self._begun = clock.now(), clock.monotonic()
        self._chunk = Chunk(())

    def take(self, span: Range) -> None:
        """Take the buckets of a range out of the queue and replace them."""
        work = self._work
        statement = work.reading("take", occupied=work.occupied(sql.SQL("%(low)s"), sql.SQL("%(high)s")))
        taken = work.execute(statement, low=span.low, high=span.high, definition=work.described)
        if taken:
            self.compute([Bucket(row.start, row.end, row.shown) for row in taken], occupied=taken[0].occupied)

    def compute(self, taken: Sequence[Bucket], *, occupied: bool) -> None:
        """Replace buckets that have left the queue, or leave it in the same transaction.

        Args:
            taken: The buckets, in order.
            occupied: True if the table holds rows between the first of them and the last.
        """
        self._chunk = Chunk(tuple((bucket.start, bucket.shown) for bucket in taken))
        done = _compute(self._work, taken, occupied=occupied)
        if self._work.follows:
            from batchctl.rollup.partitions import witness  # noqa: PLC0415 - most sources have none

            witness(self._work)
        keys = ("source_rows", "events", "rows_written", "rows_deleted")
        # A sum over nothing is nothing, and PostgreSQL's sums are of a larger type than what they add up.
        counts: dict[str, Any] = {key: int(getattr(done, key) or 0) for key in keys}
        self._chunk = replace(self._chunk, duration_seconds=since(self._begun, self._clock), **counts)

    def succeeded(self) -> Chunk:
        """Log what was committed, and return it."""
        if self._chunk.buckets:
            _log_chunk(self._log, self._work.grain.name, self._chunk, self._at)
        return self._chunk

    def failed(self, error: BatchctlError) -> Chunk:
        """Return what failed, if that lies in the rows of the buckets; raise the error again if not."""
        if not self._chunk.buckets or not _lies_in_the_rows(error):
            raise error
        return Chunk(self._chunk.buckets, failure=" ".join(str(error).split()))


def since(begun: float, clock: Clock) -> float:
    """Return the seconds since an instant of the monotonic clock."""
    return round(clock.monotonic() - begun, 3)


def _compute(work: Work, taken: Sequence[Bucket], *, occupied: bool) -> Any:
    from batchctl.rollup import recompute  # noqa: PLC0415 - an idle tick computes nothing

    ranges = _ranges(taken)
    statement = (recompute.replacement if occupied else recompute.filling)(work, ranges=len(ranges), buckets=len(taken))
    limits = (
        {"lows": [low for low, _ in ranges], "highs": [high for _, high in ranges]}
        if len(ranges) > 1
        else {"low": ranges[0][0], "high": ranges[0][1]}
    )
    return work.execute(statement, **limits, buckets=[bucket.start for bucket in taken])[0]


def _lies_in_the_rows(error: BatchctlError) -> bool:
    """Tell an error that other buckets need not have from one that every statement will meet."""
    state = getattr(error.__cause__, "sqlstate", None)
    # Class 42: a table or column is gone, a right is missing. A statement that takes too long may lie in one bucket.
    return state == TIMED_OUT or (
        state is not None and state[:2] != "42" and not isinstance(error, DatabaseUnavailableError)
    )


def _log_chunk(log: Logger, grain: str, chunk: Chunk, at: datetime) -> None:
    # The counts are known only now; the line carries the time at which it became true.
    extra = {"at": at}
    if len(chunk.buckets) == 1:
        log.info(
            "Starting %s aggregation for bucket: %s (%d events)", grain, chunk.buckets[0][1], chunk.events, extra=extra
        )
    else:
        log.info(
            "Starting %s aggregation for %d buckets: %s .. %s (%d events)",
            *(grain, len(chunk.buckets), chunk.buckets[0][1], chunk.buckets[-1][1], chunk.events),
            extra=extra,
        )
    log.info("%s aggregation completed: %d rows in %.2fs", grain, chunk.rows_written, chunk.duration_seconds)


def _ranges(taken: Iterable[Bucket]) -> list[tuple[int, int]]:
    """Join neighbouring buckets, given in order, to half-open ranges."""
    ranges: list[tuple[int, int]] = []
    for bucket in taken:
        if ranges and ranges[-1][1] == bucket.start:
            ranges[-1] = (ranges[-1][0], bucket.end)
        else:
            ranges.append((bucket.start, bucket.end))
    return ranges
