"""Ends processes: politely, then hard; never one that has taken over a number."""

from __future__ import annotations

import os
import select
import signal
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from batchctl.guard.identity import START_TICKS, STATE, ancestors, running, start_ticks, stat_fields

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from batchctl.clock import Clock
    from batchctl.guard.identity import ProcessIdentity, Running

KILLED_SECONDS = 5.0
"""How long the kernel may take to end a killed process before we go on without it (a dead network mount)."""
LOOK_SECONDS = 0.2
"""How long to wait for processes before looking for a reason to wait no longer."""
POLL_SECONDS = 0.05
MOST_DESCRIPTORS = 64
"""How many processes are waited for at a time: descriptors are few."""


def with_descendants(processes: Collection[tuple[int | None, int]]) -> set[Running]:
    """Return those processes that still run, what is in their sessions, and what is below them; never ourselves.

    A session is inherited or made, never joined: whatever is in a step's session, or in one that a descendant of the
    step made, descends from the step.

    Args:
        processes: Process ids, each with its start in kernel ticks.
    """
    ourselves = ancestors()
    everything = [process for process in running() if process.pid not in ourselves]
    found = {process for process in everything if (process.pid, process.start_ticks) in processes}
    while True:
        # The number 0 stands for every session that was made outside of a container.
        sessions = {process.session for process in found} - {0}
        parents = {process.pid for process in found}
        more = {process for process in everything if process.session in sessions or process.parent in parents} - found
        if not more:
            return found
        found |= more


def end_processes(
    find: Callable[[], Iterable[Running]],
    grace: float,
    clock: Clock,
    *,
    group: int | None = None,
    hurried: Callable[[], bool] = lambda: False,
) -> set[Running]:
    """Send SIGTERM, wait, send SIGKILL, and look again until nothing is left; return what is left all the same.

    Args:
        find: Looks for the processes. What was found once is ended even if a later look misses it.
        grace: Seconds between the signals.
        clock: Measures.
        group: A process group that is known to be theirs. It is signalled at once, so that a process that forks
            meanwhile cannot escape.
        hurried: Tells whether the grace is to be cut short.
    """
    found: set[Running] = set()

    def look() -> set[Running]:
        found.update(find())
        return {process for process in found if _runs(process)}

    give_up = clock.monotonic() + grace
    _signal(look(), signal.SIGTERM, group)
    # Only once: what a process does in its grace, such as to start a command that cleans up, is its own business.
    # All processes are looked through only when those that are known have gone: a grace may last for hours.
    while clock.monotonic() < give_up and not hurried() and (left := {each for each in found if _runs(each)} or look()):
        wait_gone(left, min(LOOK_SECONDS, give_up - clock.monotonic()), clock)
    give_up = clock.monotonic() + KILLED_SECONDS
    while (left := look()) and clock.monotonic() < give_up:
        _signal(left, signal.SIGKILL, group)
        wait_gone(left, LOOK_SECONDS, clock)
    return left


def wait_gone(processes: Iterable[Running], seconds: float, clock: Clock) -> None:
    """Wait until none of them runs any more, or the time is over."""
    give_up = clock.monotonic() + seconds
    left = [process for process in processes if _runs(process)]
    while left and clock.monotonic() < give_up:
        _wait_for_one(left[:MOST_DESCRIPTORS], give_up - clock.monotonic(), clock)
        left = [process for process in left if _runs(process)]


def _wait_for_one(processes: list[Running], seconds: float, clock: Clock) -> None:
    poll = select.poll()
    with ExitStack() as stack:
        try:
            for process in processes:
                descriptor = os.pidfd_open(process.pid)
                stack.callback(os.close, descriptor)
                poll.register(descriptor, select.POLLIN)
        except ProcessLookupError:
            return
        except (OSError, AttributeError):
            # An old kernel, a filter of system calls, or no descriptor left.
            clock.sleep(min(POLL_SECONDS, seconds))
            return
        poll.poll(max(seconds, 0) * 1000)


def send(process: Running | ProcessIdentity, number: int) -> None:
    """Send a signal to that very process, and to no other that has its number by now.

    Raises:
        PermissionError: it is another user's.
    """
    with suppress(ProcessLookupError):
        try:
            descriptor = os.pidfd_open(process.pid)
        except ProcessLookupError:
            raise
        except (OSError, AttributeError):
            # Without such a descriptor a moment remains in which the number may change hands.
            if start_ticks(process.pid) == process.start_ticks:
                os.kill(process.pid, number)
            return
        try:
            # The number may have changed hands before the descriptor was opened, not after.
            if start_ticks(process.pid) == process.start_ticks:
                signal.pidfd_send_signal(descriptor, number)
        finally:
            os.close(descriptor)


def _signal(processes: Iterable[Running], number: int, group: int | None) -> None:
    if group is not None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(group, number)
    for process in processes:
        if process.process_group != group:
            # Another user's; whoever asked is told that it is left.
            with suppress(PermissionError):
                send(process, number)


def _runs(process: Running) -> bool:
    fields = stat_fields(process.pid)
    return fields is not None and fields[STATE] not in "ZX" and int(fields[START_TICKS]) == process.start_ticks
