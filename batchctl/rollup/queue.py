"""The queue of dirty buckets of a grain: filled, handed out in ranges, settled."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from batchctl.errors import ConfigurationError
from batchctl.rollup import compose
from batchctl.rollup.look import look_at
from batchctl.state.database import sql

if TYPE_CHECKING:
    from datetime import datetime
    from logging import Logger

    from batchctl.rollup.definition import Definition
    from batchctl.rollup.work import Work
    from batchctl.state.database import Session


ROWS_FOR_A_JUMP = 50
"""So many rows are read in the time of one jump in an index."""
UNLIMITED = "0"
"""How long a statement may take that reads a source as far as it goes."""


class Range(NamedTuple):
    """Closed buckets in the queue: the first and the last, as seconds since 1970, and how many there are."""

    low: int
    high: int
    buckets: int


def queue_history(work: Work) -> None:
    """Note what was there before the triggers; in one transaction with the flag, so that it happens once."""
    finest = replace(work, grain=work.definition.finest)
    with work.session.transaction():
        finest.steady(UNLIMITED)
        if finest.run("claim_history"):
            if _is_dense(finest):
                found = compose.next_bucket(work.session, finest.grain, compose.quoted("found", "bucket"))
                finest.execute(finest.reading("queue_dense_history", next_found=found))
            else:
                finest.compute("queue_history")


def look_back(work: Work) -> bool | None:
    """Queue the closed buckets since the last tick, and `lookback` before them.

    Returns:
        True if there are any, None if the job is held elsewhere.
    """
    seconds = compose.text(f"{work.definition.lookback_seconds} seconds")
    since = sql.SQL("{} - interval {}").format(work.session.statement("rollup.looked_until"), seconds)
    statement = work.reading("look_back", first=compose.bucket_of(work.session, work.grain, since))
    with work.session.transaction():
        if not work.hold():
            return None
        work.steady(UNLIMITED)
        return bool(work.execute(statement)[0].buckets)


def _is_dense(work: Work) -> bool:
    """Tell whether jumping from bucket to bucket is quicker than reading every row."""
    if not is_indexed(work):
        return False
    size = work.compute("history_size", seconds=work.grain.seconds, oid=_source_oid(work))[0]
    return bool(size.rows > ROWS_FOR_A_JUMP * size.tables * size.buckets)


def _source_oid(work: Work) -> int:
    oid: int = work.session.fetch_one("rollup.find_table", table=compose.spelled(*work.places.source)).oid
    return oid


def is_indexed(work: Work) -> bool:
    """Tell whether the source has an index that begins with the time."""
    columns = work.session.fetch("rollup.table_columns", oid=_source_oid(work))
    return any(column.indexed for column in columns if column.name == work.definition.time)


def rebuild(
    session: Session, definition: Definition, grain: str, start: datetime, end: datetime, *, log: Logger | None = None
) -> int:
    """Queue every bucket of a grain that overlaps [start, end) and exists in its table or in what that is built from.

    Args:
        session: An open session.
        definition: The rollup.
        grain: Name of the grain.
        start: Aware; the bucket that holds it is the first.
        end: Aware; the bucket that holds the instant before it is the last.
        log: Takes the line that says what is left out, because its source rows may be gone.

    Returns:
        The number of buckets queued, none if the job is paused; the next tick computes those that are closed.

    Raises:
        ConfigurationError: the rollup is not migrated, or has changed since.
    """
    look, work = look_at(session, definition, definition.grain(grain))
    if look.paused:
        return 0
    if log and definition.retention_seconds:
        floor = work.run("floor")[0]
        if start.timestamp() < floor.second:
            log.warning(
                "%s: source_retention keeps buckets before %s as they are, also where --rebuild asks for them",
                *(grain, floor.shown),
            )
    return _queue_range(work, start, end)


def _queue_range(work: Work, start: datetime, end: datetime) -> int:
    """Note every bucket of [start, end) that exists in the table or in what that is built from, and count them."""
    first = compose.bucket_of(work.session, work.grain, sql.SQL("%(start)s"))
    last = compose.bucket_of(work.session, work.grain, sql.SQL("%(end)s - interval '1 microsecond'"))
    last = compose.next_bucket(work.session, work.grain, last)
    statement = work.reading("queue_range", first=first, last=last)
    with work.session.transaction():
        work.steady(UNLIMITED)
        if not work.run("keep_definition", definition=work.described):
            raise ConfigurationError(f"rollup.{work.definition.name} has changed meanwhile; run this again")
        rows = work.execute(statement, start=start, end=end)
    buckets: int = rows[0].buckets
    return buckets


def pick(work: Work, limit: int, below: int | None) -> Range | None:
    """Return the newest closed buckets, None if there are none.

    Args:
        work: The grain.
        limit: How many.
        below: A bucket that is left out with all that are newer, None for none.
    """
    found = work.run("pick", limit=limit, below=below)[0]
    return Range(found.low, found.high, found.buckets) if found.buckets else None


def settle(work: Work, outcome: str, until: float | None) -> int:
    """Record the end of a tick and return how many closed buckets are left in the queue.

    Args:
        work: The grain.
        outcome: How it ended.
        until: How far it has looked, as seconds since 1970; None for no further than before.
    """
    with work.session.transaction():
        # In two statements, so that the second sees what was done to the queue before the lock was free.
        if work.hold():
            remaining: int = work.run("settle", outcome=outcome, until=until)[0].remaining
            return remaining
        work.run("end", outcome=outcome)
    return waiting(work)


def waiting(work: Work) -> int:
    """Count the closed buckets that wait, in the queue or as notes."""
    with work.session.transaction():
        # However long the role's statements may take: a count is no reason to fail.
        work.steady(UNLIMITED)
        buckets: int = work.run("remaining")[0].buckets
    return buckets
