"""One child: its own session, its output file, its timeout, TERM then KILL then a sweep, and how it ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from batchctl.guard.identity import PROCESS_GROUP, session_members, start_ticks, stat_fields
from batchctl.guard.liveness import RUN_MARKER, marked_processes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from batchctl.batch.interruption import Interruption
    from batchctl.clock import Clock

KILLED_SECONDS = 5.0
"""How long the kernel may take to end a killed process before the run goes on without it (a dead network mount)."""
POLL_SECONDS = 0.05
COMMAND_NOT_FOUND, COMMAND_NOT_EXECUTABLE = 127, 126
"""What a shell returns in the same cases."""


@dataclass(frozen=True)
class Ending:
    """How a child ended: outcome, and exit code, signal and reason kept apart."""

    outcome: str
    exit_code: int | None = None
    signal: int | None = None
    reason: str | None = None


def interpret(returncode: int | None, ended_by: str | None, reason: str | None = None) -> Ending:
    """Decide what the end of a child means.

    Args:
        returncode: As subprocess has it: negative for a signal; None if the child could not be ended.
        ended_by: "timeout" or "stopped" if batchctl ended it, None if it ended by itself.
        reason: What made batchctl end it, in words.
    """
    exit_code = returncode if returncode is not None and returncode >= 0 else None
    number = -returncode if returncode is not None and returncode < 0 else None
    if ended_by is not None:
        return Ending(ended_by, exit_code, number, reason)
    if returncode == 0:
        return Ending("success", 0)
    if number is not None:
        return Ending("failed", None, number, f"killed by signal {number} ({_signal_name(number)})")
    return Ending("failed", exit_code, None, f"exit code {exit_code}")


@dataclass(frozen=True)
class Command:
    """What to start.

    Args:
        arguments: Program and arguments, never a shell line.
        directory: Where to start it.
        environment: Its whole environment, with the run's marker.
        log: File that its output is appended to.
        inherited: Descriptor that it and its children keep open (the run's lock).
    """

    arguments: Sequence[str]
    directory: Path
    environment: Mapping[str, str]
    log: Path
    inherited: int


class Child:
    """A running command in a session of its own."""

    def __init__(self, command: Command, interruption: Interruption) -> None:
        self._interruption = interruption
        self._marker = {name: command.environment[name] for name in (RUN_MARKER, "BATCHCTL_ACCOUNT", "BATCHCTL_STEP")}
        descriptor = os.open(command.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
        try:
            # A file, never a pipe: whatever the command leaves running could hold a pipe open for ever.
            self._popen = subprocess.Popen(
                command.arguments,
                cwd=command.directory,
                env=command.environment,
                stdin=subprocess.DEVNULL,
                stdout=descriptor,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(command.inherited,),
            )
        finally:
            os.close(descriptor)
        self.pid = self._popen.pid
        self.start_ticks = start_ticks(self.pid)
        self._exited = False
        # One blocked thread costs nothing while the command runs, and works on every kernel.
        threading.Thread(target=self._reap, daemon=True, name=f"wait {self.pid}").start()

    def _reap(self) -> None:
        self._popen.wait()
        with self._interruption.condition:
            self._exited = True
            self._interruption.condition.notify_all()

    def wait(self, until: float, clock: Clock, *, seen: int = 0) -> bool:
        """Wait for the exit, the time, or a request to end beyond those seen; return whether the command exited."""
        interruption = self._interruption
        with interruption.condition:
            interruption.condition.wait_for(
                # Looked at again by the heartbeat, since waiting stands still in a suspended machine.
                lambda: self._exited or interruption.count > seen or clock.monotonic() >= until,
                max(until - clock.monotonic(), 0),
            )
            return self._exited

    @property
    def returncode(self) -> int | None:
        return self._popen.returncode

    def survivors(self) -> list[int]:
        """List what still runs in the command's session."""
        return session_members(self.pid)

    def end(self, grace: float, clock: Clock) -> None:
        """End the session: SIGTERM, grace, SIGKILL, then a sweep for descendants that left it.

        A second request to end cuts the grace short.
        """
        give_up = clock.monotonic() + grace
        seen = max(self._interruption.count, 1)
        self._signal_session(signal.SIGTERM)
        self.wait(give_up, clock, seen=seen)
        while self.survivors() and clock.monotonic() < give_up and self._interruption.count <= seen:
            clock.sleep(POLL_SECONDS)
        self._kill(clock)
        self._sweep()
        # Only an exit ends this wait: requests to end have had their effect.
        self.wait(clock.monotonic() + KILLED_SECONDS, clock, seen=sys.maxsize)

    def _signal_session(self, number: int) -> None:
        survivors = self.survivors()
        if not survivors:
            return  # nobody holds the session's number any more, so it may already be another's
        with suppress(ProcessLookupError, PermissionError):
            # The group at once, so that a process that forks meanwhile cannot escape.
            os.killpg(self.pid, number)
        for pid in survivors:
            fields = stat_fields(pid)
            if fields and int(fields[PROCESS_GROUP]) != self.pid:
                _send(pid, number)

    def _kill(self, clock: Clock) -> None:
        give_up = clock.monotonic() + KILLED_SECONDS
        self._signal_session(signal.SIGKILL)
        while self.survivors() and clock.monotonic() < give_up:
            clock.sleep(POLL_SECONDS)
            self._signal_session(signal.SIGKILL)

    def _sweep(self) -> None:
        run_id = self._marker[RUN_MARKER]
        what = f"step {self._marker['BATCHCTL_STEP']} of account {self._marker['BATCHCTL_ACCOUNT']}:"
        for pid, _, found in marked_processes([run_id]):
            if found.startswith(what):
                _send(pid, signal.SIGKILL)


def run_child(
    command: Command,
    *,
    timeouts: Sequence[tuple[float, str]],
    grace: float,
    interruption: Interruption,
    clock: Clock,
    started: Callable[[Child], None],
) -> Ending:
    """Start a command, wait for it, end it when its time is over or the run is to stop.

    Args:
        command: What to start.
        timeouts: Seconds with what they are the timeout of, in words; the first to pass counts.
        grace: Seconds between SIGTERM and SIGKILL.
        interruption: Seen while waiting.
        clock: Measures.
        started: Called once the process exists.
    """
    try:
        child = Child(command, interruption)
    except (OSError, ValueError) as error:
        name = command.arguments[0]
        codes: dict[type[Exception], int] = {
            FileNotFoundError: COMMAND_NOT_FOUND,
            PermissionError: COMMAND_NOT_EXECUTABLE,
        }
        return Ending(
            "failed", codes.get(type(error)), None, f"cannot start {name!r}: {getattr(error, 'strerror', error)}"
        )
    began = clock.monotonic()
    started(child)
    seconds, what = min(timeouts)
    if child.wait(began + seconds, clock):
        return interpret(child.returncode, None)
    if interruption.count:
        ended_by, reason = "stopped", interruption.reason
    else:
        ended_by, reason = "timeout", what
    child.end(grace, clock)
    return interpret(child.returncode, ended_by, reason)


def _send(pid: int, number: int) -> None:
    # It may have just gone, or changed its user; in the second case the next start will name it.
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"
