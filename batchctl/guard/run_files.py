"""The files by which the kernel says what of a run is alive: where they are, and whether they are held.

Each run has a directory `state_dir/run/BATCH/RUN_ID`. Its `run.lock` is held by batchctl while that lives, each
`steps/ACCOUNT/STEP.ATTEMPT.lock` by what that attempt left running, and `ended` is there once the run ended by itself.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from batchctl.errors import ConfigurationError
from batchctl.paths import refuse_foreign

if TYPE_CHECKING:
    from pathlib import Path

RUN_LOCK, ENDED, STEPS, SUFFIX = "run.lock", "ended", "steps", ".lock"


class StepFile(NamedTuple):
    """The lock file of an attempt; without account and step if an earlier version made it for a whole run."""

    path: Path
    run_id: str
    account: str | None = None
    step: str | None = None


@dataclass(frozen=True)
class RunFiles:
    """What is on the disk for a run."""

    run_id: str
    path: Path

    @property
    def live(self) -> bool:
        """Tell whether the batchctl of the run is alive."""
        return held(self.path / RUN_LOCK)

    @property
    def witnessed(self) -> bool:
        """Tell whether the kernel can answer for the batchctl of the run."""
        return (self.path / RUN_LOCK).exists()

    @property
    def ended(self) -> bool:
        """Tell whether the run came to an end by itself."""
        return (self.path / ENDED).exists()

    def pid(self) -> int | None:
        """Return the process id that the batchctl of the run has signed with."""
        with suppress(OSError, ValueError):
            return int((self.path / RUN_LOCK).read_text(encoding="ascii").split()[0])
        return None

    def held_steps(self) -> list[StepFile]:
        """List the locks that something holds which an attempt left running."""
        if not self.path.is_dir():
            files = [StepFile(self.path, self.run_id)]
        else:
            files = [
                StepFile(path, self.run_id, account.name, path.name.removesuffix(SUFFIX).rpartition(".")[0])
                for account in sorted(_directories(self.path / STEPS))
                for path in sorted(account.glob(f"*{SUFFIX}"))
            ]
        return [file for file in files if held(file.path)]

    def remove(self) -> None:
        """Remove the files that we know, and follow no link; what cannot be removed stays and does no harm."""
        with suppress(OSError):
            if not self.path.is_dir():
                self.path.unlink()
                return
            for account in _directories(self.path / STEPS):
                for lock in account.glob(f"*{SUFFIX}"):
                    lock.unlink()
                account.rmdir()
            for name in (RUN_LOCK, ENDED):
                (self.path / name).unlink(missing_ok=True)
            for directory in (self.path / STEPS, self.path):
                if directory.exists():
                    directory.rmdir()


def _directories(path: Path) -> list[Path]:
    if path.is_symlink() or not path.is_dir():
        return []
    return [entry for entry in path.iterdir() if entry.is_dir() and not entry.is_symlink()]


def batch_directory(state_dir: Path, batch: str) -> Path:
    """Name the directory with an entry for each run that lives or may have left something."""
    return state_dir / "run" / batch


def known_runs(state_dir: Path, batch: str) -> list[RunFiles]:
    """List the runs of a batch that live or may have left something, by their files alone."""
    directory = batch_directory(state_dir, batch)
    try:
        for part in (directory.parent, directory):
            refuse_foreign(part, "directory")
        found = sorted(directory.iterdir())
        for path in found:
            with suppress(FileNotFoundError):  # a run that has just ended
                refuse_foreign(path, "file" if path.suffix == SUFFIX else "directory")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigurationError(
            f"{directory} cannot be read: {error.strerror}; run batchctl as the owner of state_dir"
        ) from error
    # A file for a whole run is what earlier versions made.
    return [RunFiles(path.name.removesuffix(SUFFIX), path) for path in found if path.is_dir() or path.suffix == SUFFIX]


def held(path: Path) -> bool:
    """Ask the kernel whether anybody holds a lock.

    Raises:
        ConfigurationError: the file is there, but the kernel does not answer.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise ConfigurationError(
            f"{path} cannot be read: {error.strerror}; run batchctl as the owner of state_dir"
        ) from error
    try:
        # Shared, so that two who ask at the same instant do not take each other for a holder.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        raise ConfigurationError(
            f"{path} cannot be locked: {error.strerror}; put state_dir on a local file system"
        ) from error
    finally:
        os.close(descriptor)
    return False
