"""Records what happens in a run; a database that is away never stops the run."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from batchctl.errors import BatchctlError, DatabaseUnavailableError
from batchctl.state.within import GivenUpError, within

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager
    from datetime import datetime, timedelta

    from batchctl.state.journal import Journal
    from batchctl.state.store import Store

WRITE_LIMIT_SECONDS = 5.0
"""How long a record may take; a step is waiting behind it."""
PATIENCE_SECONDS = 3.0
"""How much of it a refused connection is tried again: a server that restarts."""


class Recorder:
    """Writes records in order, each over a connection of its own; what cannot be written goes to the journal.

    Once the database is away, records go to the journal at once, until a heartbeat or the last record reaches it.

    Args:
        run: The claim, as values of the record `run_started`.
        connect: Opens a store for a block.
        journal: Keeps what the database cannot be told.
        now: The time by the database's clock.
        log: The batch's logger.
    """

    def __init__(
        self,
        run: Mapping[str, Any],
        connect: Callable[..., AbstractContextManager[Store]],
        journal: Journal,
        now: Callable[[], datetime],
        log: logging.Logger,
    ) -> None:
        self._run = run
        self._connect = connect
        self._journal = journal
        self._now = now
        self._log = log
        self._guard = threading.Lock()
        self._away = False
        self._journaled = False
        self._hanging: threading.Thread | None = None

    def write(self, name: str, values: Mapping[str, Any], *, last: bool = False) -> Any:
        """Record something now, or in the journal if the database is away; return the record's row if it has one.

        Args:
            name: The record, without what belongs to every record of the run.
            values: Its values.
            last: Try to reach the database even if it was away.
        """
        at = self._now()
        # The end of a run says all of it, so that it can be recorded where the claim was lost.
        known = self._run if name == "run_finished" else {key: self._run[key] for key in ("run_id", "resumed")}
        values = {**known, **values}
        with self._guard:
            if last or not self._away:
                try:
                    row = self._ask(lambda: self._write(name, values))
                except DatabaseUnavailableError as error:
                    self._away = True
                    self._log.warning("%s; going on, %s is kept in the journal", error, name.replace("_", " "))
                except BatchctlError as error:
                    self._log.error("%s; %s is kept in the journal", error, name.replace("_", " "))
                else:
                    self._away = False
                    return row
            try:
                self._append(name, {**values, "at": at})
            except BatchctlError as error:
                self._log.error("%s; %s is lost", error, name.replace("_", " "))
            return None

    def heartbeat(self, lease: timedelta | None) -> Any:
        """Say that the run is alive and return what it is asked; None if its claim is another's.

        Raises:
            BatchctlError: the database cannot be told.
        """

        def beat() -> Any:
            with self._connect(limit=WRITE_LIMIT_SECONDS, known=True, replay=False) as store:
                heard = store.heartbeat(self._run, lease)
                # Whatever becomes of the journal, the run is alive.
                try:
                    self._journal.replay(store.write)
                except BatchctlError as error:
                    self._log.warning("The journal waits: %s", error)
                return heard

        heard = self._ask(beat)
        if self._away:
            self._log.info("The database is back")
        self._away = False
        return heard

    def _ask(self, action: Callable[[], Any]) -> Any:
        """Do something with the database, unless an earlier attempt still hangs: connections are dear where it does."""
        if self._hanging is not None and self._hanging.is_alive():
            raise DatabaseUnavailableError("the database has not answered for a while")
        self._hanging = None
        try:
            return within(WRITE_LIMIT_SECONDS, action)
        except GivenUpError as error:
            self._hanging = error.thread
            raise

    def _write(self, name: str, values: Mapping[str, Any]) -> Any:
        with self._connect(limit=WRITE_LIMIT_SECONDS, patience=PATIENCE_SECONDS, known=True) as store:
            # A standby that took over may not know the claim.
            return store.write_in_run(self._run, name, values)

    def _append(self, name: str, values: Mapping[str, Any]) -> None:
        if not self._journaled:
            self._journal.append("run_started", {**self._run, "at": values["at"]})
            self._journaled = True
        self._journal.append(name, values)
