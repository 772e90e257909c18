"""What triggers and finer grains noted: computed at once where it is little, sorted into the queue where it is much."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from batchctl.rollup import compose
from batchctl.rollup.queue import UNLIMITED, Bucket, is_indexed, shown
from batchctl.state.database import sql

if TYPE_CHECKING:
    from batchctl.rollup.look import Look
    from batchctl.rollup.work import Work

NOTHING = sql.SQL("")
TRUE = sql.SQL("true")
EARLIEST = datetime.min.replace(tzinfo=UTC).timestamp()
"""The first second that can be shown without the help of PostgreSQL, which knows earlier ones."""


class Few(NamedTuple):
    """Buckets that are waiting, where they are few; what was noted of them is still there."""

    closed: tuple[Bucket, ...]
    """Those to be computed, in order."""
    later: tuple[int, ...]
    """Those whose time has not come: their starts, in order, as seconds since 1970."""
    queued: bool
    """True if closed ones among them are in the queue."""
    occupied: bool
    """True if the table holds anything between the first and the last that is closed."""
    snapshot: str
    """In which the notes were seen."""


class Late(NamedTuple):
    """Buckets of which the source holds rows but may have lost others: how many, and the first and last as shown."""

    buckets: int = 0
    first: str = ""
    last: str = ""


def read_few(work: Work, look: Look, held: Any, most: int) -> Few | None:
    """Read which buckets wait, in the transaction that holds the job; None if they have to be sorted in.

    Args:
        work: The grain.
        look: What the tick saw at its beginning.
        held: The row of the job, as `Work.hold` returns it.
        most: So many are few.
    """
    # By tables that were exchanged since it began, a tick would compute the old measures.
    if look.notes_seen is None or look.notes_seen != held.notes_seen:
        return None
    grain = work.grain
    queued = held.queued_from is not None and held.queued_from < look.open
    statement = work.reading(
        "few",
        overtaken=work.statement("overtaken") if look.before.late else NOTHING,
        waiting=work.statement("waiting") if queued else NOTHING,
        kept=sql.SQL("bucket >= {}").format(compose.floor(work.definition, grain)) if _has_floor(work) else TRUE,
        end=compose.end_of(work.session, grain, sql.SQL("bucket")),
    )
    values = {**work.parameters, **look.before.parameters(), "open": look.open, "most": most}
    rows = work.session.run(statement, values)
    # Marks that stand for every bucket, and what is not computed anew, can only be sorted in.
    if len(rows) > most or not all(row.kept and row.start >= EARLIEST for row in rows):
        return None
    closed = tuple(Bucket(int(row.start), int(row.end), shown(row.start)) for row in rows if row.closed)
    if not closed:
        return None
    later = tuple(int(row.start) for row in rows if not row.closed)
    return Few(closed, later, queued, any(row.occupied for row in rows), rows[0].snapshot)


def finish(work: Work, look: Look, few: Few) -> None:
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
        **work.parameters,
        **look.before.parameters(),
        "snapshot": few.snapshot,
        "started": look.started,
        "until": look.until,
        "closed": [bucket.start for bucket in few.closed],
        "open": look.open,
        "later": list(few.later),
        "first_later": min(few.later, default=None),
    }
    work.session.run(statement, values)


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
    values = {**work.parameters, **look.before.parameters(), "started": look.started}
    found = work.session.run(statement, values)[0]
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
