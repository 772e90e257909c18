"""The second guard: what an earlier run left alive. Looking never kills."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from batchctl.guard.identity import ProcessIdentity, alive, ancestors, describe, running
from batchctl.guard.run_files import known_runs

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from batchctl.guard.identity import Running
    from batchctl.guard.run_files import StepFile

RUN_MARKER, ACCOUNT_MARKER, STEP_MARKER = "BATCHCTL_RUN_ID", "BATCHCTL_ACCOUNT", "BATCHCTL_STEP"
"""The variables by which a process is known to belong to a run, and to one of its steps."""
SUPERVISOR = "batchctl"
"""What stands for the command where the process is the batchctl of a run."""


class Recorded(NamedTuple):
    """A process that an unfinished run of this host wrote down; without a step it is batchctl itself."""

    run_id: str
    process: ProcessIdentity
    account: str | None
    step: str | None


def recorded_processes(rows: Iterable[Any]) -> list[Recorded]:
    """Read the processes that unfinished runs wrote down, from the rows in which the database lists them."""
    return [
        Recorded(row.run_id, ProcessIdentity(row.pid, row.pid_start_ticks, row.boot_id), row.account, row.step)
        for row in rows
    ]


class Orphan(NamedTuple):
    """A process that an earlier run left alive.

    Args:
        run_id: The run.
        pid: None if only its lock is seen.
        account: None if that is not known, as the step.
        step: None also for the batchctl of a run.
        command: Name of the program; None if it is hidden.
        run_ended: True if the run came to an end by itself, so that this was left on purpose; False if it died, or
            could not end this.
        start_ticks: Tells the process from a later one of the same number; 0 if that is not known.
        user: Whose it is; None if that is not known.
    """

    run_id: str
    pid: int | None
    account: str | None
    step: str | None
    command: str | None
    run_ended: bool = False
    start_ticks: int = 0
    user: str | None = None

    @property
    def supervisor(self) -> bool:
        """Tell whether this is the batchctl of a run, which then lives."""
        return self.step is None and self.command == SUPERVISOR

    @property
    def what(self) -> str:
        """Say it for people."""
        step = None if self.step is None else f"step {self.step} of account {self.account}"
        command = self.command or "a process that /proc hides"
        return command if step is None else f"{step}: {command}"


class Trace(NamedTuple):
    """A running process that belongs to a run, by its environment or by a lock that it holds."""

    process: Running
    run_id: str
    account: str | None
    step: str | None


def find_orphans(state_dir: Path, batch: str, recorded: Iterable[Recorded]) -> list[Orphan]:
    """List what earlier runs of a batch left alive on this host.

    Three witnesses: the locks that the kernel keeps for batchctl and for each step, the run's id in the environment of
    processes, and recorded process ids. A process that /proc hides counts only while a lock is held; our own ancestors
    never count, except a batchctl whose run lives.

    Args:
        state_dir: The state directory.
        batch: Name of the batch.
        recorded: Processes of runs of this host that have no outcome yet.

    Raises:
        ConfigurationError: the state directory cannot be read.
    """
    recorded = tuple(recorded)
    runs = {run.run_id: run for run in known_runs(state_dir, batch)}
    ended = {run.run_id for run in runs.values() if run.ended}
    if not runs and not recorded:
        return []
    ourselves = ancestors()
    locks = [lock for run in runs.values() for lock in run.held_steps()]
    locked_runs = {lock.run_id for lock in locks}
    found: dict[int, Orphan] = {}
    explained = set()
    lives = [Orphan(run.run_id, run.pid(), None, None, SUPERVISOR) for run in runs.values() if run.live]
    for run_id, process, account, step in recorded:
        if step is None and run_id in runs and runs[run_id].witnessed:
            continue  # the kernel has answered for it
        if process.pid in ourselves or not alive(process, hidden_counts=run_id in locked_runs):
            continue
        shown = describe(process.pid)
        command = SUPERVISOR if step is None else shown.command
        found[process.pid] = Orphan(
            run_id, process.pid, account, step, command, run_id in ended, process.start_ticks, shown.user
        )
    for trace in traces({*runs, *(record.run_id for record in recorded)}, locks):
        explained.add((trace.run_id, trace.account, trace.step))
        if trace.process.pid not in ourselves and trace.process.pid not in found:
            found[trace.process.pid] = as_orphan(trace, run_ended=trace.run_id in ended)
    explained |= {(orphan.run_id, orphan.account, orphan.step) for orphan in found.values()}
    whole = {run_id for run_id, _, _ in explained}
    hidden = [
        Orphan(lock.run_id, None, lock.account, lock.step, None, lock.run_id in ended)
        for lock in locks
        if (lock.run_id not in whole if lock.step is None else lock[1:] not in explained)
    ]
    return [*lives, *sorted(found.values(), key=lambda orphan: orphan.pid or 0), *hidden]


def forget_runs(state_dir: Path, batch: str, kept: Collection[str]) -> None:
    """Remove the files of runs that left nothing; only for whoever holds the lock of the batch.

    Args:
        state_dir: The state directory.
        batch: Name of the batch.
        kept: Runs that left something.
    """
    for run in known_runs(state_dir, batch):
        if run.run_id not in kept and not run.live and not run.held_steps():
            run.remove()


def traces(run_ids: Collection[str], locks: Collection[StepFile] = ()) -> list[Trace]:
    """List running processes that carry the id of one of these runs, or hold one of these locks."""
    by_name: dict[str, list[StepFile]] = {}
    for lock in locks:
        by_name.setdefault(lock.path.name, []).append(lock)
    found = []
    for process in running():
        # Processes come and go, and those of other users do not show themselves.
        with suppress(OSError):
            trace = _marked(process, run_ids) or (_holding(process, by_name) if by_name else None)
            if trace is not None:
                found.append(trace)
    return found


def as_orphan(trace: Trace, *, run_ended: bool) -> Orphan:
    """Describe a process that is traced to a run."""
    pid, ticks = trace.process.pid, trace.process.start_ticks
    shown = describe(pid)
    return Orphan(trace.run_id, pid, trace.account, trace.step, shown.command, run_ended, ticks, shown.user)


def listed(orphans: Iterable[Orphan]) -> str:
    """Name processes for people."""
    return "; ".join(f"pid {orphan.pid or '?'}, {orphan.what}" for orphan in orphans)


def _marked(process: Running, run_ids: Collection[str]) -> Trace | None:
    environment = _environment(process.pid)
    run_id = environment.get(RUN_MARKER)
    if run_id is None or run_id not in run_ids:
        return None
    return Trace(process, run_id, environment.get(ACCOUNT_MARKER), environment.get(STEP_MARKER))


def _environment(pid: int) -> dict[str, str]:
    # Read as one of bytes, because a program may have put anything there.
    try:
        content = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return {}
    if RUN_MARKER.encode() not in content:
        return {}
    pairs = (os.fsdecode(entry).partition("=") for entry in content.split(b"\0"))
    return {name: value for name, _, value in pairs}


def _holding(process: Running, by_name: dict[str, list[StepFile]]) -> Trace | None:
    for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
        with suppress(OSError):
            # The name first: asking for more could wait for ever on a network mount that is dead.
            for lock in by_name.get(descriptor.readlink().name, ()):
                if os.path.samestat(descriptor.stat(), lock.path.stat()):
                    return Trace(process, *lock[1:])
    return None
