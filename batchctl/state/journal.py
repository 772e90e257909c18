"""What could not be recorded because the database was away: kept on disk, recorded once by the next command."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import msgspec

from batchctl.errors import ConfigurationError, DatabaseUnavailableError
from batchctl.paths import private_directory, refuse_foreign
from batchctl.state.driver_errors import WrongDataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from batchctl.clock import Clock
    from batchctl.state.database import Database

REPLAY_PATIENCE_SECONDS = 10.0
"""How long a command waits for another that is recording the journal: what is in it decides whether a start may be."""


class Entry(msgspec.Struct, frozen=True):
    """One record that the database has not seen: its name and values as Store.write takes them."""

    name: str
    values: dict[str, Any]


class Journal:
    """The journal of one database and schema on this host."""

    def __init__(self, state_dir: Path, database: Database, clock: Clock) -> None:
        # Another database must never be told what happened in this one.
        where = {key: database.parameters.get(key) for key in ("service", "host", "hostaddr", "port", "dbname")}
        if database.embedded:
            where = {"embedded": True}
        identity = hashlib.sha256(msgspec.json.encode([where, database.schema])).hexdigest()[:16]
        self.path = state_dir / "journal" / f"{identity}.jsonl"
        self._replaying = self.path.with_suffix(".replaying")
        self._clock = clock

    def append(self, name: str, values: Mapping[str, Any]) -> None:
        """Write a record down so that it survives a crash of this machine.

        Raises:
            ConfigurationError: the state directory cannot be written.
        """
        line = msgspec.json.encode(Entry(name, dict(values))) + b"\n"
        private_directory(self.path.parent)
        with self._disk(), self._locked() as descriptor:
            new = os.fstat(descriptor).st_size == 0
            _append(descriptor, line)
            os.fsync(descriptor)
            if new:
                self._sync_directory()

    def entries(self) -> list[Entry]:
        """Read what waits to be recorded; what cannot be read is left to `replay`."""
        found = []
        for path in (self._replaying, self.path):
            with self._disk(), suppress(FileNotFoundError):
                refuse_foreign(path, "file")
                for line in path.read_bytes().splitlines():
                    with suppress(msgspec.DecodeError):
                        found.append(msgspec.json.decode(line, type=Entry))
        return found

    @property
    def waits(self) -> bool:
        """Tell whether anything waits to be recorded."""
        return self.path.exists() or self._replaying.exists()

    def replay(self, write: Callable[[str, Mapping[str, Any]], Any]) -> None:
        """Record what is in the journal, and empty it.

        Records may be repeated, so a crash in the middle does no harm. One that the database will never take (its run
        is no longer there) is put aside in a file of its own, because it would stand in the way for ever.

        Raises:
            DatabaseUnavailableError: the database was lost again, or another command holds the journal for too long.
            ConfigurationError: the state directory cannot be read or written.
        """
        if not self.waits:
            return
        with self._disk(), self._only_replay():
            # What a crash left half recorded comes before what came later.
            self._record(write)
            if self.path.exists() and self.path.stat().st_size:
                # Appending goes on in a new file meanwhile, however long the database takes.
                with self._locked():
                    self.path.rename(self._replaying)
                    self._sync_directory()
                self._record(write)

    def _record(self, write: Callable[[str, Mapping[str, Any]], Any]) -> None:
        try:
            refuse_foreign(self._replaying, "file")
            lines = self._replaying.read_bytes().splitlines()
        except FileNotFoundError:
            return
        for line in lines:
            try:
                entry = msgspec.json.decode(line, type=Entry)
                write(entry.name, entry.values)
            except (msgspec.DecodeError, WrongDataError):
                self._put_aside(line)
        self._replaying.unlink()

    def _put_aside(self, line: bytes) -> None:
        path = self.path.with_suffix(".refused")
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
        try:
            os.write(descriptor, line + b"\n")
        finally:
            os.close(descriptor)

    def _sync_directory(self) -> None:
        # A file survives a crash of the machine only together with its name.
        descriptor = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    @contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigurationError(
                f"the journal {self.path} cannot be used: {error.strerror}; make room, and check whose it is"
            ) from error

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """Hold the file that is the journal now; never for longer than a write or a rename takes."""
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                # It may have been renamed while we waited.
                if self.path.exists() and self.path.stat().st_ino == os.fstat(descriptor).st_ino:
                    yield descriptor
                    return
            finally:
                os.close(descriptor)

    @contextmanager
    def _only_replay(self) -> Iterator[None]:
        descriptor = os.open(self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        give_up = self._clock.monotonic() + REPLAY_PATIENCE_SECONDS
        try:
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if self._clock.monotonic() >= give_up:
                        raise DatabaseUnavailableError(
                            f"another command has been recording {self.path} for {REPLAY_PATIENCE_SECONDS:g}s"
                        ) from None
                    self._clock.sleep(0.05)
            yield
        finally:
            os.close(descriptor)


def _append(descriptor: int, line: bytes) -> None:
    """Append a whole line or nothing: half of one, for want of room or after a crash, would spoil the next."""
    size = os.fstat(descriptor).st_size
    if size and os.pread(descriptor, 1, size - 1) != b"\n":
        line = b"\n" + line
    if os.write(descriptor, line) < len(line):
        os.ftruncate(descriptor, size)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
