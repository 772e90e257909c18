"""The locks of a run of our own: batchctl's, and one for each attempt at a step."""

from __future__ import annotations

import fcntl
import itertools
import os
from contextlib import suppress
from typing import TYPE_CHECKING

from batchctl.errors import ConfigurationError
from batchctl.guard.ending import wait_gone
from batchctl.guard.identity import ancestors
from batchctl.guard.liveness import Orphan, Trace, as_orphan, traces
from batchctl.guard.run_files import ENDED, RUN_LOCK, STEPS, SUFFIX, RunFiles, StepFile, batch_directory, held
from batchctl.paths import private_directory

if TYPE_CHECKING:
    from pathlib import Path

    from batchctl.clock import Clock
    from batchctl.guard.identity import ProcessIdentity

LINGER_SECONDS = 0.5
"""How long what a step leaves running may take to end before it counts as left: the rest of a pipe, for instance."""
ASKED_SECONDS = 1.0
"""How long others who ask whether a lock is held may keep us from taking it."""


class StepLock:
    """A lock that the processes of an attempt inherit, so that the kernel knows when the last of them is gone."""

    def __init__(self, file: StepFile, descriptor: int) -> None:
        self.file = file
        self.descriptor = descriptor
        self._open = True

    def hand_over(self) -> None:
        """Give up our own share; only what the step starts has the lock from now on."""
        if self._open:
            self._open = False
            os.close(self.descriptor)

    def release(self) -> bool:
        """Give the lock up; return whether the attempt left something running that still holds it."""
        self.hand_over()
        # What nobody can say counts as held: a start that looks later can say it.
        with suppress(ConfigurationError):
            if not held(self.file.path):
                with suppress(OSError):
                    self.file.path.unlink()
                return False
        return True


class RunLocks:
    """The directory of a run: batchctl holds `run.lock` as long as it lives, steps hold theirs.

    Raises:
        ConfigurationError: the directory or the lock cannot be made.
    """

    def __init__(self, state_dir: Path, batch: str, run_id: str, process: ProcessIdentity, clock: Clock) -> None:
        directory = batch_directory(state_dir, batch)
        self._files = RunFiles(run_id, directory / run_id)
        self._new = not self._files.path.exists()
        for part in (directory.parent, directory, self._files.path):
            private_directory(part)
        self._clock = clock
        self._stepped = False
        self.unfinished = False
        """True once a step that batchctl ended is not gone: what it left was not left on purpose."""
        self._descriptor = self._take(self._files.path / RUN_LOCK)
        # For people, and for a start that finds the lock of the batch removed.
        with suppress(OSError):
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"{process.pid} {process.start_ticks} {process.boot_id}\n".encode(), 0)

    def step(self, account: str, step: str, attempt: int) -> StepLock:
        """Make the lock of an attempt.

        Raises:
            ConfigurationError: it cannot be made.
        """
        directory = private_directory(private_directory(self._files.path / STEPS) / account)
        if not self._stepped:
            self._stepped = True
            # The run goes on, so it has no end until the next one.
            with suppress(OSError):
                (self._files.path / ENDED).unlink()
        # An earlier part of a run that was resumed may have left something that holds the lock of the same attempt.
        for name in itertools.chain((f"{step}.{attempt}",), (f"{step}.{attempt}+{n}" for n in itertools.count(1))):
            path = directory / f"{name}{SUFFIX}"
            descriptor = _open_locked(path)
            if descriptor is not None:
                return StepLock(StepFile(path, self._files.run_id, account, step), descriptor)
        raise AssertionError  # the names never end

    def leftovers(self, account: str | None = None, step: str | None = None) -> list[Orphan]:
        """List what the run, or one of its steps, has left running, once what is about to end has ended."""
        found = self._look(account, step)
        if found:
            wait_gone([trace.process for trace in found], LINGER_SECONDS, self._clock)
            found = self._look(account, step)
        named = [as_orphan(trace, run_ended=True) for trace in found]
        seen = {(orphan.account, orphan.step) for orphan in named}
        hidden = [
            Orphan(lock.run_id, None, lock.account, lock.step, None, run_ended=True)
            for lock in self._held(account, step)
            if (lock.account, lock.step) not in seen
        ]
        return [*named, *hidden]

    def _look(self, account: str | None, step: str | None) -> list[Trace]:
        ourselves = ancestors()
        return [
            trace
            for trace in traces([self._files.run_id], self._held(account, step))
            if trace.process.pid not in ourselves and (step is None or (trace.account, trace.step) == (account, step))
        ]

    def _held(self, account: str | None, step: str | None) -> list[StepFile]:
        return [
            lock for lock in self._files.held_steps() if step is None or (lock.account, lock.step) == (account, step)
        ]

    def release(self) -> list[Orphan]:
        """End the run; return what it left running. Its directory goes if that is nothing."""
        try:
            if not self._stepped:
                # Nothing was started; what an earlier part of the run left is still for the next start to find.
                if self._new:
                    self._files.remove()
                return []
            try:
                left = self.leftovers()
            except ConfigurationError:
                return []  # the directory stays, and a start that looks later can say it
            if left and not self.unfinished:
                # Without it, what is left is taken for the unfinished work of a run that died.
                with suppress(OSError):
                    os.close(os.open(self._files.path / ENDED, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600))
            if not left:
                self._files.remove()
            return left
        finally:
            os.close(self._descriptor)

    def _take(self, path: Path) -> int:
        give_up = self._clock.monotonic() + ASKED_SECONDS
        while (descriptor := _open_locked(path)) is None:
            if self._clock.monotonic() > give_up:
                raise ConfigurationError(
                    f"{path} is held, so the batchctl of this run is alive; `batchctl status` shows it"
                )
            self._clock.sleep(0.01)
        return descriptor


def _open_locked(path: Path) -> int | None:
    """Open a lock file and take its lock; None if it is held."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise ConfigurationError(
            f"{path} cannot be made: {error.strerror}; make room, or choose another state_dir"
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError as error:
        os.close(descriptor)
        raise ConfigurationError(
            f"{path} cannot be locked: {error.strerror}; put state_dir on a local file system"
        ) from error
    return descriptor
