"""Runs batchctl's own commands as a person would, and shows what they write."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import batchctl
from batchctl.errors import ExitCode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import FrameType

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
FOREIGN = re.compile("PG[A-Z]+|BATCHCTL_.*")


@dataclass(frozen=True)
class Ended:
    """What a command returned."""

    code: int
    result: Mapping[str, Any] = field(default_factory=dict)


class Interrupted(Exception):  # noqa: N818 - it is no error
    """The demo was asked to end while a command ran; the command has ended."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = ExitCode.SIGNAL + number


class Commands:
    """Runs commands on one configuration."""

    def __init__(self, configuration: Path, shown: Path, say: Callable[[str], None]) -> None:
        """Remember what for.

        Args:
            configuration: The file.
            shown: The same as a person would type it.
            say: Is told of each command and of each line that it writes to standard error.
        """
        self._configuration = configuration
        self._shown = shown
        self._say = say

    def line(self, *arguments: str) -> str:
        """Write a command as a person would type it."""
        return shlex.join(["batchctl", "--config", str(self._shown), *arguments])

    def run(self, *arguments: str) -> Ended:
        """Run a command to its end.

        Raises:
            Interrupted: a signal asked for the end.
        """
        self._say(f"$ {self.line(*arguments)}")
        # Without the working directory among the places of modules, unless batchctl itself is only found there.
        safe = [] if Path(batchctl.__file__).parents[1] == Path.cwd() else ["-P"]
        command = [sys.executable, *safe, "-m", "batchctl", "--config", str(self._configuration), *arguments]
        received: list[int] = []
        with tempfile.TemporaryFile() as output, _forwarded(received) as forward_to:
            # A group of its own: Ctrl-C reaches it once, through here.
            with subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.PIPE,
                encoding="utf-8",
                errors="replace",
                process_group=0,
            ) as child:
                forward_to(child)
                for line in child.stderr or ():
                    self._say(f"  {line.rstrip()}")
            output.seek(0)
            written = output.read()
        if received:
            raise Interrupted(received[0])
        code = child.returncode if child.returncode >= 0 else ExitCode.SIGNAL - child.returncode
        result = {}
        with suppress(ValueError):
            result = json.loads(written)
        return Ended(code, result)


@contextmanager
def own_settings() -> Iterator[None]:
    """Hide for the block what would lead batchctl or libpq to another configuration or database."""
    hidden = {name: os.environ.pop(name) for name in tuple(os.environ) if FOREIGN.fullmatch(name)}
    try:
        yield
    finally:
        os.environ.update(hidden)


@contextmanager
def _forwarded(received: list[int]) -> Iterator[Callable[[subprocess.Popen[str]], None]]:
    """Pass signals on to a child for the block and wait for its end, rather than leave it alone."""
    children: list[subprocess.Popen[str]] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        for child in children:
            child.send_signal(number)

    def forward_to(child: subprocess.Popen[str]) -> None:
        children.append(child)
        for number in received:
            child.send_signal(number)

    before = {
        number: signal.signal(number, forward) for number in FORWARDED if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield forward_to
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
