"""What could not be recorded because the database was away: kept on disk, recorded once by the next command."""

from __future__ import annotations

import fcntl
import hashlib
import os
from typing import TYPE_CHECKING, Any

import msgspec

from batchctl.errors import ConfigurationError, DatabaseRefusedError
from batchctl.paths import private_directory, refuse_foreign

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from batchctl.state.database import Database


class Entry(msgspec.Struct, frozen=True):
    """One record that the database has not seen: its name and values as Store.write takes them."""

    name: str
    values: dict[str, Any]


class Journal:
    """The journal of one database and schema on this host."""

    def __init__(self, state_dir: Path, database: Database) -> None:
        # Another database must never be told what happened in this one.
        where = {key: database.parameters.get(key) for key in ("service", "host", "hostaddr", "port", "dbname")}
        if database.embedded:
            where = {"embedded": True}
        identity = msgspec.json.encode([where, database.schema])
        self.path = state_dir / "journal" / f"{hashlib.sha256(identity).hexdigest()[:16]}.jsonl"

    def append(self, name: str, values: Mapping[str, Any]) -> None:
        """Write a record down so that it survives a crash of this machine.

        Raises:
            ConfigurationError: the state directory cannot be written.
        """
        line = msgspec.json.encode(Entry(name, dict(values))) + b"\n"
        try:
            private_directory(self.path.parent)
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                os.write(descriptor, line)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise ConfigurationError(f"{self.path} cannot be written: {error.strerror}") from error

    def replay(self, write: Callable[[str, Mapping[str, Any]], Any]) -> int:
        """Record what is in the journal and empty it; return how many records there were.

        Records may be repeated, so a crash in the middle does no harm. One that the database refuses (its run is no
        longer there) is dropped, because it would stand in the way for ever.
        """
        try:
            refuse_foreign(self.path, "file")
            descriptor = os.open(self.path, os.O_RDWR | os.O_NOFOLLOW)
        except FileNotFoundError:
            return 0
        try:
            # A second command waits here for the first and then finds the journal empty.
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            lines = self.path.read_bytes().splitlines()
            for line in lines:
                try:
                    entry = msgspec.json.decode(line, type=Entry)
                    write(entry.name, entry.values)
                except (msgspec.DecodeError, DatabaseRefusedError):
                    continue
            os.ftruncate(descriptor, 0)
        finally:
            os.close(descriptor)
        return len(lines)
