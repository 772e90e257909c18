"""The directory of a demo: what it writes there, what it leaves alone, and how it removes what it made."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

from batchctl.config_file import FILE_NAME
from batchctl.errors import BatchctlError, ConfigurationError
from batchctl.paths import private_directory, refuse_foreign
from batchctl.state.embedded import LONGEST_SOCKET_PATH, SOCKET, EmbeddedServer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from batchctl.clock import Clock

MARKER = ".batchctl-demo"
MADE_BY = "batchctl demo"
SHIPPED = Path(__file__).parent
TEMPLATE = SHIPPED / "demo.toml"
SCRIPTS = ("collect.py", "export.py")
EVENTS = "events.csv"
SOURCE = "SOURCE.txt"
DATABASE = Path("state", "postgresql")


class Place:
    """A directory that this process alone works in as a demo, for as long as `locked` lasts."""

    def __init__(self, directory: Path) -> None:
        """Remember where it is; nothing is read or made."""
        self.shown = directory
        """As it was given, for messages and for commands to try."""
        self.directory = Path(os.path.normpath(directory.absolute()))

    @property
    def configuration(self) -> Path:
        return self.directory / FILE_NAME

    @property
    def socket_directory(self) -> str:
        """Name what libpq's host has to be for processes that work in the directory.

        A path that is too long, or that libpq or the configuration would read as something else, is named relative to
        the working directory.
        """
        path = str(self.directory / DATABASE / "data")
        plain = path.isascii() and path.isprintable() and not set(path) & set(",{}")
        fits = len(f"{path}/{SOCKET}") < LONGEST_SOCKET_PATH
        return path if plain and fits else str(Path("/proc/self/cwd") / DATABASE / "data")

    @property
    def needs_working_directory(self) -> bool:
        """Tell whether the database is reached from the directory only."""
        return self.socket_directory.startswith("/proc/")

    def exists(self) -> bool:
        return os.path.lexists(self.directory)

    def server(self, clock: Clock) -> EmbeddedServer:
        """Name the demo's own database server."""
        return EmbeddedServer(self.directory / DATABASE, clock)

    def make(self) -> None:
        """Make the directory, or check that it is this user's own.

        Raises:
            ConfigurationError: it is not, or cannot be made.
        """
        private_directory(self.directory)

    def claim(self) -> None:
        """Check that the directory is empty or a demo's.

        Raises:
            ConfigurationError: it is neither.
        """
        # A demo that was killed in its first moment leaves no marker, but the beginning of one.
        if found := sorted(entry for entry in self._entries() if not entry.startswith(f".{MARKER}.")):
            self.check(f"is not empty and no demo made it (found {found[0]})")

    def check(self, problem: str = "is not the directory of a demo and is left alone") -> None:
        """Check that the directory is a demo's.

        Raises:
            ConfigurationError: it is anything else.
        """
        refuse_foreign(self.directory, "directory")
        marker = self.directory / MARKER
        if os.path.lexists(marker):
            refuse_foreign(marker, "file")
            if self._written() is not None:
                return
        raise ConfigurationError(f"{self.shown} {problem}; name another with --directory")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other demos out of the directory for the block.

        Raises:
            BatchctlError: one is at work there.
        """
        descriptor = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BatchctlError(
                    f"another demo is at work in {self.shown}; wait for it, or name another with --directory"
                ) from None
            except OSError as error:
                raise ConfigurationError(
                    f"{self.shown} cannot be locked: {error.strerror}; name one on a local disk with --directory"
                ) from error
            yield
        finally:
            os.close(descriptor)

    def write(self, events: IO[bytes], *, shipped: bool) -> list[str]:
        """Write what the demo consists of; return the names of the files that were changed by hand and are kept."""
        try:
            return self._write(events, shipped=shipped)
        except OSError as error:
            raise ConfigurationError(
                f"{error.filename or self.directory} cannot be written: {error.strerror}; check space and permissions"
            ) from error

    def remove(self) -> None:
        """Remove the directory; what cannot be removed can be tried again."""
        try:
            for entry in self._entries():
                path = self.directory / entry
                if entry == MARKER:
                    continue  # it says that the rest may be removed
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            (self.directory / MARKER).unlink()
            self.directory.rmdir()
        except OSError as error:
            raise BatchctlError(
                f"{error.filename or self.directory} cannot be removed: {error.strerror}; "
                "see what still uses it, then try again"
            ) from error

    def _write(self, events: IO[bytes], *, shipped: bool) -> list[str]:
        template = TEMPLATE.read_text(encoding="utf-8")
        for name, value in {"@PYTHON@": sys.executable or "python3", "@PGHOST@": self.socket_directory}.items():
            template = template.replace(f'"{name}"', toml_string(value))
        wanted = {FILE_NAME: template.encode()}
        wanted |= {name: (SHIPPED / name).read_bytes() for name in (*SCRIPTS, *([SOURCE] if shipped else []))}
        before = self._written() or {}
        # First of all, so that what an interrupted demo leaves can be recognised.
        after = {**before, **{name: _digest(content) for name, content in wanted.items()}}
        self._replace(MARKER, json.dumps({"made_by": MADE_BY, "files": before}).encode())
        kept = [name for name in wanted if self._changed(name, {before.get(name), after[name]})]
        for name in wanted.keys() - set(kept):
            self._replace(name, wanted[name])
        self._replace(EVENTS, events)
        if not shipped and SOURCE not in kept:
            (self.directory / SOURCE).unlink(missing_ok=True)
        files = {name: digest for name, digest in after.items() if name not in kept}
        self._replace(MARKER, json.dumps({"made_by": MADE_BY, "files": files}).encode())
        return sorted(kept)

    def _entries(self) -> list[str]:
        return [path.name for path in self.directory.iterdir()]

    def _written(self) -> dict[str, str] | None:
        """Return the files that the demo wrote with their digests, None if it never did."""
        try:
            found = json.loads((self.directory / MARKER).read_bytes())
            return dict(found["files"]) if found["made_by"] == MADE_BY else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _changed(self, name: str, ours: set[str | None]) -> bool:
        with suppress(FileNotFoundError):
            return _digest((self.directory / name).read_bytes()) not in ours
        return False

    def _replace(self, name: str, content: bytes | IO[bytes]) -> None:
        descriptor, new = tempfile.mkstemp(prefix=f".{name}.", dir=self.directory)
        try:
            with os.fdopen(descriptor, "wb") as file:
                if isinstance(content, bytes):
                    file.write(content)
                else:
                    shutil.copyfileobj(content, file)
            Path(new).replace(self.directory / name)
        except OSError:
            Path(new).unlink(missing_ok=True)
            raise


def toml_string(text: str) -> str:
    """Write a text as TOML does: JSON's escapes, and DEL."""
    return json.dumps(re.sub(r"[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", text), ensure_ascii=False).replace(
        "\x7f", r"\u007f"
    )


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
