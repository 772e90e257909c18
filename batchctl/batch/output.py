"""Keeps the output of steps below its cap: head and tail stay, the middle goes, while the step goes on writing."""

from __future__ import annotations

import os
import re
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import logging
    from pathlib import Path

    from batchctl.config import Size

NOTICE = re.compile(rb"\n?\[batchctl: (\d+) bytes were cut here\]\n")
NOTICE_ROOM = 100
"""More bytes than a notice has, whatever the number in it."""
LINE_ROOM = 4096
"""How far to look for the end of a line; a longer one is cut inside."""
CHUNK = 1 << 20
MOST_ROUNDS = 20
"""How often to go after what is written meanwhile, before a faster writer wins."""


class OutputCap:
    """The logs of the steps that run now, and the cap for each.

    Args:
        cap: Bytes that a log may have; 0 for no cap.
        log: Where a log that cannot be cut is named.
    """

    def __init__(self, cap: Size, log: logging.Logger) -> None:
        self._cap = cap
        self._log = log
        self._paths: set[Path] = set()
        self._guard = threading.Lock()

    def register(self, path: Path) -> None:
        """Watch a log from now on."""
        if self._cap:
            with self._guard:
                self._paths.add(path)

    def check(self) -> None:
        """Cut what is over the cap, with room left for what comes; cheap where nothing is."""
        with self._guard:
            for path in self._paths:
                self._cut(path, self._cap // 4)

    def finish(self, path: Path) -> None:
        """Cut a log that nothing more is expected in, to as much as the cap allows."""
        with self._guard:
            if path in self._paths:
                self._paths.remove(path)
                self._cut(path, self._cap)

    def _cut(self, path: Path, tail: int) -> None:
        try:
            cut(path, self._cap, tail)
        except FileNotFoundError:
            return  # removed meanwhile, so nothing is over
        except OSError as error:
            # A log is a side channel: it never ends a step.
            self._log.warning("%s is over output_cap and cannot be cut: %s", path, error.strerror)


def cut(path: Path, cap: int, tail: int) -> bool:
    """Cut a file that is over its cap to its first half cap, a line that says how much is gone, and its end.

    Whoever writes to the file has to append (O_APPEND). What is written while this copies is kept too, except what
    comes in the moment between the last look at the size and the cut. Bytes are never decoded.

    Args:
        path: The file.
        cap: Bytes that it may have.
        tail: Bytes to keep of the end, at most; less if the cap allows less.

    Returns:
        Whether it was over.
    """
    if path.stat().st_size <= cap:
        return False
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    try:
        _cut(descriptor, cap, tail)
    finally:
        os.close(descriptor)
    return True


def _cut(descriptor: int, cap: int, tail: int) -> None:
    size = os.fstat(descriptor).st_size
    head = _head(descriptor, cap // 2)
    before, gone = _earlier_cut(descriptor, head)
    tail = max(min(tail, cap - head - NOTICE_ROOM), 0)
    # What an earlier cut has kept starts behind its notice.
    begin = _line_start(descriptor, max(size - tail, before), size)
    ends_line = head == 0 or os.pread(descriptor, 1, head - 1) == b"\n"
    notice = f"{'' if ends_line else chr(10)}[batchctl: {gone + begin - before} bytes were cut here]\n".encode()
    if begin < head + len(notice):
        return  # nothing would be gained
    os.pwrite(descriptor, notice, head)
    target = head + len(notice)
    for _ in range(MOST_ROUNDS):
        target = _copy(descriptor, begin, size, target)
        begin, size = size, os.fstat(descriptor).st_size
        if begin >= size:
            break
    os.ftruncate(descriptor, target)


def _head(descriptor: int, most: int) -> int:
    """Return where the head ends: behind the last line that fits; the same each time, because it stays as it is."""
    room = min(LINE_ROOM, most)
    end = os.pread(descriptor, room, most - room).rfind(b"\n")
    return most if end < 0 else most - room + end + 1


def _earlier_cut(descriptor: int, head: int) -> tuple[int, int]:
    """Return where the content goes on behind the head, and how much an earlier cut has taken out there."""
    found = NOTICE.match(os.pread(descriptor, NOTICE_ROOM, head))
    return (head, 0) if found is None else (head + found.end(), int(found[1]))


def _line_start(descriptor: int, place: int, size: int) -> int:
    """Return where the next line begins, or the place itself in the middle of a long one or of the last."""
    end = os.pread(descriptor, LINE_ROOM, place - 1).find(b"\n")
    return place if end < 0 or place + end >= size else place + end


def _copy(descriptor: int, begin: int, end: int, target: int) -> int:
    """Move bytes towards the beginning of the file; return where the copy ends."""
    while begin < end:
        chunk = os.pread(descriptor, min(CHUNK, end - begin), begin)
        if not chunk:
            break
        os.pwrite(descriptor, chunk, target)
        begin += len(chunk)
        target += len(chunk)
    return target
