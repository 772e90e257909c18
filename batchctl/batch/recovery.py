"""What earlier runs left behind: listing it, ending it, and closing a run that died."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from batchctl.errors import BatchctlError, UsageError
from batchctl.guard.ending import end_processes, with_descendants
from batchctl.guard.identity import identify, started_seconds_ago
from batchctl.guard.liveness import Orphan, Recorded, find_orphans, forget_runs, listed, recorded_processes
from batchctl.guard.lock import Holder, acquire, lock_path, read_holder
from batchctl.logs import shown
from batchctl.state.within import within

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable, Iterable, Mapping
    from contextlib import AbstractContextManager
    from datetime import tzinfo

    from batchctl.clock import Clock
    from batchctl.config import Configuration
    from batchctl.guard.identity import Running
    from batchctl.state.claim import StoredRun
    from batchctl.state.host import Host
    from batchctl.state.store import Store

FORCED = "closed by `batchctl recover --force`: its host is gone"
ASK_SECONDS = 10.0
"""How long the database may take to name the processes that were recorded."""


@dataclass(frozen=True)
class Left:
    """A process that an earlier run left alive.

    Args:
        batch: The batch.
        orphan: The process.
        since: When it started; None if it is hidden.
        killed: Whether it was ended; None if nobody asked for it.
    """

    batch: str
    orphan: Orphan
    since: datetime | None
    killed: bool | None = None


class Leftovers:
    """What earlier runs of the configured batches left alive on this host.

    Args:
        configuration: The configuration.
        recorded: For each batch the processes that unfinished runs wrote down, as far as the database told.
        clock: The machine's clock.
    """

    def __init__(self, configuration: Configuration, recorded: Mapping[str, list[Recorded]], clock: Clock) -> None:
        self._configuration = configuration
        self._recorded = recorded
        self._clock = clock

    def find(self) -> list[Left]:
        """List it, without what belongs to a run that lives."""
        return [left for batch in self._configuration.batches for left in self._find(batch)]

    def kill(self) -> list[Left]:
        """End it: SIGTERM, the grace of its batch, SIGKILL; return what there was and what became of it."""
        ended = []
        for batch, settings in self._configuration.batches.items():
            before = {_key(left): left for left in self._find(batch)}
            if not before:
                continue

            def find(batch: str = batch) -> set[Running]:
                # Looked for anew each time: a run that has come to life meanwhile is never touched.
                return with_descendants({(left.orphan.pid, left.orphan.start_ticks) for left in self._find(batch)})

            end_processes(find, settings.grace.total_seconds(), self._clock)
            after = {_key(left): left for left in self._find(batch)}
            ended += [replace(left, killed=key not in after) for key, left in {**after, **before}.items()]
        return ended

    def _find(self, batch: str) -> list[Left]:
        orphans = find_orphans(self._configuration.state_dir, batch, self._recorded.get(batch, ()))
        alive = {orphan.run_id for orphan in orphans if orphan.supervisor}
        return [Left(batch, orphan, self._since(orphan)) for orphan in orphans if orphan.run_id not in alive]

    def _since(self, orphan: Orphan) -> datetime | None:
        if not orphan.start_ticks:
            return None
        return self._clock.now() - timedelta(seconds=started_seconds_ago(orphan.start_ticks))


def _key(left: Left) -> tuple[Any, ...]:
    orphan = left.orphan
    return orphan.run_id, orphan.pid, orphan.start_ticks, orphan.account, orphan.step


def ask_recorded(
    connect: Callable[..., AbstractContextManager[Store]], batches: Iterable[str], host_id: str
) -> dict[str, list[Recorded]]:
    """Ask the database for the processes that unfinished runs of this host wrote down.

    Raises:
        BatchctlError: it does not say.
    """

    def ask() -> dict[str, list[Recorded]]:
        with connect() as store:
            return {batch: recorded_processes(store.unfinished(batch, host_id)) for batch in batches}

    return within(ASK_SECONDS, ask)


class NotRecoveredError(BatchctlError):
    """A run cannot be closed now."""


class NotDeadError(NotRecoveredError):
    """A run is alive, or may be as far as this host can know."""


@dataclass(frozen=True)
class Recovery:
    """Closes runs that died.

    Args:
        configuration: The configuration.
        connect: Opens a store for a block, and records the journal first.
        host: This host.
        zone: For shown times.
        clock: The machine's clock.
        log: Makes the logger of a batch.
    """

    configuration: Configuration
    connect: Callable[..., AbstractContextManager[Store]]
    host: Host
    zone: tzinfo
    clock: Clock
    log: Callable[[str], logging.Logger]

    def close(self, run_id: str, *, force: bool = False) -> str:
        """Close a run; return what became of it, in words.

        Args:
            run_id: The run.
            force: Close it although its claim is not over: the caller asserts that its host is gone.

        Raises:
            UsageError: there is no such run.
            NotRecoveredError: it is alive, or something of it is, or may be.
        """
        with self.connect() as store:
            run = store.run(run_id)
        if run is None:
            raise UsageError(f"no such run: {run_id}; `batchctl history` lists them")
        if run.outcome is not None:
            return self._ended(run)
        path = lock_path(self.configuration.state_dir, f"batch.{run.batch}")
        process = identify(os.getpid())
        lock = acquire(path, Holder(self.host.hostname, *process, self.clock.now(), looking="recover"))
        if lock is None:
            holder = read_holder(path, self.clock)
            who = f"pid {holder.pid} on {holder.hostname}" if holder else "which has not signed"
            raise NotDeadError(f"{_named(run)} is not closed: the lock of the batch is held by a batchctl ({who})")
        with lock, self.connect() as store:
            return self._close(store, run_id, force=force)

    def close_all(self) -> tuple[list[str], list[str]]:
        """Close every dead run of the configured batches; return what is said of them, and what was refused."""
        said, refused = [], []
        for batch in self.configuration.batches:
            with self.connect() as store:
                live = store.live(batch)
            if live is None:
                continue
            try:
                said.append(self.close(live.run_id))
            except NotDeadError as error:
                said.append(str(error))
            except NotRecoveredError as error:
                refused.append(str(error))
        return said, refused

    def _close(self, store: Store, run_id: str, *, force: bool) -> str:
        # Read again: only now, with the lock, nothing of this host changes it, and all of the journal is recorded.
        run = store.run(run_id)
        if run is None or run.outcome is not None:
            return self._ended(run) if run else f"Run {run_id} is gone."
        state_dir, own = self.configuration.state_dir, run.host == self.host.host_id
        # Another state directory on this machine is another host, whose processes can be seen all the same.
        orphans = find_orphans(state_dir, run.batch, recorded_processes(store.unfinished(run.batch, run.host)))
        alive = [orphan for orphan in orphans if orphan.run_id == run_id]
        if any(orphan.supervisor for orphan in alive):
            raise NotDeadError(f"{_named(run)} is not closed: its batchctl is alive here ({listed(alive)})")
        if alive:
            end = "`batchctl orphans --kill` ends them" if own else "end them first"
            raise NotRecoveredError(f"{_named(run)} is not closed, something of it is alive: {listed(alive)}; {end}")
        claimed = not own and store.now() < run.claimed_until
        if claimed and not force:
            until = shown(run.claimed_until, self.zone)
            raise NotDeadError(
                f"{_named(run)} is not closed: {run.hostname} may be at work until {until}, when its claim is over; "
                f"if that host is gone for good: `batchctl recover {run_id} --force`"
            )
        if not store.close(run, FORCED if claimed else None):
            raise NotRecoveredError(f"{_named(run)} is not closed: it has just changed; look again")
        if own:
            forget_runs(state_dir, run.batch, {orphan.run_id for orphan in orphans})
        self.log(run.batch).warning("Run %s died without an end; it is closed as crashed", run_id)
        return f"Closed {_named(run)} as crashed."

    def _ended(self, run: StoredRun) -> str:
        when = f" at {shown(run.finished_at, self.zone)}" if run.finished_at else ""
        return f"{_named(run)} has ended{when}: {run.outcome}."


def _named(run: StoredRun) -> str:
    return f"Run {run.run_id} of {run.batch}"
