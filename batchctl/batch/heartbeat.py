"""What goes on beside the steps of a run: its heartbeat, its lease, and what else has to be looked at now and then."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import TYPE_CHECKING, Self

from batchctl.batch.interruption import Stop
from batchctl.errors import BatchctlError

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable

    from batchctl.batch.interruption import Interruption
    from batchctl.batch.record import Recorder
    from batchctl.clock import Clock

LOOK_SECONDS = 5.0
BEAT_SECONDS = 60.0
LEASE = timedelta(minutes=5)
"""How long another host must take a run to be alive that ends itself when it loses the database."""
LEASE_MARGIN_SECONDS = 30.0
"""What ending the steps may take behind their grace."""


class Heartbeat:
    """A thread that wakes up every few seconds while a run is in progress.

    Args:
        recorder: Reaches the database.
        interruption: Asked to end the run when its claim is lost, or when another host asks for it.
        lease: None if the run goes on without the database; else it ends itself before this is over.
        since: When the lease began, by the monotonic clock.
        grace: What the steps are given to end; part of the lease.
        looks: What is to be done each time.
    """

    def __init__(
        self,
        recorder: Recorder,
        interruption: Interruption,
        *,
        lease: timedelta | None,
        since: float,
        grace: timedelta,
        clock: Clock,
        log: logging.Logger,
        looks: tuple[Callable[[], None], ...] = (),
    ) -> None:
        self._recorder = recorder
        self._interruption = interruption
        self._lease = lease
        self._tolerated = lease.total_seconds() - grace.total_seconds() - LEASE_MARGIN_SECONDS if lease else None
        self._clock = clock
        self._log = log
        self._looks = (*looks, interruption.look)
        self._over = threading.Event()
        self._heard_at = since
        self._next_beat = self._heard_at + BEAT_SECONDS
        self._thread = threading.Thread(target=self._run, daemon=True, name="heartbeat")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(LOOK_SECONDS):
            # Whatever goes wrong in one of them, a disk or a thread that cannot be made, the lease goes on running.
            for task in (self._beat_if_due, self._check_lease, *self._looks):
                try:
                    task()
                except Exception as error:  # noqa: BLE001 - the next round tries again
                    self._log.error("In the background of the run: %s: %s", type(error).__name__, error)

    def _beat_if_due(self) -> None:
        if self._clock.monotonic() >= self._next_beat:
            self._beat()

    def _check_lease(self) -> None:
        if self._tolerated is not None and self._clock.monotonic() - self._heard_at > self._tolerated:
            self._end('the database was lost for too long: on_lost_database = "stop"')

    def _beat(self) -> None:
        began = self._clock.monotonic()
        self._next_beat = began + BEAT_SECONDS
        try:
            heard = self._recorder.heartbeat(self._lease)
        except BatchctlError as error:
            # Without a lease nothing depends on it, and the records themselves say when the database is away.
            if self._lease is not None:
                self._log.warning("No heartbeat: %s", error)
                self._next_beat = began + LOOK_SECONDS
            return
        if heard is None:
            self._end("its claim was closed or taken over, by another host or by `batchctl recover`")
            return
        self._heard_at = began
        if heard.stop_requested is not None:
            self._interruption.ask(Stop(heard.stop_requested))

    def _end(self, reason: str) -> None:
        if self._interruption.count == 0:
            self._interruption.request(Stop.STOP, reason)
