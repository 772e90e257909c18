"""A signal ends what is under way in the database, not only the process that waits for it."""

from __future__ import annotations

import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from batchctl.errors import ExitCode

if TYPE_CHECKING:
    from collections.abc import Iterator


class Interrupted(KeyboardInterrupt):
    """A signal has come; the driver cancels the statement that it waits for, as for Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.name = signal.Signals(number).name
        self.exit_code = ExitCode.SIGNAL + number


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise Interrupted in the block on SIGINT, SIGTERM or SIGHUP; a second one ends the process at once.

    What was ignored (nohup) stays so. A client that just dies leaves its statement to the server, with all its locks.
    A terminal that closes may hang up more than once, which is no second wish.
    """
    numbers = [
        number
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is not signal.SIG_IGN
    ]

    def interrupt(number: int, _: object) -> NoReturn:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN if each == signal.SIGHUP else signal.SIG_DFL)
        raise Interrupted(number)

    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    except Interrupted:
        # The process is about to end; it need not be killed on its way.
        before.pop(signal.SIGHUP, None)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
