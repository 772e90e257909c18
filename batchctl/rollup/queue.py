"""The queue of dirty buckets of a grain: looked at, filled, sorted, handed out in ranges."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from batchctl.errors import ConfigurationError
from batchctl.rollup import compose
from batchctl.rollup.definition import Places, differences, is_switch, next_name
from batchctl.rollup.work import Work, parameters
from batchctl.state.database import sql

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from batchctl.rollup.definition import Definition, Grain
    from batchctl.state.database import Session


ROWS_FOR_A_JUMP = 50
"""So many rows are read in the time of one jump in an index."""
UNLIMITED = "0"
"""How long a statement may take that reads a source as far as it goes."""


class Late(NamedTuple):
    """Buckets of which the source holds rows but may have lost others: how many, and the first and last as shown."""

    buckets: int = 0
    first: str = ""
    last: str = ""


class Range(NamedTuple):
    """Closed buckets in the queue: the first and the last, as seconds since 1970, and how many there are."""

    low: int
    high: int
    buckets: int


class Seen(NamedTuple):
    """Which notes a tick has seen before: those of transactions before `unseen_from` that are not `late`."""

    unseen_from: int
    """The first transaction that had not ended and was not in progress either."""
    late: tuple[int, ...]
    """Those before it that were in progress."""

    @classmethod
    def read(cls, remembered: Any, look: Any) -> Seen:
        """Read what a tick remembered, as PostgreSQL writes a snapshot.

        Where transactions are numbered otherwise, in a restored dump for instance, nothing has been seen.

        Args:
            remembered: Has `notes_seen` and `notes_seen_in`.
            look: Says in which cluster and database this is (`here`) and which transaction would be the next.
        """
        if remembered.notes_seen is None or remembered.notes_seen_in != look.here:
            return NOTHING_SEEN
        _, unseen_from, late = remembered.notes_seen.split(":")
        if int(unseen_from) > int(look.next):
            return NOTHING_SEEN
        return cls(int(unseen_from), tuple(map(int, late.split(","))) if late else ())

    def parameters(self) -> dict[str, Any]:
        """Return the values as the statements take them."""
        return {"unseen_from": str(self.unseen_from), "late": list(map(str, self.late))}


NOTHING_SEEN = Seen(0, ())


class Sorted(NamedTuple):
    """What became of notes."""

    waiting: Range | None
    """All closed buckets that wait, None if that is not known without looking."""
    late: Late
    """Changes of buckets that are never computed anew."""


class Look(NamedTuple):
    """What a tick sees before it does anything."""

    started: float
    """By the database's clock, as seconds since 1970."""
    known: bool
    paused: tuple[str, ...]
    """What is paused of the rollup and the job."""
    history_queued: bool
    partitioned: bool
    """True if the source's partitions are followed."""
    dirty: bool
    """True if closed buckets wait."""
    seen: str | None
    """The snapshot that shows no note that is not sorted in, None if it may show some."""
    here: str
    """The cluster and the database."""
    next: str
    """The transaction that would come next."""
    until: float | None
    """How far it looks, as seconds since 1970."""
    newest: float
    """The newest closed bucket, as seconds since 1970."""


def look(session: Session, definition: Definition, grain: Grain) -> tuple[Look, Work]:
    """Return all that an idle tick needs to know, and the work.

    Raises:
        ConfigurationError: the rollup is not migrated, or has changed since.
    """
    finer = definition.finer(grain.name)
    rows = session.run(
        session.statement("rollup.look"),
        {**parameters(definition, grain), "finer": definition.job(finer.name) if finer else None},
    )
    if not rows:
        raise ConfigurationError(f"rollup.{definition.name} has no tables yet; run `batchctl migrate`")
    work = Work(session, definition, grain, _places(session, definition, rows[0].definition))
    return _look(work, rows[0]), work


def _places(session: Session, definition: Definition, registered: Mapping[str, Any]) -> Places:
    """Check that the rollup is as it was migrated."""
    before, now = dict(registered), definition.as_json()
    places = before.pop("places")
    if "dropping" in before:
        raise ConfigurationError(
            f"rollup.{definition.name} is being dropped; run `batchctl migrate --drop {definition.name}` again"
        )
    if before.pop("unfinished", False):
        raise ConfigurationError(f"rollup.{definition.name} is not complete yet; run `batchctl migrate` again")
    if before != now:
        raise ConfigurationError(
            f"rollup.{definition.name} has changed since it was migrated ({'; '.join(differences(before, now))}); "
            f"{_advice(session, definition.name, switched=is_switch(before, now))}"
        )
    return Places.from_json(places)


def _horizon(work: Work, row: Any) -> tuple[float, float | None, float]:
    """Return the bucket that is open, how far the tick looks, and the newest closed bucket, as seconds since 1970.

    A coarser grain sees what the finer one wrote, so it looks no further than that has looked; None if it has not yet.
    """
    finest = work.definition.finer(work.grain.name) is None
    if work.grain.zone:
        instant = compose.open_bucket(work.session, work.definition, work.grain)
        statement = work.session.statement(
            "rollup.local_horizon",
            open=instant,
            of_finer=compose.bucket_of(work.session, work.grain, sql.SQL("to_timestamp(%(finer_until)s)")),
            last=compose.bucket_of(work.session, work.grain, sql.SQL("{} - interval '1 microsecond'").format(instant)),
        )
        found = work.session.run(statement, {"finer_until": row.finer_until})[0]
        return found.open, None if row.finer_until is None else found.until, found.last
    width = work.grain.seconds
    now = (row.started - work.definition.settle_seconds) // width * width
    if finest:
        return now, now, now - width
    return now, None if row.finer_until is None else min(now, row.finer_until // width * width), now - width


def _look(work: Work, row: Any) -> Look:
    seen = Seen.read(row, row)
    now, until, newest = _horizon(work, row)
    unseen = work.run("unseen", **seen.parameters())[0]
    noted, closed = unseen.noted, unseen.closed
    if seen.late and not closed:
        late = work.run("unseen_late", **seen.parameters())[0]
        noted, closed = noted or late.noted, late.closed
    paused = (*([work.definition.name] if row.rollup_paused else []), *([work.job] if row.paused else []))
    return Look(
        started=row.started,
        known=row.known,
        paused=paused,
        history_queued=row.history_queued,
        partitioned=row.partitioned,
        dirty=closed or (row.queued_from is not None and row.queued_from < now),
        seen=None if noted else unseen.snapshot,
        here=row.here,
        next=row.next,
        until=until,
        newest=newest,
    )


def _advice(session: Session, name: str, *, switched: bool) -> str:
    if switched:
        return "run `batchctl migrate`, which takes `lookback` in or out"
    if any(row.rollup == next_name(name) for row in session.fetch("rollup.registered")):
        return "`batchctl migrate` builds its new tables; run it again if it was interrupted"
    return "run `batchctl migrate`, which builds its new tables"


def queue_history(work: Work) -> None:
    """Note what was there before the triggers; in one transaction with the flag, so that it happens once."""
    finest = Work(work.session, work.definition, work.definition.finest, work.places)
    with work.session.transaction():
        finest.steady(UNLIMITED)
        if finest.run("claim_history"):
            finest.compute("queue_dense_history" if _is_dense(finest) else "queue_history")


def look_back(work: Work) -> bool:
    """Queue the closed buckets since the last tick, and `lookback` before them; False if there are none.

    True as well if the job is held elsewhere, which is for the refresh to find.
    """
    seconds = compose.text(f"{work.definition.lookback_seconds} seconds")
    since = sql.SQL("{} - interval {}").format(work.session.statement("rollup.looked_until"), seconds)
    source, time = compose.built_from(work.definition, work.grain, work.places)
    statement = work.session.statement(
        "rollup.look_back",
        first=compose.bucket_of(work.session, work.grain, since),
        open=compose.open_bucket(work.session, work.definition, work.grain),
        source=source,
        time=time,
        bucket=compose.bucket_of(work.session, work.grain, time),
        target=work.target,
        floor=compose.floor(work.definition, work.grain),
    )
    with work.session.transaction():
        if not work.hold():
            return True
        work.steady(UNLIMITED)
        return bool(work.session.run(statement, work.parameters)[0].buckets)


def _is_dense(work: Work) -> bool:
    """Tell whether jumping from bucket to bucket is quicker than reading every row."""
    oid = _source_oid(work)
    if not _is_indexed(work, oid):
        return False
    size = work.compute("history_size", seconds=work.grain.seconds, oid=oid)[0]
    return bool(size.rows > ROWS_FOR_A_JUMP * size.tables * size.buckets)


def _source_oid(work: Work) -> int:
    oid: int = work.session.fetch_one("rollup.find_table", table=compose.quoted(*work.places.source).as_string()).oid
    return oid


def _is_indexed(work: Work, oid: int) -> bool:
    columns = work.session.fetch("rollup.table_columns", oid=oid)
    return any(column.indexed for column in columns if column.name == work.definition.time)


def queue_range(work: Work, start: datetime, end: datetime) -> int:
    """Note every bucket of [start, end) that exists in the table or in what that is built from, and count them."""
    first = compose.bucket_of(work.session, work.grain, sql.SQL("%(start)s"))
    last = compose.bucket_of(work.session, work.grain, sql.SQL("%(end)s - interval '1 microsecond'"))
    source, time = compose.built_from(work.definition, work.grain, work.places)
    statement = work.session.statement(
        "rollup.queue_range",
        first=first,
        last=compose.next_bucket(work.session, work.grain, last),
        source=source,
        time=time,
        bucket=compose.bucket_of(work.session, work.grain, time),
        target=work.target,
        floor=compose.floor(work.definition, work.grain),
    )
    with work.session.transaction():
        work.steady(UNLIMITED)
        if not work.run("keep_definition", definition=work.described):
            raise ConfigurationError(f"rollup.{work.definition.name} has changed meanwhile; run this again")
        rows = work.session.run(statement, {**work.parameters, "start": start, "end": end})
    buckets: int = rows[0].buckets
    return buckets


def sort_in(work: Work, held: Any, look: Look) -> Sorted:
    """Turn the notes that were not seen before into entries of the queue, in the transaction that holds the job.

    Notes of buckets below the rollup's `source_retention` are dropped. Those of which the source still holds rows, so
    that something other than a purge changed them, are counted.

    Args:
        work: The grain.
        held: The row of the job, as `Work.hold` returns it.
        look: What the tick saw.

    Returns:
        What waits, as far as that is known without looking, and what was too late.
    """
    seen = Seen.read(held, look)
    found = work.run("sort_in", started=look.started, here=look.here, **seen.parameters())[0]
    # In this order for the reason given in refresh_chunk.
    if found.marked:
        work.compute("queue_target")
    late = _count_late(work, found.too_old) if found.too_old else Late()
    if found.marked or held.queued or not found.closed:
        return Sorted(None, late)
    return Sorted(Range(found.low, found.high, found.closed), late)


def _count_late(work: Work, too_old: list[int]) -> Late:
    work.steady(UNLIMITED)
    how = "late_by_index" if _is_indexed(work, _source_oid(work)) else "late_by_scan"
    late = Late(*work.compute(how, buckets=too_old)[0])
    if late.buckets:
        work.run("count_ignored", buckets=late.buckets)
    return late


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
            return settle_held(work, outcome, until)
        work.run("end_unheld", outcome=outcome)
    return waiting(work)


def settle_held(work: Work, outcome: str, until: float | None) -> int:
    """Do the same in the transaction that holds the job."""
    remaining: int = work.run("settle", outcome=outcome, until=until)[0].remaining
    return remaining


def waiting(work: Work) -> int:
    """Count the closed buckets that wait, in the queue or as notes."""
    buckets: int = work.run("remaining")[0].buckets
    return buckets
