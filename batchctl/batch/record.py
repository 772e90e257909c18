"""Records what happens in a run; a database that is away never stops the run."""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING, Any, TypeVar, cast

from batchctl.errors import BatchctlError, DatabaseUnavailableError

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager
    from datetime import datetime

    from batchctl.state.journal import Journal
    from batchctl.state.store import Store

Result = TypeVar("Result")

WRITE_LIMIT_SECONDS = 5.0
"""How long a record may take; a step is waiting behind it."""


def within(seconds: float, action: Callable[[], Result]) -> Result:
    """Do something, but do not wait for it longer than that.

    The server's own time limits are of no use against a server that hangs, and a step or a skip must not hang with it.
    What is given up may still happen, so it has to be something that may be repeated.

    Raises:
        DatabaseUnavailableError: it took longer.
        BatchctlError: what the action raised.
    """
    done: queue.SimpleQueue[tuple[Result | None, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            done.put((action(), None))
        except BaseException as error:  # noqa: BLE001 - raised again by whoever waits
            done.put((None, error))

    threading.Thread(target=work, daemon=True, name="record").start()
    try:
        result, error = done.get(timeout=seconds)
    except queue.Empty:
        raise DatabaseUnavailableError(f"the database did not answer within {seconds:g}s") from None
    if error is not None:
        raise error
    return cast("Result", result)


class Recorder:
    """Writes records in order, each over a connection of its own; what cannot be written goes to the journal."""

    def __init__(
        self,
        connect: Callable[..., AbstractContextManager[Store]],
        journal: Journal,
        now: Callable[[], datetime],
        log: logging.Logger,
    ) -> None:
        self._connect = connect
        self._journal = journal
        self._now = now
        self._log = log
        self._guard = threading.Lock()

    def write(self, name: str, values: Mapping[str, Any]) -> Any:
        """Record something now, or in the journal if the database is away; return the record's row if it has one."""
        at = self._now()
        with self._guard:
            try:
                return within(WRITE_LIMIT_SECONDS, lambda: self._write(name, values))
            except DatabaseUnavailableError as error:
                self._log.warning("%s; going on, %s is kept in the journal", error, name.replace("_", " "))
            except BatchctlError as error:
                self._log.error("%s; %s is kept in the journal", error, name.replace("_", " "))
            try:
                self._journal.append(name, {**values, "at": at})
            except BatchctlError as error:
                self._log.error("%s; %s is lost", error, name.replace("_", " "))
            return None

    def _write(self, name: str, values: Mapping[str, Any]) -> Any:
        with self._connect(limit=WRITE_LIMIT_SECONDS) as store:
            return store.write(name, values)
