"""Standard output as it may be: a terminal, a pipe that nobody reads, a full disk, or closed."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_lost: list[str] = []


def on_terminal() -> bool:
    """Tell whether standard output is a terminal."""
    return sys.stdout is not None and sys.stdout.isatty()


def write(text: str) -> None:
    """Write to standard output at once; that it cannot be written never ends a command that has something to do."""
    if sys.stdout is None:
        _lose("it is closed")
        return
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # Who reads has enough.
        _discard()
    except OSError as error:
        _discard()
        _lose(error.strerror or type(error).__name__)


def lost() -> bool:
    """Tell whether something could not be printed; a reader that had enough does not count."""
    return bool(_lost)


def _lose(why: str) -> None:
    if not _lost and sys.stderr is not None:
        with suppress(OSError):
            sys.stderr.write(f"batchctl: standard output cannot be written: {why}\n")
    _lost.append(why)


@contextmanager
def harmless() -> Iterator[None]:
    """Draw in the block on a terminal that may be gone: what it is not shown changes nothing."""
    try:
        yield
    except OSError:
        _discard()


def _discard() -> None:
    # What is still buffered would fail once more when the interpreter ends, and change the exit code.
    descriptor = os.open(os.devnull, os.O_WRONLY)
    os.dup2(descriptor, sys.stdout.fileno())
    os.close(descriptor)
