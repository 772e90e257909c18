"""The partitions of a source, which come and go without a trigger noticing: followed by each tick."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from batchctl.errors import BatchctlError, DatabaseUnavailableError
from batchctl.rollup import compose
from batchctl.rollup.definition import Table
from batchctl.rollup.queue import UNLIMITED
from batchctl.rollup.steps import LOCK_MILLISECONDS, LOCK_TIMEOUT, Step, missing_triggers
from batchctl.state.database import sql
from batchctl.state.driver_errors import MissingObjectError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from logging import Logger

    from batchctl.rollup.definition import Definition
    from batchctl.rollup.work import Work
    from batchctl.state.database import Session


def remembering(
    session: Session, definition: Definition, source: Table, *, queued: bool, afresh: bool = False
) -> list[Step]:
    """List the step that remembers partitions which have got their triggers, none if all are known.

    Args:
        session: An open session.
        definition: The rollup.
        source: Its source; of one without partitions nothing is remembered.
        queued: True if their rows are queued as a part of the history.
        afresh: True if what is remembered now will be forgotten before the step is run.
    """
    if definition.lookback_seconds:
        return []
    # Those that are gone are left for the next tick, which queues what they covered.
    found = [
        row for row in _changes(session, "" if afresh else definition.name, definition.time, source) if not row.gone
    ]
    if not found or (len(found) == 1 and found[0].kind != "p"):
        return []
    return [Step((_remember(session, definition, found, tracked=True, queued=queued),))]


def follow(work: Work, log: Logger) -> bool:
    """Give new partitions their triggers and queue what came or went with a partition; True if anything was queued.

    Args:
        work: The finest grain of a rollup whose source has partitions.
        log: Takes a line for each change, and a warning for a partition that cannot have triggers.

    Raises:
        DatabaseUnavailableError: the database was lost.
    """
    changes = _changes(work.session, work.definition.name, work.definition.time, work.places.source)
    gone = [row for row in changes if row.gone]
    buckets = _leave(work, gone, log) if gone else 0
    for row in changes:
        if not row.gone:
            try:
                buckets += _join(work, row, log)
            except MissingObjectError:
                # Gone in the meantime; the next tick sees that.
                log.debug("partition %s.%s is gone already", row.schema, row.name)
    return buckets > 0


def witness(work: Work) -> None:
    """Remember partitions that came since they were followed, in the transaction that has read the source.

    What was read is attached until the transaction ends, because to detach it needs a lock that readers exclude. So a
    partition whose rows were counted is one that is remembered, and is missed if it is gone when the next tick looks.
    """
    values = {
        "rollup": work.definition.name,
        "time": work.definition.time,
        "source": compose.spelled(*work.places.source),
    }
    if work.session.run_at_once(work.session.statement("partition.strange"), values)[0].found:
        tree = work.session.statement("partition.tree", staying=sql.SQL(""))
        work.session.run(work.session.statement("partition.witness", tree=tree), values)


def _changes(session: Session, rollup: str, time: str, source: Table) -> list[Any]:
    tree = session.statement("partition.tree", staying=session.statement("partition.staying"))
    statement = session.statement("partition.changes", tree=tree)
    return session.run(
        statement,
        {"rollup": rollup, "time": time, "source": compose.spelled(*source)},
    )


def _leave(work: Work, gone: Sequence[Any], log: Logger) -> int:
    with work.session.transaction():
        if not work.hold():
            return 0
        work.steady(UNLIMITED)
        statement = work.session.statement(
            "partition.queue_gone",
            target=work.target,
            bucket_of_low=compose.bucket_of(work.session, work.grain, compose.quoted("low")),
            floor=compose.floor(work.definition, work.grain),
        )
        which = {"relations": [row.relation for row in gone], "attached": [row.attached for row in gone]}
        buckets: int = work.session.run(statement, {**work.parameters, **which})[0].buckets
    log.info("%s: partitions that are gone: %d; buckets queued: %d", work.grain.name, len(gone), buckets)
    return buckets


def _join(work: Work, row: Any, log: Logger) -> int:
    """Give a partition its triggers, then queue its rows; return the number of buckets."""
    tracked = row.tracked or _track(work, row, log)
    # What was written to it directly before it had its triggers is queued once it has them.
    if row.queued and row.tracked == tracked:
        return 0
    partition = Table(row.schema, row.name)
    time = compose.quoted(work.definition.time)
    with work.session.transaction():
        if not work.hold():
            return 0
        work.steady(UNLIMITED)
        statement = work.session.statement(
            "partition.queue_new",
            partition=compose.quoted(*partition),
            time=time,
            bucket=compose.bucket_of(work.session, work.grain, time),
            target=work.target,
            bucket_of_low=compose.bucket_of(work.session, work.grain, compose.quoted("covered", "low")),
            floor=compose.floor(work.definition, work.grain),
        )
        covered = {"low": row.low, "high": row.high, "known": row.tracked or row.queued}
        buckets: int = work.session.run(statement, {**work.parameters, **covered})[0].buckets
        work.session.run(_remember(work.session, work.definition, [row], tracked=tracked, queued=True))
    log.info("%s: new partition %s; buckets queued: %d", work.grain.name, partition, buckets)
    return buckets


def _track(work: Work, row: Any, log: Logger) -> bool:
    """Create the triggers of a partition, in a transaction of its own, so that its lock is short."""
    session, definition, table = work.session, work.definition, Table(row.schema, row.name)
    try:
        with session.transaction():
            if statements := missing_triggers(session, definition, table):
                session.run(session.statement("rollup.set_lock_timeout", milliseconds=sql.Literal(LOCK_MILLISECONDS)))
            for statement in statements:
                session.run(statement)
            session.run(_remember(session, definition, [row], tracked=True, queued=False))
    except BatchctlError as error:
        busy = getattr(error.__cause__, "sqlstate", None) in LOCK_TIMEOUT
        if isinstance(error, (DatabaseUnavailableError, MissingObjectError)) and not busy:
            raise
        log.warning(
            "%s: new partition %s has no triggers yet, so what is written to it directly is not noticed: %s",
            *(work.grain.name, table),
            "it is locked by a long transaction; the next call tries again"
            if busy
            else f"{' '.join(str(error).split())}; run `batchctl migrate` as a role that may create them",
        )
        return False
    return True


def _remember(
    session: Session, definition: Definition, rows: Iterable[Any], *, tracked: bool, queued: bool
) -> sql.Composed:
    values = (
        sql.SQL("({})").format(
            compose.COMMA.join(
                map(
                    sql.Literal,
                    (definition.name, row.relation, row.attached, row.low, row.high, tracked, queued),
                )
            )
        )
        for row in rows
    )
    return session.statement("partition.remember", rows=compose.COMMA.join(values))
