"""What a tick sees before it does anything: the rollup as it was migrated, and which notes and buckets wait."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from batchctl.errors import ConfigurationError
from batchctl.rollup import compose
from batchctl.rollup.bucket import EARLIEST, Bucket, shown
from batchctl.rollup.definition import Places, differences, is_switch, next_name
from batchctl.rollup.work import Work
from batchctl.state.database import sql
from batchctl.state.driver_errors import MissingObjectError
from batchctl.state.migrate import WrongSchemaError, require_schema
from batchctl.state.sql import LATEST_VERSION

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from batchctl.rollup.definition import Definition, Grain
    from batchctl.state.database import Session

FEW_BUCKETS = 240
"""Four hours of minutes: so many are computed at once, whatever the source."""
FEW_NOTES = 50_000
"""So many are read to find out which buckets they name; a tick that has to sort them in has read them for nothing."""


class Seen(NamedTuple):
    """Which notes a tick has seen before: those of transactions before `unseen_from` that are not `late`."""

    unseen_from: int = 0
    """The first transaction that had not ended and was not in progress either."""
    late: tuple[int, ...] = ()
    """Those before it that were in progress."""

    @classmethod
    def read(cls, snapshot: str) -> Seen:
        """Read a snapshot as PostgreSQL writes it."""
        _, unseen_from, late = snapshot.split(":")
        return cls(int(unseen_from), tuple(map(int, late.split(","))) if late else ())

    def parameters(self) -> dict[str, Any]:
        """Return the values as the statements take them."""
        return {"unseen_from": str(self.unseen_from), "late": list(map(str, self.late))}


class Waiting(NamedTuple):
    """What is noted and waits, where it is little; notes are still there."""

    closed: tuple[Bucket, ...]
    """Those to be computed, in order."""
    later: tuple[int, ...]
    """Those whose time has not come: their starts, in order, as seconds since 1970."""
    queued: bool
    """True if closed ones are in the queue."""
    snapshot: str
    """In which the notes were seen."""


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
    before: Seen
    """What was seen by the last tick that was done with notes, or by one before it."""
    notes_seen: str | None
    """The same, as the job has it; None if there is none, or if it means nothing here. It changes when a tick is done
    with notes, and when new tables are put in place."""
    dirty: bool
    """True if closed buckets wait, or so much that it was not counted."""
    few: Waiting | None
    """What waits, None if it can only be sorted into the queue, or if no bucket is closed."""
    seen: str | None
    """The snapshot that shows no note that is not sorted in, None if it may show some."""
    until: float | None
    """How far it looks, as seconds since 1970."""
    newest: float
    """The newest closed bucket, as seconds since 1970."""


def look_at(session: Session, definition: Definition, grain: Grain) -> tuple[Look, Work]:
    """Return all that an idle tick needs to know, and the work.

    Raises:
        WrongSchemaError: the schema is older or newer than this program.
        ConfigurationError: the rollup is not migrated, or has changed since.
    """
    try:
        return _look_at(session, definition, grain)
    except (MissingObjectError, WrongSchemaError):
        # Either this makes the schema, or it says what is wrong.
        require_schema(session)
    return _look_at(session, definition, grain)


def _look_at(session: Session, definition: Definition, grain: Grain) -> tuple[Look, Work]:
    job, finer = definition.job(grain.name), definition.finer(grain.name)
    finer_until = session.statement("rollup.finer_until") if finer else sql.SQL("NULL")
    values = {"rollup": definition.name, "job": job, "finer": definition.job(finer.name) if finer else None}
    with session.bounded():
        row = session.run_at_once(session.statement("rollup.look", finer_until=finer_until), values)[0]
        if max(row.versions, default=0) != LATEST_VERSION:
            raise WrongSchemaError(f"the schema has version {max(row.versions, default=0)}")
        if row.definition is None:
            raise ConfigurationError(f"rollup.{definition.name} has no tables yet; run `batchctl migrate`")
        here = f"{row.system_identifier}/{row.database}"
        follows = row.partitioned and grain == definition.finest
        work = Work(session, definition, grain, _places(session, definition, row.definition), here, follows)
        return _look(work, row), work


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
    seen = _seen(row, work.here)
    before = seen or Seen()
    now, until, newest = _horizon(work, row)
    queued = row.queued_from is not None and row.queued_from < now
    rows = _read(work, before, now, queued=queued)
    many = len(rows) > FEW_BUCKETS or sum(noted.notes for noted in rows) >= FEW_NOTES
    closed = bool(rows) and rows[0].start < now
    return Look(
        started=row.started,
        known=row.known,
        paused=(*([work.definition.name] if row.rollup_paused else []), *([work.job] if row.paused else [])),
        history_queued=row.history_queued,
        partitioned=row.partitioned,
        before=before,
        notes_seen=row.notes_seen if seen else None,
        dirty=many or closed,
        few=_few(work, rows, row, now, queued=queued) if closed and not many else None,
        # What it shows was seen by the read above, which is younger.
        seen=None if rows else row.snapshot,
        until=until,
        newest=newest,
    )


def _read(work: Work, before: Seen, now: float, *, queued: bool) -> list[Any]:
    nothing = sql.SQL("")
    statement = work.reading(
        "noted",
        overtaken=work.statement("overtaken") if before.late else nothing,
        waiting=work.statement("waiting") if queued else nothing,
        end=work.reading("local_end") if work.grain.zone else nothing,
    )
    values = {**before.parameters(), "open": now, "most_buckets": FEW_BUCKETS, "most_notes": FEW_NOTES}
    rows = work.execute(statement, **values)
    return sorted(rows, key=lambda noted: float(noted.start))


def _few(work: Work, rows: Sequence[Any], row: Any, now: float, *, queued: bool) -> Waiting | None:
    # Marks that stand for every bucket, and what is not computed anew, can only be sorted in.
    floor = row.started - work.definition.retention_seconds
    if rows[0].start < (max(floor, EARLIEST) if compose.has_floor(work.definition, work.grain) else EARLIEST):
        return None
    closed = (
        Bucket(
            int(noted.start),
            int(noted.end if work.grain.zone else noted.start + work.grain.seconds),
            shown(noted.start),
        )
        for noted in rows
        if noted.start < now
    )
    later = (int(noted.start) for noted in rows if noted.start >= now)
    return Waiting(tuple(closed), tuple(later), queued, rows[0].snapshot)


def _seen(row: Any, here: str) -> Seen | None:
    # The numbers of transactions mean something in one cluster and database only, and in a restored dump they may be
    # beyond the next one.
    if row.notes_seen is None or row.notes_seen_in != here:
        return None
    seen = Seen.read(row.notes_seen)
    return seen if seen.unseen_from <= Seen.read(row.snapshot).unseen_from else None


def _advice(session: Session, name: str, *, switched: bool) -> str:
    if switched:
        return "run `batchctl migrate`, which takes `lookback` in or out"
    if any(row.rollup == next_name(name) for row in session.fetch("rollup.registered")):
        return "`batchctl migrate` builds its new tables; run it again if it was interrupted"
    return "run `batchctl migrate`, which builds its new tables"
