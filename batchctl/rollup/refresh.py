"""Brings a grain of a rollup up to date, chunk by chunk."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from batchctl.errors import BatchctlError, ConfigurationError, DatabaseUnavailableError
from batchctl.guard.pause import lifted_by
from batchctl.rollup import notes, queue
from batchctl.rollup.backlog import MOST_BUCKETS, Alone, Chunks, Crew, Pace
from batchctl.rollup.bucket import shown
from batchctl.rollup.chunk import Attempt, since
from batchctl.rollup.look import FEW_BUCKETS, look_at
from batchctl.rollup.result import Advance, GrainResult
from batchctl.state.driver_errors import DatabaseBusyError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager
    from logging import Logger

    from batchctl.clock import Clock
    from batchctl.rollup.chunk import Chunk
    from batchctl.rollup.definition import Definition
    from batchctl.rollup.look import Look, Waiting
    from batchctl.rollup.result import Outcome
    from batchctl.rollup.work import Work
    from batchctl.state.database import Session

NAMED_BUCKETS = 3
"""How many of the buckets that fail are named."""

NOTHING = "No events for bucket %s, skipping aggregation"


@dataclass(frozen=True)
class _Progress:
    """What the chunks of one call came to."""

    outcome: Outcome
    reason: str | None
    chunks: tuple[Chunk, ...]
    remaining: int | None = None
    """Closed buckets that are left, if the end has been recorded already."""
    ignored: int = 0


ELSEWHERE = _Progress("skipped", "running_elsewhere", ())


@dataclass(frozen=True)
class Limits:
    """How much one call may do, and with what.

    Args:
        deadline: When to start no further chunk, as `clock.monotonic()` counts; one chunk is always done, so that a
            backlog in a finer grain never starves a coarser one. By default the rollup's budget from now.
        most_buckets: Buckets of one transaction at most; how many it really takes depends on their rows.
        jobs: How many chunks at a time.
        connect: Opens a session for each further one of them.
        progress: Is told how far a backlog is, before its first chunk and after each.
    """

    deadline: float | None = None
    most_buckets: int = MOST_BUCKETS
    jobs: int = 1
    connect: Callable[[], AbstractContextManager[Session]] | None = None
    progress: Callable[[Advance], None] | None = None


NO_LIMITS = Limits()


@dataclass(frozen=True)
class _Call:
    """One call for one grain, under way."""

    work: Work
    look: Look
    deadline: float
    limits: Limits
    clock: Clock
    log: Logger


def tick(  # noqa: PLR0917 - the first five are what every tick has
    session: Session, definition: Definition, grain: str, clock: Clock, log: Logger, limits: Limits = NO_LIMITS
) -> GrainResult:
    """Bring one grain up to date, newest buckets first.

    Args:
        session: An open session.
        definition: The rollup.
        grain: Name of the grain.
        clock: Measures durations and the deadline.
        log: Takes the lines; one about a start carries its time as `at`.
        limits: How much to do.

    Raises:
        ConfigurationError: the rollup is not migrated, or has changed since, or a right is missing.
        DatabaseUnavailableError: the database was lost, or another session was in the way; what was committed stays.
    """
    begun = clock.monotonic()
    deadline = begun + definition.budget_seconds if limits.deadline is None else limits.deadline
    look, work = look_at(session, definition, definition.grain(grain))
    if look.paused:
        message = f"{grain} aggregation is paused: {lifted_by(look.paused)}. Skipped."
        log.warning(message)
        return GrainResult(definition.name, grain, "skipped", "paused", detail=message)
    if not look.known:
        with session.transaction():
            work.run("add_state")
    found = look.history_queued and _search(look, work, log)
    if found:
        again, work = look_at(session, definition, definition.grain(grain))
        # What the search looked at ends at the first look, however long it took.
        look = again._replace(until=look.until)
    if look.history_queued and found is False and not look.dirty:
        log.debug(NOTHING, shown(look.newest))
        values = {"seen": look.seen, "notes_seen": look.notes_seen}
        # In a transaction that says that it writes, because a role may by default only read.
        with session.transaction():
            work.run("nothing", started=look.started, until=look.until, **values)
        return GrainResult(definition.name, grain, "empty", duration_seconds=since(begun, clock))
    done = ELSEWHERE if found is None else _catch_up(_Call(work, look, deadline, limits, clock, log))
    detail = None
    if done.outcome == "skipped":
        detail = f"{grain} aggregation is running elsewhere. Skipped."
        log.info(detail)
        remaining = queue.waiting(work)
    elif done.remaining is not None:
        remaining = done.remaining
    else:
        if done.outcome == "empty":
            log.debug(NOTHING, shown(look.newest))
        remaining = queue.settle(work, done.outcome, look.until if done.outcome != "failed" else None)
        if done.outcome == "failed":
            # What could not even be sorted in waits too.
            remaining = queue.waiting(work)
    return GrainResult(
        definition.name,
        grain,
        done.outcome,
        done.reason,
        buckets=sum(len(chunk.buckets) for chunk in done.chunks),
        source_rows=sum(chunk.source_rows for chunk in done.chunks),
        rows_written=sum(chunk.rows_written for chunk in done.chunks),
        rows_deleted=sum(chunk.rows_deleted for chunk in done.chunks),
        remaining_buckets=remaining,
        duration_seconds=since(begun, clock),
        ignored_buckets=done.ignored,
        detail=detail,
    )


def _catch_up(call: _Call) -> _Progress:
    work, limits = call.work, call.limits
    done: list[Chunk] = []
    faults: list[Chunk] = []
    late = notes.Late()
    try:
        if not call.look.history_queued:
            queue.queue_history(work)
        begun = _begin(call)
        if isinstance(begun, _Progress):
            return begun
        late = begun
        tell = _teller(call)
        tell(done)
        with _crew(call) as crew:
            for chunk in Chunks(work, crew, Pace(limits.most_buckets), call.clock, call.deadline):
                if chunk is None:
                    return ELSEWHERE if not done and not faults else _sum_up(done, faults)
                (faults if chunk.failure else done).append(chunk)
                tell(done)
    except BatchctlError as error:
        if isinstance(error, ConfigurationError) or ends_the_call(error):
            raise
        progress = _Progress("failed", " ".join(str(error).split()), tuple(done))
    else:
        progress = _sum_up(done, faults)
    if progress.outcome == "failed":
        call.log.error("%s aggregation failed: %s", work.grain.name, progress.reason)
    return replace(progress, ignored=late.buckets)


def ends_the_call(error: BatchctlError) -> bool:
    """Tell an error that the other grains will meet as well: the database itself is gone."""
    return isinstance(error, DatabaseUnavailableError) and not isinstance(error, DatabaseBusyError)


def _begin(call: _Call) -> _Progress | notes.Late:
    """Do the whole tick in one transaction if little is waiting, and else sort the notes in.

    Returns:
        What the tick came to, or what was too late if more is waiting or it has to be done bucket by bucket.
    """
    attempt = Attempt(call.work, call.clock, call.log)
    few = call.look.few
    if few and len(few.closed) > call.limits.most_buckets:
        few = None
    try:
        done = _hold(call, attempt, few)
    except BatchctlError as error:
        attempt.failed(error)
        done = _hold(call, attempt, None)
    if done is None:
        return _Progress("success", None, (attempt.succeeded(),), remaining=0)
    if isinstance(done, notes.Late) and done.buckets:
        call.log.warning(
            "%s: %d buckets older than source_retention changed and are not recomputed: %s .. %s",
            *(call.work.grain.name, done.buckets, done.first, done.last),
        )
    return done


def _hold(call: _Call, attempt: Attempt, few: Waiting | None) -> _Progress | notes.Late | None:
    """Compute what waits if it is little (None), or sort the notes in, in a transaction that holds the job."""
    work, look = call.work, call.look
    with work.session.transaction():
        held = notes.hold(work, look, few) if few else work.hold()
        if held is None:
            return ELSEWHERE
        if few is None or not held.unchanged:
            return notes.sort_in(work, look)
        attempt.compute(few.closed, occupied=held.occupied)
        notes.finish(work, look, few)
    return None


def _teller(call: _Call) -> Callable[[Sequence[Chunk]], None]:
    progress, work = call.limits.progress, call.work
    if progress is None:
        return lambda done: None  # noqa: ARG005 - nobody listens
    # Only who listens has to pay for the count.
    total = queue.waiting(work)

    def tell(done: Sequence[Chunk]) -> None:
        buckets, rows = sum(len(chunk.buckets) for chunk in done), sum(chunk.source_rows for chunk in done)
        progress(Advance(work.definition.name, work.grain.name, total, buckets, rows))

    return tell


def _search(look: Look, work: Work, log: Logger) -> bool | None:
    """Notice what no trigger does: partitions that came or went, and all with `lookback`.

    Returns:
        True if that found any, None if it has to be left to another tick, which holds the job.
    """
    if work.grain != work.definition.finest:
        return False
    if work.definition.lookback_seconds:
        return queue.look_back(work)
    if not look.partitioned:
        return False
    from batchctl.rollup.partitions import follow  # noqa: PLC0415 - most sources have none

    return follow(work, log)


def _crew(call: _Call) -> AbstractContextManager[Crew]:
    connect, jobs = call.limits.connect, call.limits.jobs
    if jobs > 1 and connect is not None and _is_large(call.work):
        from batchctl.rollup.team import crew  # noqa: PLC0415 - only a backlog needs threads

        return crew(call.work, jobs, connect, call.clock, call.log)
    return Alone(call.work, call.clock, call.log)


def _is_large(work: Work) -> bool:
    found = queue.pick(work, FEW_BUCKETS + 1, None)
    return found is not None and found.buckets > FEW_BUCKETS


def _sum_up(done: Sequence[Chunk], faults: Sequence[Chunk]) -> _Progress:
    if faults:
        return _Progress("failed", _blame(faults), tuple(done))
    return _Progress("success" if done else "empty", None, tuple(done))


def _blame(faults: Sequence[Chunk]) -> str:
    shown = [fault.buckets[0][1] for fault in faults]
    more = f" and {len(shown) - NAMED_BUCKETS} more" if len(shown) > NAMED_BUCKETS else ""
    return f"bucket {', '.join(shown[:NAMED_BUCKETS])}{more}: {faults[0].failure}"
