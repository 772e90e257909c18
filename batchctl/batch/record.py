"""Records what happens in a run; a database that is away never stops the run."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from batchctl.errors import BatchctlError, DatabaseUnavailableError
from batchctl.state.within import within

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager
    from datetime import datetime

    from batchctl.state.journal import Journal
    from batchctl.state.store import Store

WRITE_LIMIT_SECONDS = 5.0
"""How long a record may take; a step is waiting behind it."""


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
