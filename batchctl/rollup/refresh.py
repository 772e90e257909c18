"""Brings a grain of a rollup up to date: one chunk of dirty buckets, one transaction."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from batchctl.errors import BatchctlError, ConfigurationError, DatabaseUnavailableError
from batchctl.rollup import compose
from batchctl.rollup.definition import Places, differences

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime
    from logging import Logger

    from batchctl.clock import Clock
    from batchctl.rollup.definition import Definition, Grain
    from batchctl.state.database import Session, sql

# Four hours of minutes: enough to spread a transaction's cost, few enough that a budget of seconds is kept on a busy
# source and that what a crash repeats is little.
CHUNK_BUCKETS = 240

Outcome = Literal["success", "empty", "skipped", "failed"]

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


@dataclass(frozen=True)
class _Chunk:
    """What one transaction did."""

    shown: tuple[str, ...]
    source_rows: int
    events: int
    rows_written: int
    rows_deleted: int


@dataclass(frozen=True)
class _Progress:
    """What the chunks of one call came to."""

    outcome: Outcome
    reason: str | None
    chunks: tuple[_Chunk, ...]


@dataclass(frozen=True)
class _Limits:
    """How much one call may do."""

    deadline: float
    chunk_buckets: int


@dataclass(frozen=True)
class _Work:
    """One grain of one rollup in one database."""

    session: Session
    definition: Definition
    grain: Grain
    places: Places

    @property
    def target(self) -> sql.SQL:
        return compose.quoted(*self.places.targets[self.grain.name])

    @property
    def parameters(self) -> dict[str, Any]:
        return _parameters(self.definition, self.grain)

    def run(self, name: str, **more: Any) -> list[Any]:
        return self.session.run(self.session.statement(f"rollup.{name}"), {**self.parameters, **more})


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
        log: Takes the lines of the contract; a line about a start carries its time as `at`.
        deadline: When to start no further chunk, as `clock.monotonic()` counts; one chunk is always done, so that a
            backlog in a finer grain never starves a coarser one. By default the rollup's budget from now.
        chunk_buckets: Buckets of one transaction.

    Raises:
        ConfigurationError: the rollup is not migrated, or has changed since.
        DatabaseUnavailableError: the database was lost; what was committed stays.
    """
    begun = clock.monotonic()
    deadline = begun + definition.budget_seconds if deadline is None else deadline
    seen, work = _look(session, definition, definition.grain(grain))
    if not seen.known:
        work.run("add_state")
    if seen.history_queued and not seen.marked and not seen.dirty:
        log.debug(NOTHING, seen.newest)
        _complete(work, "empty", seen.started)
        return GrainResult(definition.name, grain, "empty", duration_seconds=_since(begun, clock))
    work.run("started", started=seen.started)
    done = _catch_up(work, seen, _Limits(deadline, chunk_buckets), clock, log)
    if done.outcome == "empty":
        log.debug(NOTHING, seen.newest)
    if done.outcome == "skipped":
        log.info("%s aggregation is running elsewhere, skipped", grain)
    else:
        _complete(work, done.outcome, seen.started)
    return GrainResult(
        definition.name,
        grain,
        done.outcome,
        done.reason,
        buckets=sum(len(chunk.shown) for chunk in done.chunks),
        source_rows=sum(chunk.source_rows for chunk in done.chunks),
        rows_written=sum(chunk.rows_written for chunk in done.chunks),
        rows_deleted=sum(chunk.rows_deleted for chunk in done.chunks),
        remaining_buckets=work.run("remaining")[0].buckets,
        duration_seconds=_since(begun, clock),
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
        The number of buckets queued; the next tick computes those that are closed.

    Raises:
        ConfigurationError: the rollup is not migrated, or has changed since.
    """
    _, work = _look(session, definition, definition.grain(grain))
    seconds = work.grain.seconds
    low = int(start.timestamp() // seconds) * seconds
    high = -int(-end.timestamp() // seconds) * seconds
    source, time = compose.built_from(definition, work.grain, work.places)
    statement = session.statement("rollup.queue_range", source=source, time=time, target=work.target)
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


def _look(session: Session, definition: Definition, grain: Grain) -> tuple[Any, _Work]:
    now = definition.as_json()
    parameters = {**_parameters(definition, grain), "definition": json.dumps(now)}
    seen = session.fetch_one("rollup.look", **parameters)
    if seen is None:
        raise ConfigurationError(f"rollup.{definition.name} has no tables yet; run `batchctl migrate`")
    before = dict(seen.definition)
    places = before.pop("places")
    if not seen.current:
        raise ConfigurationError(
            f"rollup.{definition.name} has changed since it was migrated ({'; '.join(differences(before, now))}); "
            "run `batchctl migrate`, which says how to go on"
        )
    return seen, _Work(session, definition, grain, Places.from_json(places))


def _parameters(definition: Definition, grain: Grain) -> dict[str, Any]:
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


def _catch_up(work: _Work, seen: Any, limits: _Limits, clock: Clock, log: Logger) -> _Progress:
    chunks: list[_Chunk] = []
    try:
        if not seen.history_queued:
            _queue_history(work)
        free = not seen.marked or _expand_markers(work)
        while free and (not chunks or clock.monotonic() < limits.deadline):
            chunk = _refresh_chunk(work, limits.chunk_buckets, clock, log)
            free = chunk is not None
            if chunk is None or not chunk.shown:
                break
            chunks.append(chunk)
    except DatabaseUnavailableError:
        raise
    except BatchctlError as error:
        # The chunk was rolled back and its buckets are still queued; other grains may well go on.
        reason = " ".join(str(error).split())
        log.error("%s aggregation failed: %s", work.grain.name, reason)  # noqa: TRY400 - the message says it all
        return _Progress("failed", reason, tuple(chunks))
    if chunks:
        return _Progress("success", None, tuple(chunks))
    return _Progress("empty", None, ()) if free else _Progress("skipped", "running_elsewhere", ())


def _queue_history(work: _Work) -> None:
    """Queue what was there before the triggers; in one transaction with the flag, so that it happens once."""
    finest = work.definition.finest
    parameters = {**work.parameters, "grain": finest.name, "seconds": finest.seconds}
    statement = work.session.statement(
        "rollup.queue_history",
        source=compose.quoted(*work.places.source),
        time=compose.quoted(work.definition.time),
    )
    with work.session.transaction():
        if work.run("claim_history"):
            work.session.run(statement, parameters)


def _expand_markers(work: _Work) -> bool:
    """Replace the marks for "everything" by the buckets of the table; False if the job is held elsewhere."""
    with work.session.transaction():
        if not work.run("hold"):
            return False
        # In this order for the reason given in _refresh_chunk.
        if work.run("take_markers"):
            work.session.run(work.session.statement("rollup.queue_target", target=work.target), work.parameters)
    return True


def _refresh_chunk(work: _Work, buckets: int, clock: Clock, log: Logger) -> _Chunk | None:
    """Recompute the newest closed dirty buckets; None if the job is held elsewhere."""
    at, begun = clock.now(), clock.monotonic()
    with work.session.transaction():
        if not work.run("hold"):
            return None
        # First the queue, then the source, in two statements: the second sees at least what the first saw. A writer
        # that commits in between leaves its queue row, which the first did not see; its bucket is computed once more.
        taken = work.run("take", chunk_buckets=buckets)
        if not taken:
            return _Chunk((), 0, 0, 0, 0)
        seconds = [row.second for row in taken]
        ranges = _ranges(seconds, work.grain.seconds)
        statement = compose.refresh(work.session, work.definition, work.grain, work.places, apart=len(ranges) > 1)
        limits = (
            {"lows": [low for low, _ in ranges], "highs": [high for _, high in ranges]}
            if len(ranges) > 1
            else {"low": ranges[0][0], "high": ranges[0][1]}
        )
        done = work.session.run(statement, {**work.parameters, **limits, "buckets": seconds})[0]
    shown = tuple(row.shown for row in taken)
    chunk = _Chunk(shown, done.source_rows, done.events, done.rows_written, done.rows_deleted)
    _log_chunk(log, work.grain.name, chunk, at, _since(begun, clock))
    return chunk


def _log_chunk(log: Logger, grain: str, chunk: _Chunk, at: datetime, duration: float) -> None:
    # The counts are known only now; the line carries the time at which it became true.
    extra = {"at": at}
    if len(chunk.shown) == 1:
        log.info("Starting %s aggregation for bucket: %s (%d events)", grain, chunk.shown[0], chunk.events, extra=extra)
    else:
        log.info(
            "Starting %s aggregation for %d buckets: %s .. %s (%d events)",
            *(grain, len(chunk.shown), chunk.shown[0], chunk.shown[-1], chunk.events),
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


def _complete(work: _Work, outcome: str, started: float) -> None:
    work.run("completed", outcome=outcome, started=started)


def _since(begun: float, clock: Clock) -> float:
    return round(clock.monotonic() - begun, 3)
