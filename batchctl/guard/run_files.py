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
                StepFile(path, self.run_id, path.parent.name, path.name.removesuffix(SUFFIX).rpartition(".")[0])
                for path in sorted((self.path / STEPS).glob(f"*/*{SUFFIX}"))
            ]
        return [file for file in files if held(file.path)]

    def remove(self) -> None:
        """Remove the files; what cannot be removed stays and does no harm."""
        # What lies deeper comes later in the list.
        inside = sorted(self.path.rglob("*"), reverse=True) if self.path.is_dir() else []
        with suppress(OSError):
            for path in (*inside, self.path):
                if path.is_dir():
                    path.rmdir()
                else:
                    path.unlink()


def batch_directory(state_dir: Path, batch: str) -> Path:
    """Name the directory with an entry for each run that lives or may have left something."""
    return state_dir / "run" / batch


def known_runs(state_dir: Path, batch: str) -> list[RunFiles]:
    """List the runs of a batch that live or may have left something, by their files alone."""
    try:
        found = sorted(batch_directory(state_dir, batch).iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigurationError(f"{batch_directory(state_dir, batch)} cannot be read: {error.strerror}") from error
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
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from error
    try:
        # Shared, so that two who ask at the same instant do not take each other for a holder.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be locked: {error.strerror}") from error
    finally:
        os.close(descriptor)
    return False
