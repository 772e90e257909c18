"""One chunk of dirty buckets of a grain: one transaction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from batchctl.errors import BatchctlError, DatabaseUnavailableError
from batchctl.rollup import compose

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime
    from logging import Logger

    from batchctl.clock import Clock
    from batchctl.rollup.definition import Definition, Grain, Places
    from batchctl.state.database import Session, sql


@dataclass(frozen=True)
class Chunk:
    """What one transaction did, or failed to do."""

    buckets: tuple[tuple[int, str], ...]
    """The buckets taken, in order: seconds since 1970, and as they are shown."""
    source_rows: int = 0
    events: int = 0
    rows_written: int = 0
    rows_deleted: int = 0
    failure: str | None = None
    """Why the transaction was undone: something in the rows of at least one of the buckets."""


@dataclass(frozen=True)
class Work:
    """One grain of one rollup in one database."""

    session: Session
    definition: Definition
    grain: Grain
    places: Places

    @property
    def target(self) -> sql.SQL:
        """Name the table of the grain."""
        return compose.quoted(*self.places.targets[self.grain.name])

    @property
    def parameters(self) -> dict[str, Any]:
        """Return the values that the statements share."""
        return parameters(self.definition, self.grain)

    def run(self, name: str, **more: Any) -> list[Any]:
        """Execute a statement by its name."""
        return self.session.run(self.session.statement(f"rollup.{name}"), {**self.parameters, **more})


def parameters(definition: Definition, grain: Grain) -> dict[str, Any]:
    """Return the values that the statements about a grain share."""
    parent = definition.coarser(grain.name)
    return {
        "rollup": definition.name,
        "grain": grain.name,
        "job": definition.job(grain.name),
        "seconds": grain.seconds,
        # Compared with the database's clock, by which its events are judged; ours never matters.
        "closed_after": grain.seconds + definition.settle_seconds,
        "parent": parent.name if parent else None,
        "parent_seconds": parent.seconds if parent else None,
    }


def refresh_chunk(work: Work, limit: int, below: int | None, clock: Clock, log: Logger) -> Chunk | None:
    """Recompute the newest closed dirty buckets; None if the job is held elsewhere.

    Args:
        work: The grain.
        limit: How many buckets.
        below: A bucket that is left queued with all that are newer, None for none.
        clock: Measures the duration.
        log: Takes the lines.
    """
    at, begun = clock.now(), clock.monotonic()
    buckets: tuple[tuple[int, str], ...] = ()
    try:
        with work.session.transaction():
            work.run("steady")
            if not work.run("hold"):
                return None
            # First the queue, then the source, in two statements: the second sees at least what the first saw. A writer
            # that commits in between leaves its queue row, which the first did not see; its bucket is computed again.
            buckets = tuple((row.second, row.shown) for row in work.run("take", chunk_buckets=limit, below=below))
            if not buckets:
                return Chunk(())
            done = _replace(work, [second for second, _ in buckets])
    except BatchctlError as error:
        if not buckets or not _lies_in_the_rows(error):
            raise
        return Chunk(buckets, failure=" ".join(str(error).split()))
    chunk = Chunk(buckets, done.source_rows, done.events, done.rows_written, done.rows_deleted)
    _log_chunk(log, work.grain.name, chunk, at, since(begun, clock))
    return chunk


def since(begun: float, clock: Clock) -> float:
    """Return the seconds since an instant of the monotonic clock."""
    return round(clock.monotonic() - begun, 3)


def _replace(work: Work, seconds: list[int]) -> Any:
    ranges = _ranges(seconds, work.grain.seconds)
    statement = compose.refresh(work.session, work.definition, work.grain, work.places, apart=len(ranges) > 1)
    limits = (
        {"lows": [low for low, _ in ranges], "highs": [high for _, high in ranges]}
        if len(ranges) > 1
        else {"low": ranges[0][0], "high": ranges[0][1]}
    )
    return work.session.run(statement, {**work.parameters, **limits, "buckets": seconds})[0]


def _lies_in_the_rows(error: BatchctlError) -> bool:
    """Tell an error that other buckets need not have from one that every statement will meet."""
    state = getattr(error.__cause__, "sqlstate", None)
    # Class 42: a table or column is gone, a right is missing.
    return state is not None and state[:2] != "42" and not isinstance(error, DatabaseUnavailableError)


def _log_chunk(log: Logger, grain: str, chunk: Chunk, at: datetime, duration: float) -> None:
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
    log.info("%s aggregation completed: %d rows in %.2fs", grain, chunk.rows_written, duration)


def _ranges(seconds: Sequence[int], width: int) -> list[tuple[int, int]]:
    """Join neighbouring buckets, given in order, to half-open ranges."""
    ranges: list[tuple[int, int]] = []
    for second in seconds:
        if ranges and ranges[-1][1] == second:
            ranges[-1] = (ranges[-1][0], second + width)
        else:
            ranges.append((second, second + width))
    return ranges
