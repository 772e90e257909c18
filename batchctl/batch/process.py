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

from batchctl.guard.ending import KILLED_SECONDS, end_processes, with_descendants
from batchctl.guard.identity import running, start_ticks
from batchctl.guard.liveness import traces

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from batchctl.batch.interruption import Interruption
    from batchctl.clock import Clock
    from batchctl.guard.identity import Running
    from batchctl.guard.run_locks import StepLock

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
        output: Descriptor of a file that its output goes to.
        lock: What it and its children keep open.
    """

    arguments: Sequence[str]
    directory: Path
    environment: Mapping[str, str]
    output: int
    lock: StepLock


class Child:
    """A running command in a session of its own."""

    def __init__(self, command: Command, interruption: Interruption) -> None:
        self._interruption = interruption
        self._lock = command.lock
        # A file, never a pipe: whatever the command leaves running could hold a pipe open for ever.
        self._popen = subprocess.Popen(
            command.arguments,
            cwd=command.directory,
            env=command.environment,
            stdin=subprocess.DEVNULL,
            stdout=command.output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(command.lock.descriptor,),
        )
        command.lock.hand_over()
        self.pid = self._popen.pid
        self.start_ticks = start_ticks(self.pid)
        self._exited = False
        self.failed = False
        # One blocked thread costs nothing while the command runs, and works on every kernel.
        threading.Thread(target=self._watch, daemon=True, name=f"wait {self.pid}").start()

    def _watch(self) -> None:
        # The process stays a zombie until `reap`, so nothing else can get its number while we may signal it.
        with suppress(ChildProcessError):
            ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
            self.failed = ended is not None and (ended.si_code, ended.si_status) != (os.CLD_EXITED, 0)
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

    def reap(self) -> int | None:
        """Free the command's number; return how it ended as subprocess has it, None if it could not be ended."""
        return self._popen.wait() if self._exited else None

    def members(self) -> set[Running]:
        """List what runs of the attempt, also what left its session or cleared its environment."""
        file = self._lock.file
        traced = {
            trace.process
            for trace in traces([file.run_id], [file])
            if (trace.account, trace.step) == (file.account, file.step)
        }
        session = {process for process in running() if process.session == self.pid}
        return with_descendants({(process.pid, process.start_ticks) for process in traced | session})

    def end(self, grace: float, clock: Clock) -> None:
        """End everything of the attempt: SIGTERM, grace, SIGKILL, until nothing is left.

        A second request to end cuts the grace short.
        """
        give_up = clock.monotonic() + grace
        end_processes(self.members, grace, clock, group=self.pid, hurried=lambda: self._interruption.count > 1)
        if not self._exited:
            # What /proc hides is not found; but the number of our own child is its own until it is reaped.
            self.wait(give_up, clock, seen=1)
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
        # Only an exit ends this wait: requests to end have had their effect.
        self.wait(clock.monotonic() + KILLED_SECONDS, clock, seen=sys.maxsize)


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
    try:
        started(child)
    except BaseException:
        # Nobody would wait for it.
        child.end(0, clock)
        child.reap()
        raise
    seconds, what = min(timeouts)
    if child.wait(began + seconds, clock):
        if child.failed:
            # What a failed attempt left is nothing that it meant to leave, and must not run beside the next attempt.
            child.end(grace, clock)
        return interpret(child.reap(), None)
    if interruption.count:
        ended_by, reason = "stopped", interruption.reason
    else:
        ended_by, reason = "timeout", what
    child.end(grace, clock)
    return interpret(child.reap(), ended_by, reason)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"
