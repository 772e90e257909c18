"""Asks a live run to end: by a signal on its own host, through the database on another."""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchctl.batch.heartbeat import BEAT_SECONDS
from batchctl.batch.interruption import STOP_SIGNALS, Stop
from batchctl.errors import BatchctlError
from batchctl.guard.ending import send
from batchctl.guard.identity import ProcessIdentity, alive
from batchctl.guard.lock import lock_path, read_holder

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from pathlib import Path

    from batchctl.clock import Clock
    from batchctl.state.store import Store


def ask_to_end(
    batch: str,
    how: Stop,
    *,
    state_dir: Path,
    host: str,
    connect: Callable[..., AbstractContextManager[Store]],
    clock: Clock,
) -> str:
    """Ask the live run of a batch to end; return what was done, in words.

    A run of this host is found by its lock and needs no database.

    Raises:
        DatabaseUnavailableError: no run is live here, and whether one is elsewhere cannot be asked.
        BatchctlError: it may not be asked, or it is dead.
    """
    holder = read_holder(lock_path(state_dir, f"batch.{batch}"), clock, patience=0)
    if holder is not None and holder.looking is not None:
        return f"No run of {batch} is in progress; `batchctl {holder.looking}` (pid {holder.pid}) is just looking."
    if holder is not None:
        return _signal(holder.identity, how)
    with connect() as store:
        live = store.live(batch)
        if live is None:
            return f"No run of {batch} is in progress."
        process = ProcessIdentity(live.pid, live.start_ticks, live.boot_id)
        if live.host == host:
            if alive(process, hidden_counts=False):
                return _signal(process, how)
            raise BatchctlError(
                f"run {live.run_id} has died; `batchctl orphans` shows what it left, `batchctl recover` closes it"
            )
        if not store.request_stop(live.run_id, how.value):
            return f"No run of {batch} is in progress."
    return (
        f"Asked run {live.run_id} on {live.hostname} to end {how.words}; it looks every {BEAT_SECONDS:g} s, "
        "if it reaches the database."
    )


def _signal(process: ProcessIdentity, how: Stop) -> str:
    try:
        send(process, STOP_SIGNALS[how])
    except PermissionError:
        raise BatchctlError(f"pid {process.pid} belongs to another user; stop it as that user, or as root") from None
    return f"Asked the run (pid {process.pid}) to end {how.words}."
