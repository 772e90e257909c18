"""A limit to waiting that holds against a server that hangs."""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING, TypeVar, cast

from batchctl.errors import DatabaseUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable

Result = TypeVar("Result")


class GivenUpError(DatabaseUnavailableError):
    """Something took too long, and may still be going on in a thread."""

    def __init__(self, message: str, thread: threading.Thread) -> None:
        super().__init__(message)
        self.thread = thread


def within(seconds: float, action: Callable[[], Result]) -> Result:
    """Do something, but do not wait for it longer than that.

    The server's own time limits are of no use against a server that hangs, and a step or a skip must not hang with it.
    What is given up may still happen, so it has to be something that may be repeated.

    Raises:
        GivenUpError: it took longer.
        BatchctlError: what the action raised.
    """
    done: queue.SimpleQueue[tuple[Result | None, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            done.put((action(), None))
        except BaseException as error:  # noqa: BLE001 - raised again by whoever waits
            done.put((None, error))

    thread = threading.Thread(target=work, daemon=True, name="record")
    thread.start()
    try:
        result, error = done.get(timeout=seconds)
    except queue.Empty:
        raise GivenUpError(f"the database did not answer within {seconds:g}s", thread) from None
    if error is not None:
        raise error
    return cast("Result", result)
