"""A call of aggregate: for each grain the guards, then the refresh; finest grain first."""

from __future__ import annotations

import os
import secrets
import socket
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from batchctl.errors import BatchctlError, ConfigurationError, ExitCode, UsageError
from batchctl.guard.identity import identify
from batchctl.guard.lock import Holder, acquire, lock_path, read_holder
from batchctl.logs import elapsed, shown
from batchctl.rollup import queue
from batchctl.rollup.look import look_at
from batchctl.rollup.refresh import Limits, ends_the_call, tick
from batchctl.rollup.result import GrainResult
from batchctl.schedule.cron import inside_hours
from batchctl.state.migrate import WrongSchemaError
from batchctl.state.within import within

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from datetime import datetime, tzinfo

    from batchctl.clock import Clock
    from batchctl.config import Configuration
    from batchctl.rollup.definition import Definition
    from batchctl.rollup.result import Advance
    from batchctl.rollup.work import Work
    from batchctl.state.database import Session
    from batchctl.state.journal import Journal
    from batchctl.state.store import Store

SKIP_LIMIT_SECONDS = 2.0
"""How long a skip that is already decided may wait for the database to record it."""
HOLDER_PATIENCE_SECONDS = 0.2
"""How long a skip waits for the holder's name; a tick that comes every minute need not know it at any price."""


@dataclass(frozen=True)
class Rebuild:
    """A range whose buckets are to be computed anew: half-open, aware."""

    start: datetime
    end: datetime


class _Skip(NamedTuple):
    job: str
    reason: str
    detail: str


@dataclass
class Aggregate:
    """One call of aggregate.

    Args:
        configuration: The configuration.
        definitions: The rollups it asks for.
        grains: The grains it asks for; none for all.
        zone: For shown times and hours.
        clock: For durations and the budget; what is closed is decided by the database's clock.
        logger: Makes the logger of a rollup.
        connect: Opens a store for a block.
        journal: Names the journal, which keeps what the database cannot be told.
        rebuild: A range to be queued first.
        jobs: How many chunks of a grain are worked off at a time.
        progress: Is told how far a backlog is.
    """

    configuration: Configuration
    definitions: Sequence[Definition]
    grains: Sequence[str]
    zone: tzinfo
    clock: Clock
    logger: Callable[[str], logging.Logger]
    connect: Callable[..., AbstractContextManager[Store]]
    journal: Callable[[], Journal]
    rebuild: Rebuild | None = None
    jobs: int = 1
    progress: Callable[[Advance], None] | None = None
    _open: ExitStack = field(default_factory=ExitStack)
    _store: Store | None = None
    _refused: set[str] = field(default_factory=set)
    _skips: list[_Skip] = field(default_factory=list)

    def run(self) -> tuple[GrainResult, ...]:
        """Bring each grain up to date, unless a guard forbids it.

        Raises:
            DatabaseUnavailableError: the database cannot be reached or was lost; what was committed stays.
            ConfigurationError: the schema does not fit this program.
        """
        begun = self.clock.monotonic()
        with self._open:
            try:
                return tuple(self._grain(definition, grain, begun) for definition, grain in self._wanted())
            finally:
                self._record_skips()

    @property
    def misconfigured(self) -> bool:
        """Tell whether a grain failed for want of a change: a rollup that is not migrated, a right."""
        return bool(self._refused)

    def waiting(self) -> tuple[tuple[str, str, int], ...]:
        """Count the closed dirty buckets of each grain (rollup, grain, buckets); change nothing."""
        with self._open:
            return tuple(
                (definition.name, grain, queue.waiting(self._work(definition, grain)))
                for definition, grain in self._wanted()
            )

    def _work(self, definition: Definition, grain: str) -> Work:
        _, work = look_at(self._connected().session, definition, definition.grain(grain))
        return work

    def _wanted(self) -> Iterator[tuple[Definition, str]]:
        grains = sorted((grain for each in self.definitions for grain in each.grains), key=lambda grain: grain.seconds)
        known = dict.fromkeys(grain.name for grain in grains)
        for grain_name in self.grains:
            if grain_name not in known:
                raise UsageError(f"--grain {grain_name}: no such grain; configured: {', '.join(known)}")
        for definition in self.definitions:
            for grain in definition.grains:
                if not self.grains or grain.name in self.grains:
                    yield definition, grain.name

    def _grain(self, definition: Definition, grain: str, begun: float) -> GrainResult:
        log = self.logger(definition.name)
        try:
            return self._guarded(log, definition, grain, begun)
        except WrongSchemaError:
            # Nothing is recorded there.
            self._store = None
            raise
        except BatchctlError as error:
            if ends_the_call(error):
                raise
            return self._failed(log, definition, grain, error)

    def _guarded(self, log: logging.Logger, definition: Definition, grain: str, begun: float) -> GrainResult:
        rollup = self.configuration.rollups[definition.name]
        if not rollup.enabled:
            return self._skip(log, definition, grain, "disabled", "is disabled in the configuration")
        if not inside_hours(rollup.hours, self.clock.now(), self.zone):
            return self._skip(log, definition, grain, "outside_hours", f"is outside its hours {rollup.hours}")
        path = lock_path(self.configuration.state_dir, f"rollup.{definition.name}.{grain}")
        lock = acquire(path, Holder(socket.gethostname(), *identify(os.getpid()), self.clock.now()))
        if lock is None:
            holder = read_holder(path, self.clock, HOLDER_PATIENCE_SECONDS)
            return self._skip(log, definition, grain, "running", self._in_progress(holder))
        with lock:
            return self._locked(self._connected().session, log, definition, grain, begun)

    def _locked(
        self, session: Session, log: logging.Logger, definition: Definition, grain: str, begun: float
    ) -> GrainResult:
        self._queue(log, definition, grain)
        limits = Limits(
            begun + definition.budget_seconds, jobs=self.jobs, connect=self._another, progress=self.progress
        )
        result = tick(session, definition, grain, self.clock, log, limits)
        if result.outcome == "skipped":
            self._skips.append(_Skip(definition.job(grain), str(result.reason), str(result.detail)))
        return result

    def _queue(self, log: logging.Logger, definition: Definition, grain: str) -> bool:
        """Queue the range of a rebuild; False if there is none, or nothing in it."""
        if self.rebuild is None:
            return False
        session = self._connected().session
        return queue.rebuild(session, definition, grain, self.rebuild.start, self.rebuild.end, log=log) > 0

    def _failed(self, log: logging.Logger, definition: Definition, grain: str, error: BatchctlError) -> GrainResult:
        reason = " ".join(str(error).split())
        # Each grain of a rollup that is not migrated says the same.
        if reason not in self._refused:
            log.error("%s aggregation failed: %s", grain, reason)
        if isinstance(error, ConfigurationError):
            self._refused.add(reason)
        # Without a row there is nothing to record in.
        if self._store is not None:
            session = self._store.session
            with suppress(BatchctlError), session.transaction():
                session.fetch("rollup.failed", job=definition.job(grain))
        return GrainResult(definition.name, grain, "failed", reason)

    def _connected(self) -> Store:
        if self._store is None:
            # A tick finds out by its first look whether the schema fits; records of the journal do not.
            waits = self.journal().waits
            self._store = self._open.enter_context(self.connect(known=not waits, replay=waits))
        return self._store

    @contextmanager
    def _another(self) -> Iterator[Session]:
        # This call has made sure of the schema, and has recorded what the journal held.
        with self.connect(known=True, replay=False) as store:
            yield store.session

    def _in_progress(self, holder: Holder | None) -> str:
        if holder is None:
            return "is still in progress"
        age = elapsed(max((self.clock.now() - holder.started_at).total_seconds(), 0))
        since = shown(holder.started_at, self.zone)
        return f"is still in progress (pid {holder.pid} on {holder.hostname}, since {since}, {age})"

    def _skip(self, log: logging.Logger, definition: Definition, grain: str, reason: str, what: str) -> GrainResult:
        # Whoever asks for a range wants it computed, by whichever call.
        left = "; the range is queued for the next call" if self._queue(log, definition, grain) else ""
        message = f"{grain} aggregation {what}. Skipped{left}."
        log.warning(message)
        self._skips.append(_Skip(definition.job(grain), reason, message))
        return GrainResult(definition.name, grain, "skipped", reason, detail=message)

    def _record_skips(self) -> None:
        """Record all skips of the call; one that the lock decided does not wait for a slow or dead database."""
        try:
            if self._store is not None:
                self._record_in(self._store)
            elif self._skips:
                within(SKIP_LIMIT_SECONDS, self._record_apart)
        except BatchctlError:
            at = self.clock.now().isoformat()
            # A skip is never an error: what cannot even be journaled is in the log.
            with suppress(BatchctlError):
                for skip in self._skips:
                    self.journal().append("skip", {**skip._asdict(), "at": at, "token": secrets.token_hex(8)})

    def _record_apart(self) -> None:
        with self.connect(limit=SKIP_LIMIT_SECONDS, start_server=False) as store:
            self._record_in(store)

    def _record_in(self, store: Store) -> None:
        for skip in self._skips:
            store.record_in_series(*skip)


def exit_code(results: Sequence[GrainResult], skip_exit_code: int, *, misconfigured: bool = False) -> int:
    """Sum up a call: failed if any grain failed, skipped only if all were."""
    if misconfigured:
        return ExitCode.CONFIGURATION
    outcomes = {result.outcome for result in results}
    if "failed" in outcomes:
        return ExitCode.FAILED
    return skip_exit_code if outcomes == {"skipped"} else ExitCode.DONE
