"""A backlog, worked off in chunks of a fitting size, newest first."""

from __future__ import annotations

from collections import deque
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from batchctl.rollup import queue
from batchctl.rollup.chunk import refresh_chunk
from batchctl.rollup.look import FEW_BUCKETS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from logging import Logger

    from batchctl.clock import Clock
    from batchctl.rollup.chunk import Chunk
    from batchctl.rollup.queue import Range
    from batchctl.rollup.work import Work

MOST_BUCKETS = 20_000
WANTED_ROWS = 400_000
WANTED_SECONDS = 4.0
"""A chunk of so many rows, or so many seconds, spreads the cost of a transaction; a budget of seconds is still kept,
and what a crash repeats is little."""
LARGEST_STEP = 4


class Crew(Protocol):
    """Who refreshes chunks."""

    size: int

    def start(self, span: Range) -> None:
        """Begin with a range; at most `size` are under way."""

    def finished(self) -> Chunk | None:
        """Wait for one that is done, and return what became of it; None if the job is held elsewhere."""


@dataclass
class Pace:
    """How many buckets the next chunk has, from what the last one took.

    Args:
        most: Never more than this.
    """

    most: int
    buckets: int = FEW_BUCKETS

    def __post_init__(self) -> None:
        self.buckets = min(self.buckets, self.most)

    def learn(self, chunk: Chunk) -> None:
        """Take a chunk that is done into account."""
        rows = max(chunk.source_rows, 1)
        wanted = len(chunk.buckets) * min(WANTED_ROWS / rows, WANTED_SECONDS / max(chunk.duration_seconds, 0.001))
        wanted = min(max(wanted, self.buckets / LARGEST_STEP), self.buckets * LARGEST_STEP)
        self.buckets = min(max(int(wanted), 1), self.most)


@dataclass(frozen=True)
class Chunks:
    """The chunks of one call as they are done, newest first.

    A chunk that fails is halved down to the bucket at fault, which stays queued; None stands for a job that somebody
    else holds, and is the last.

    Args:
        work: The grain, in the session that hands out ranges.
        crew: Who refreshes them.
        pace: How large they are.
        clock: Measures the deadline.
        deadline: When to start no further chunk, as `clock.monotonic()` counts; one is always done.
    """

    work: Work
    crew: Crew
    pace: Pace
    clock: Clock
    deadline: float

    def __iter__(self) -> Iterator[Chunk | None]:
        """Start ranges while there are some and time for them, and yield what became of each."""
        halves: list[Range] = []
        below: int | None = None
        under_way, any_done, exhausted = 0, False, False
        while True:
            while under_way < self.crew.size and not (any_done and self.clock.monotonic() >= self.deadline):
                span = halves.pop() if halves else None
                if span is None and not exhausted:
                    span = queue.pick(self.work, self.pace.buckets, below)
                    exhausted = span is None
                    below = span.low if span else below
                if span is None:
                    break
                self.crew.start(span)
                under_way += 1
            if not under_way:
                return
            chunk = self.crew.finished()
            under_way -= 1
            if chunk is None:
                yield None
                return
            if chunk.failure and len(chunk.buckets) > 1:
                halves += self._halves(chunk)
                continue
            if not chunk.buckets:
                continue
            any_done = True
            if not chunk.failure:
                self.pace.learn(chunk)
            yield chunk

    def _halves(self, chunk: Chunk) -> list[Range]:
        starts = [start for start, _ in chunk.buckets]
        middle = len(starts) // 2
        # The last is taken first: the newer half.
        return [queue.Range(part[0], part[-1], len(part)) for part in (starts[:middle], starts[middle:])]


class Alone(AbstractContextManager["Alone"]):
    """One chunk at a time, in the session of the call."""

    size = 1

    def __init__(self, work: Work, clock: Clock, log: Logger) -> None:
        self._work, self._clock, self._log = work, clock, log
        self._spans: deque[Range] = deque()

    def __exit__(self, *_: object) -> None:
        """Nothing is left to end."""

    def start(self, span: Range) -> None:
        """Note a range."""
        self._spans.append(span)

    def finished(self) -> Chunk | None:
        """Refresh the range that was noted."""
        return refresh_chunk(self._work, self._spans.popleft(), self._clock, self._log)
