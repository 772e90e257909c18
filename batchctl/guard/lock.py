"""The first guard: a file lock that the kernel frees, and who holds it."""

from __future__ import annotations

import os
from datetime import datetime  # noqa: TC003 - msgspec reads the annotations
from typing import TYPE_CHECKING, Self

import filelock
import msgspec

from batchctl.errors import ConfigurationError
from batchctl.guard.identity import ProcessIdentity, alive
from batchctl.guard.run_files import held
from batchctl.paths import private_directory, refuse_foreign

if TYPE_CHECKING:
    from pathlib import Path

    from batchctl.clock import Clock

MOST_TRIES = 10
"""How often a start takes the lock again whose file was removed under its hands."""
HOLDER_PATIENCE_SECONDS = 2.0
"""How long a start that was refused waits for the holder, which may just have won, to write its name."""


class Holder(msgspec.Struct, frozen=True):
    """The process that holds a lock; `looking` names a command that does not do the job's work, and is soon gone."""

    hostname: str
    pid: int
    start_ticks: int
    boot_id: str
    started_at: datetime
    looking: str | None = None

    @property
    def identity(self) -> ProcessIdentity:
        return ProcessIdentity(self.pid, self.start_ticks, self.boot_id)


class HeldLock:
    """A lock that is ours until it is released or the process ends, however it ends."""

    def __init__(self, lock: filelock.BaseFileLock, descriptor: int) -> None:
        self._lock = lock
        self.descriptor = descriptor

    def release(self) -> None:
        """Free the lock; the file stays, because two starts that lock two files of one name would both win."""
        os.ftruncate(self.descriptor, 0)
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


def lock_path(state_dir: Path, job: str) -> Path:
    """Name the lock file of a batch (batch.daily) or of a rollup's grain (rollup.trend.1m)."""
    return state_dir / "lock" / f"{job}.lock"


def acquire(path: Path, holder: Holder) -> HeldLock | None:
    """Take the lock at once or not at all.

    Args:
        path: The lock file, in the state directory.
        holder: Who is asking; written into the file for the starts that are refused.

    Raises:
        ConfigurationError: the path is not a private file, or its file system has no locks.
    """
    private_directory(path.parent.parent)
    private_directory(path.parent)
    if path.is_symlink() or path.exists():
        refuse_foreign(path, "file")
    for _ in range(MOST_TRIES):
        taken = _take(path, holder)
        if taken is not None and _is_at(path, taken.descriptor):
            return taken
        if taken is None and held(path):
            return None
        # Somebody removed or replaced the file just then: a lock on it would keep nobody out.
        if taken is not None:
            taken.release()
    raise ConfigurationError(f"{path} is removed again and again while it is being locked; keep cleaners out of it")


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _take(path: Path, holder: Holder) -> HeldLock | None:
    descriptors: list[int] = []

    def sign(descriptor: int) -> None:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, msgspec.json.encode(holder), 0)
        descriptors.append(descriptor)

    lock = filelock.FileLock(
        path,
        timeout=0,
        mode=0o600,
        # The lock belongs to the process: it is released by whichever thread ends the run.
        thread_local=False,
        # A marker file instead of a kernel lock would survive a crash and block the job for ever.
        fallback_to_soft=False,
        preserve_lock_file=True,
        on_acquired=sign,
    )
    try:
        lock.acquire()
    except filelock.Timeout:
        return None
    except (OSError, NotImplementedError) as error:
        raise ConfigurationError(
            f"{path} cannot be locked: {error}; put state_dir on a local file system that its user can write"
        ) from error
    return HeldLock(lock, descriptors[0])


def read_holder(path: Path, clock: Clock, patience: float = HOLDER_PATIENCE_SECONDS) -> Holder | None:
    """Say who holds a lock; never name an earlier holder.

    Args:
        path: The lock file.
        clock: Counts the patience.
        patience: Seconds to wait for a holder that has not signed yet.

    Returns:
        None if nobody alive has signed.

    Raises:
        ConfigurationError: the file may not be read.
    """
    give_up = clock.monotonic() + patience
    while True:
        try:
            holder = msgspec.json.decode(path.read_bytes(), type=Holder)
        except (FileNotFoundError, NotADirectoryError, msgspec.DecodeError):
            holder = None  # nobody yet, or just being written
        except OSError as error:
            # Who may not read it must not take what runs for idle.
            raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from error
        # What a crash left behind names a process that is gone; the kernel knows that the lock itself is held.
        if holder is not None and alive(holder.identity, hidden_counts=True):
            return holder
        if clock.monotonic() >= give_up:
            return None
        clock.sleep(0.01)
