"""The second guard: what an earlier run left alive. Looking never kills."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from batchctl.errors import ConfigurationError
from batchctl.guard.identity import ProcessIdentity, alive, ancestors
from batchctl.paths import private_directory

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

RUN_MARKER = "BATCHCTL_RUN_ID"
"""The variable by which a process is known to belong to a run."""


class Recorded(NamedTuple):
    """A process that an unfinished run of this host wrote down."""

    run_id: str
    what: str
    process: ProcessIdentity


class Orphan(NamedTuple):
    """A process that an earlier run left alive; without an id if only its lock is seen."""

    run_id: str
    pid: int | None
    what: str


class RunLock:
    """A lock that every step of a run inherits, so that the kernel knows when the last of them is gone."""

    def __init__(self, state_dir: Path, batch: str, run_id: str) -> None:
        directory = private_directory(run_directory(state_dir, batch))
        self.path = directory / f"{run_id}.lock"
        try:
            self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigurationError(f"{self.path} cannot be made and locked: {error.strerror}") from error

    def release(self) -> bool:
        """Give up our share of the lock; return whether a step left something running that still holds it."""
        os.close(self.descriptor)
        if _held(self.path):
            return True
        self.path.unlink(missing_ok=True)
        return False


def run_directory(state_dir: Path, batch: str) -> Path:
    """Name the directory with a lock file for each run that may have left something."""
    return state_dir / "run" / batch


def find_orphans(state_dir: Path, batch: str, recorded: Iterable[Recorded]) -> list[Orphan]:
    """List what earlier runs of a batch left alive on this host.

    Three witnesses: the lock that steps inherit, the run's id in the environment of processes, and recorded process
    ids. A process that /proc hides counts only while the lock is held; our own ancestors never count.

    Args:
        state_dir: The state directory.
        batch: Name of the batch.
        recorded: Processes of runs of this host that have no outcome yet.
    """
    directory = run_directory(state_dir, batch)
    lock_files = {path.stem: path for path in directory.glob("*.lock")} if directory.is_dir() else {}
    recorded = tuple(recorded)
    run_ids = {*lock_files, *(record.run_id for record in recorded)}
    if not run_ids:
        return []
    ourselves = ancestors()
    held = {run_id for run_id, path in lock_files.items() if _held(path)}
    found = {
        record.process.pid: Orphan(record.run_id, record.process.pid, record.what)
        for record in recorded
        if record.process.pid not in ourselves and alive(record.process, hidden_counts=record.run_id in held)
    }
    inherited = set()
    for pid, run_id, what in marked_processes(run_ids):
        if pid in ourselves:
            inherited.add(run_id)
        else:
            found.setdefault(pid, Orphan(run_id, pid, what))
    seen = {orphan.run_id for orphan in found.values()}
    hidden = [Orphan(run_id, None, "a process that /proc hides") for run_id in sorted(held - seen - inherited)]
    for run_id in lock_files.keys() - held - seen:
        lock_files[run_id].unlink(missing_ok=True)
    return [*sorted(found.values(), key=lambda orphan: orphan.pid or 0), *hidden]


def marked_processes(run_ids: Iterable[str]) -> list[tuple[int, str, str]]:
    """List running processes that carry the id of one of these runs: process id, run, what it is."""
    import psutil  # noqa: PLC0415 - its import costs, and most starts find nothing to look for

    wanted = set(run_ids)
    found = []
    for process in psutil.process_iter():
        # Processes come and go, and those of other users do not show their environment.
        with suppress(psutil.Error, OSError):
            environment = process.environ()
            run_id = environment.get(RUN_MARKER)
            if run_id in wanted and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
                step, account = environment.get("BATCHCTL_STEP", "?"), environment.get("BATCHCTL_ACCOUNT", "?")
                found.append((process.pid, run_id, f"step {step} of account {account}: {process.name()}"))
    return found


def _held(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
