"""A terminal for tests: what a person sees, types and closes."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import termios
import threading
from contextlib import suppress


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, batchctl, *arguments, ignored=None):
        self.master, slave = pty.openpty()
        batchctl.environment = {"TERM": "xterm"}
        self.process = batchctl.start(
            *arguments,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: self._take(ignored),
        )
        os.close(slave)
        self.output = b""
        self._over = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _take(self, ignored):
        """Make it the terminal whose keys and end the session feels."""
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        if ignored:
            signal.signal(ignored, signal.SIG_IGN)

    def _read(self):
        # What would block in a read would keep the terminal from being closed.
        with suppress(OSError):
            while not self._over.is_set():
                if select.select([self.master], [], [], 0.05)[0]:
                    self.output += os.read(self.master, 4096)

    def hang_up(self):
        """Close the terminal, as a lost connection does; the kernel tells its session."""
        self._over.set()
        self._reader.join()
        os.close(self.master)

    def finish(self):
        """Wait for the end and return the exit code and what was shown."""
        code = self.process.wait(timeout=30)
        if not self._over.is_set():
            # With the last process on the other side the reading ends by itself.
            self._reader.join(10)
            self.hang_up()
        return code, self.output.decode()
