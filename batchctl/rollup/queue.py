"""The queue of dirty buckets of a grain: looked at, filled, sorted, handed out in ranges."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

from batchctl.errors import ConfigurationError
from batchctl.rollup import compose
from batchctl.rollup.definition import Places, differences, next_name
from batchctl.rollup.work import Work, parameters, pieces
from batchctl.state.database import sql

if TYPE_CHECKING:
    from datetime import datetime

    from batchctl.rollup.definition import Definition, Grain
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


def look(session: Session, definition: Definition, grain: Grain) -> tuple[Any, Work]:
    """Return all that an idle tick needs to know, and the work.

    Raises:
        ConfigurationError: the rollup is not migrated, or has changed since.
    """
    now = definition.as_json()
    open_bucket = compose.open_bucket(session, definition, grain)
    statement = session.statement(
        "rollup.look",
        **pieces(session, definition, grain),
        until=compose.aggregated_until(session, definition, grain),
        newest=compose.bucket_of(session, grain, sql.SQL("{} - interval '1 microsecond'").format(open_bucket)),
    )
    rows = session.run(statement, {**parameters(definition, grain), "definition": json.dumps(now)})
    if not rows:
        raise ConfigurationError(f"rollup.{definition.name} has no tables yet; run `batchctl migrate`")
    seen = rows[0]
    before = dict(seen.definition)
    places = before.pop("places")
    if "dropping" in before:
        raise ConfigurationError(
            f"rollup.{definition.name} is being dropped; run `batchctl migrate --drop {definition.name}` again"
        )
    if before.pop("unfinished", False):
        raise ConfigurationError(f"rollup.{definition.name} is not complete yet; run `batchctl migrate` again")
    if not seen.current:
        raise ConfigurationError(
            f"rollup.{definition.name} has changed since it was migrated ({'; '.join(differences(before, now))}); "
            f"{_advice(session, definition.name)}"
        )
    return seen, Work(session, definition, grain, Places.from_json(places))


def _advice(session: Session, name: str) -> str:
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


def _is_dense(work: Work) -> bool:
    """Tell whether jumping from bucket to bucket is quicker than reading every row."""
    source = work.session.fetch_one("rollup.find_table", table=compose.quoted(*work.places.source).as_string())
    columns = work.session.fetch("rollup.table_columns", oid=source.oid)
    if not any(column.indexed for column in columns if column.name == work.definition.time):
        return False
    size = work.compute("history_size", seconds=work.grain.seconds, oid=source.oid)[0]
    return bool(size.rows > ROWS_FOR_A_JUMP * size.tables * size.buckets)


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
    )
    with work.session.transaction():
        work.steady(UNLIMITED)
        if not work.run("keep_definition", definition=work.described):
            raise ConfigurationError(f"rollup.{work.definition.name} has changed meanwhile; run this again")
        rows = work.session.run(statement, {**work.parameters, "start": start, "end": end})
    buckets: int = rows[0].buckets
    return buckets


def sort_in(work: Work, started: float) -> bool:
    """Turn the notes that were not seen before into entries of the queue; False if the job is held elsewhere.

    Args:
        work: The grain.
        started: When the tick started, by the database's clock, as seconds since 1970.
    """
    with work.session.transaction():
        if not work.hold():
            return False
        # In this order for the reason given in refresh_chunk.
        if work.run("sort_in", started=started)[0].marked:
            work.compute("queue_target")
    return True


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
        work.run("end_unheld", outcome=outcome)
    return waiting(work)


def waiting(work: Work) -> int:
    """Count the closed buckets that wait, in the queue or as notes."""
    buckets: int = work.run("remaining")[0].buckets
    return buckets
