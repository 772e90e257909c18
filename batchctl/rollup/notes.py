"""What becomes of notes: little is done with once its buckets are computed, much is sorted into the queue."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from batchctl.rollup import compose
from batchctl.rollup.queue import UNLIMITED, is_indexed
from batchctl.state.database import sql

if TYPE_CHECKING:
    from batchctl.rollup.look import Look, Waiting
    from batchctl.rollup.work import Work

NOTHING = sql.SQL("")


class Held(NamedTuple):
    """What is known of a job once it is held."""

    unchanged: bool
    """True if no note that the look saw was done with since, and no other tables are in place, which would need other
    measures."""
    occupied: bool
    """True if the table may hold anything of the buckets that wait."""


class Late(NamedTuple):
    """Buckets of which the source holds rows but may have lost others: how many, and the first and last as shown."""

    buckets: int = 0
    first: str = ""
    last: str = ""


def hold(work: Work, look: Look, few: Waiting) -> Held | None:
    """Lock the job until the end of the transaction, to do with little at once; None if it is held elsewhere."""
    low, high = (sql.Literal(bucket.start) for bucket in (few.closed[0], few.closed[-1]))
    # Another tick may have computed since the look what was in the queue then.
    held = work.hold("hold_for_few", occupied=sql.SQL("true") if few.queued else work.occupied(low, high))
    if held is None:
        return None
    return Held(look.notes_seen is not None and look.notes_seen == held.notes_seen, held.occupied)


def finish(work: Work, look: Look, few: Waiting) -> None:
    """Record the end of a tick that has computed what was closed, in the same transaction.

    The notes that were seen are gone then, and buckets that are still open have come into the queue.
    """
    queued_from = work.statement("staying") if few.queued else sql.SQL("queued_from")
    if few.later:
        queued_from = sql.SQL("least({}, to_timestamp(%(first_later)s))").format(queued_from)
    statement = work.statement(
        "finish",
        seen_late=work.statement("seen_late") if look.before.late else NOTHING,
        leaving=work.statement("leaving") if few.queued else NOTHING,
        coming=work.statement("coming") if few.later else NOTHING,
        queued_from=queued_from,
    )
    values = {
        **look.before.parameters(),
        "snapshot": few.snapshot,
        "started": look.started,
        "until": look.until,
        "closed": [bucket.start for bucket in few.closed],
        "later": list(few.later),
        "first_later": min(few.later, default=None),
    }
    work.execute(statement, **values)


def sort_in(work: Work, look: Look) -> Late:
    """Turn the notes that were not seen before into entries of the queue, in the transaction that holds the job.

    Notes of buckets below the rollup's `source_retention` are dropped. Those of which the source still holds rows, so
    that something other than a purge changed them, are counted.

    Returns:
        What was too late.
    """
    statement = work.statement(
        "sort_in",
        expired=work.statement("expired") if _has_floor(work) else NOTHING,
        too_old=work.statement("too_old") if _has_floor(work) else sql.SQL("NULL::bigint[]"),
    )
    found = work.execute(statement, **look.before.parameters(), started=look.started)[0]
    # In this order for the reason given in Attempt.
    if found.marked:
        work.compute("queue_target")
    return _count_late(work, found.too_old) if found.too_old else Late()


def _has_floor(work: Work) -> bool:
    return compose.has_floor(work.definition, work.grain)


def _count_late(work: Work, too_old: list[int]) -> Late:
    work.steady(UNLIMITED)
    how = "late_by_index" if is_indexed(work) else "late_by_scan"
    late = Late(*work.compute(how, buckets=too_old)[0])
    if late.buckets:
        work.run("count_ignored", buckets=late.buckets)
    return late
