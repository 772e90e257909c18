"""Brings a grain of a rollup up to date, chunk by chunk."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from batchctl.errors import BatchctlError, ConfigurationError, DatabaseUnavailableError
from batchctl.guard.pause import lifted_by
from batchctl.rollup import compose
from batchctl.rollup.chunk import Work, parameters, refresh_chunk, since
from batchctl.rollup.definition import Places, differences

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime
    from logging import Logger

    from batchctl.clock import Clock
    from batchctl.rollup.chunk import Chunk
    from batchctl.rollup.definition import Definition, Grain
    from batchctl.state.database import Session

# Four hours of minutes: enough to spread a transaction's cost, few enough that a budget of seconds is kept on a busy
# source and that what a crash repeats is little.
CHUNK_BUCKETS = 240

Outcome = Literal["success", "empty", "skipped", "failed"]

NAMED_BUCKETS = 3
"""How many of the buckets that fail are named."""

NOTHING = "No events for bucket %s, skipping aggregation"


@dataclass(frozen=True)
class GrainResult:
    """What one call did to one grain; the fields are the keys of the JSON document."""

    rollup: str
    grain: str
    outcome: Outcome
    reason: str | None = None
    buckets: int = 0
    source_rows: int = 0
    """Rows read: of the source for the finest grain, of the next finer table for the others."""
    rows_written: int = 0
    rows_deleted: int = 0
    remaining_buckets: int = 0
    """Closed and still queued."""
    duration_seconds: float = 0.0
    detail: str | None = None
    """Of a skip: the reason in words."""


@dataclass(frozen=True)
class _Progress:
    """What the chunks of one call came to."""

    outcome: Outcome
    reason: str | None
    chunks: tuple[Chunk, ...]


ELSEWHERE = _Progress("skipped", "running_elsewhere", ())


@dataclass(frozen=True)
class _Limits:
    """How much one call may do."""

    deadline: float
    chunk_buckets: int


def tick(
    session: Session,
    definition: Definition,
    grain: str,
    clock: Clock,
    log: Logger,
    *,
    deadline: float | None = None,
    chunk_buckets: int = CHUNK_BUCKETS,
) -> GrainResult:
    """Bring one grain up to date, newest buckets first.

    Args:
        session: An open session.
        definition: The rollup.
        grain: Name of the grain.
        clock: Measures durations and the deadline.
        log: Takes the lines; one about a start carries its time as `at`.
        deadline: When to start no further chunk, as `clock.monotonic()` counts; one chunk is always done, so that a
            backlog in a finer grain never starves a coarser one. By default the rollup's budget from now.
        chunk_buckets: Buckets of one transaction.

    Raises:
        ConfigurationError: the rollup is not migrated, or has changed since, or a right is missing.
        DatabaseUnavailableError: the database was lost; what was committed stays.
    """
    begun = clock.monotonic()
    deadline = begun + definition.budget_seconds if deadline is None else deadline
    seen, work = _look(session, definition, definition.grain(grain))
    if seen.paused:
        message = f"{grain} aggregation is paused: {lifted_by(seen.paused)}. Skipped."
        log.warning(message)
        return GrainResult(definition.name, grain, "skipped", "paused", detail=message)
    if not seen.known:
        work.run("add_state")
    if seen.history_queued and not seen.marked and not seen.dirty:
        log.debug(NOTHING, seen.newest)
        _complete(work, "empty", seen.started)
        return GrainResult(definition.name, grain, "empty", duration_seconds=since(begun, clock))
    work.run("started", started=seen.started)
    try:
        done = _catch_up(work, seen, _Limits(deadline, chunk_buckets), clock, log)
    except ConfigurationError:
        _complete(work, "failed", seen.started)
        raise
    if done.outcome == "empty":
        log.debug(NOTHING, seen.newest)
    detail = None
    if done.outcome == "skipped":
        detail = f"{grain} aggregation is running elsewhere. Skipped."
        log.info(detail)
    else:
        _complete(work, done.outcome, seen.started)
    return GrainResult(
        definition.name,
        grain,
        done.outcome,
        done.reason,
        buckets=sum(len(chunk.buckets) for chunk in done.chunks),
        source_rows=sum(chunk.source_rows for chunk in done.chunks),
        rows_written=sum(chunk.rows_written for chunk in done.chunks),
        rows_deleted=sum(chunk.rows_deleted for chunk in done.chunks),
        remaining_buckets=work.run("remaining")[0].buckets,
        duration_seconds=since(begun, clock),
        detail=detail,
    )


def rebuild(session: Session, definition: Definition, grain: str, start: datetime, end: datetime) -> int:
    """Queue every bucket of a grain that overlaps [start, end) and exists in its table or in what that is built from.

    Args:
        session: An open session.
        definition: The rollup.
        grain: Name of the grain.
        start: Aware; the bucket that holds it is the first.
        end: Aware; the bucket that holds the instant before it is the last.

    Returns:
        The number of buckets queued, none if the job is paused; the next tick computes those that are closed.

    Raises:
        ConfigurationError: the rollup is not migrated, or has changed since.
    """
    seen, work = _look(session, definition, definition.grain(grain))
    if seen.paused:
        return 0
    seconds = work.grain.seconds
    low = int(start.timestamp() // seconds) * seconds
    high = -int(-end.timestamp() // seconds) * seconds
    source, time = compose.built_from(definition, work.grain, work.places)
    statement = session.statement("rollup.queue_range", source=source, time=time, target=work.target)
    with session.transaction():
        work.run("steady")
        queued: int = session.run(statement, {**work.parameters, "low": low, "high": high})[0].buckets
    return queued


def waiting(session: Session, definition: Definition, grain: str) -> int:
    """Count the closed dirty buckets of a grain.

    Raises:
        ConfigurationError: the rollup is not migrated, or has changed since.
    """
    _, work = _look(session, definition, definition.grain(grain))
    buckets: int = work.run("remaining")[0].buckets
    return buckets


def _look(session: Session, definition: Definition, grain: Grain) -> tuple[Any, Work]:
    now = definition.as_json()
    seen = session.fetch_one("rollup.look", **parameters(definition, grain), definition=json.dumps(now))
    if seen is None:
        raise ConfigurationError(f"rollup.{definition.name} has no tables yet; run `batchctl migrate`")
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
            "run `batchctl migrate`, which says how to go on"
        )
    return seen, Work(session, definition, grain, Places.from_json(places))


def _catch_up(work: Work, seen: Any, limits: _Limits, clock: Clock, log: Logger) -> _Progress:
    done: list[Chunk] = []
    try:
        if not seen.history_queued:
            _queue_history(work)
        free = not seen.marked or _expand_markers(work)
        progress = _chunks(work, limits, clock, log, done) if free else ELSEWHERE
    except (DatabaseUnavailableError, ConfigurationError):
        raise
    except BatchctlError as error:
        progress = _Progress("failed", " ".join(str(error).split()), tuple(done))
    if progress.outcome == "failed":
        log.error("%s aggregation failed: %s", work.grain.name, progress.reason)
    return progress


def _chunks(work: Work, limits: _Limits, clock: Clock, log: Logger, done: list[Chunk]) -> _Progress:
    """Refresh chunk by chunk; one that fails is halved down to the bucket at fault, which stays queued."""
    faults: list[Chunk] = []
    size, below = limits.chunk_buckets, None
    while not (done or faults) or clock.monotonic() < limits.deadline:
        chunk = refresh_chunk(work, size, below, clock, log)
        if chunk is None and not done and not faults:
            return ELSEWHERE
        if chunk is None or not chunk.buckets:
            break
        if chunk.failure is None:
            done.append(chunk)
            size = min(2 * size, limits.chunk_buckets)
        elif len(chunk.buckets) > 1:
            size = len(chunk.buckets) // 2
        else:
            faults.append(chunk)
            below = chunk.buckets[0][0]
    if faults:
        return _Progress("failed", _blame(faults), tuple(done))
    return _Progress("success" if done else "empty", None, tuple(done))


def _blame(faults: Sequence[Chunk]) -> str:
    shown = [fault.buckets[0][1] for fault in faults]
    more = f" and {len(shown) - NAMED_BUCKETS} more" if len(shown) > NAMED_BUCKETS else ""
    return f"bucket {', '.join(shown[:NAMED_BUCKETS])}{more}: {faults[0].failure}"


def _queue_history(work: Work) -> None:
    """Queue what was there before the triggers; in one transaction with the flag, so that it happens once."""
    finest = work.definition.finest
    parameters = {**work.parameters, "grain": finest.name, "seconds": finest.seconds}
    statement = work.session.statement(
        "rollup.queue_history",
        source=compose.quoted(*work.places.source),
        time=compose.quoted(work.definition.time),
    )
    with work.session.transaction():
        work.run("steady")
        if work.run("claim_history"):
            work.session.run(statement, parameters)


def _expand_markers(work: Work) -> bool:
    """Replace the marks for "everything" by the buckets of the table; False if the job is held elsewhere."""
    with work.session.transaction():
        work.run("steady")
        if not work.run("hold"):
            return False
        # In this order for the reason given in refresh_chunk.
        if work.run("take_markers"):
            work.session.run(work.session.statement("rollup.queue_target", target=work.target), work.parameters)
    return True


def _complete(work: Work, outcome: str, started: float) -> None:
    work.run("completed", outcome=outcome, started=started)
