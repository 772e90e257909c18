"""Several chunks at a time: sessions that work for the one that holds the job."""

from __future__ import annotations

from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from queue import SimpleQueue
from typing import TYPE_CHECKING, Self

from batchctl.errors import DatabaseUnavailableError
from batchctl.rollup.backlog import Alone
from batchctl.rollup.chunk import refresh_chunk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from logging import Logger

    from batchctl.clock import Clock
    from batchctl.rollup.backlog import Crew
    from batchctl.rollup.chunk import Chunk
    from batchctl.rollup.queue import Range
    from batchctl.rollup.work import Work
    from batchctl.state.database import Session

HEARTBEAT_SECONDS = 1.0
"""How often the session that holds the job says that it is there; a signal may go unnoticed for as long."""
CANCEL_SECONDS = 0.2
"""How soon a session that went on to its next statement just as it was told to end is told again."""


@contextmanager
def crew(
    work: Work, size: int, connect: Callable[[], AbstractContextManager[Session]], clock: Clock, log: Logger
) -> Iterator[Crew]:
    """Gather as many sessions as the server has left, up to a number; the one of the call works alone if that is none.

    Args:
        work: The grain, in the session of the call.
        size: How many chunks at a time.
        connect: Opens a session for a block.
        clock: Measures the duration of a chunk.
        log: Takes the lines.
    """
    with ExitStack() as stack:
        sessions: list[Session] = []
        try:
            for _ in range(size):
                sessions.append(stack.enter_context(connect()))  # noqa: PERF401 - those before an error count
        except DatabaseUnavailableError as error:
            log.warning("%d of %d sessions are at work: %s", max(len(sessions), 1), size, error)
        # One that works for another is no quicker than that other.
        yield stack.enter_context(Team(work, sessions, clock, log)) if len(sessions) > 1 else Alone(work, clock, log)


class Team(AbstractContextManager["Team"]):
    """Several chunks at a time, each in a session of its own; the session of the call holds the job for all of them.

    Args:
        work: The grain, in the session of the call.
        sessions: Those that work.
        clock: Measures the duration of a chunk.
        log: Takes the lines.
    """

    def __init__(self, work: Work, sessions: Sequence[Session], clock: Clock, log: Logger) -> None:
        self.size = len(sessions)
        self._work, self._sessions, self._clock, self._log = work, sessions, clock, log
        self._stack = ExitStack()
        self._free: SimpleQueue[Work] = SimpleQueue()
        self._under_way: set[Future[Chunk | None]] = set()
        self._held = False

    def __enter__(self) -> Self:
        """Hold the job."""
        with self._stack:
            self._stack.enter_context(self._work.session.transaction())
            self._held = self._work.hold("hold_for_workers") is not None
            for session in self._sessions:
                self._free.put(replace(self._work, session=session))
            self._pool = self._stack.enter_context(ThreadPoolExecutor(self.size))
            self._stack.push(self._cancel)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        """Let the job go; after an error also what the sessions are doing."""
        self._stack.__exit__(*error)  # type: ignore[arg-type]  # what a with statement passes

    def start(self, span: Range) -> None:
        """Let a session that is free refresh a range."""
        self._under_way.add(self._pool.submit(self._refresh, span))

    def finished(self) -> Chunk | None:
        """Wait for a range that is done."""
        while True:
            done, _ = wait(self._under_way, timeout=HEARTBEAT_SECONDS, return_when=FIRST_COMPLETED)
            for future in done:
                self._under_way.remove(future)
                return future.result()
            # The server ends a transaction whose client is silent for long; ours only waits.
            self._work.run("hold_for_workers")

    def _refresh(self, span: Range) -> Chunk | None:
        if not self._held:
            return None
        work = self._free.get()
        try:
            return refresh_chunk(work, span, self._clock, self._log, hold="join_holder")
        finally:
            self._free.put(work)

    def _cancel(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            return
        for future in self._under_way:
            future.cancel()
        while True:
            for session in self._sessions:
                session.cancel()
            if not wait(self._under_way, timeout=CANCEL_SECONDS).not_done:
                return
