"""Which host this is: the random id of a state directory."""

from __future__ import annotations

import os
import secrets
import socket
from typing import TYPE_CHECKING, NamedTuple

from batchctl.errors import ConfigurationError
from batchctl.paths import private_directory, refuse_foreign

if TYPE_CHECKING:
    from pathlib import Path


class Host(NamedTuple):
    """A state directory; two of them on one machine are two hosts."""

    host_id: str
    hostname: str


def this_host(state_dir: Path) -> Host:
    """Read the id of the state directory, and make it the first time; safe when many do it at once.

    Raises:
        ConfigurationError: the file cannot be made, is not ours, or is empty.
    """
    path = private_directory(state_dir) / "host_id"
    try:
        if not path.exists():
            _make(path)
        refuse_foreign(path, "file")
        host_id = path.read_text(encoding="ascii").strip()
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read or made: {error.strerror}") from error
    if not host_id:
        raise ConfigurationError(f"{path} is empty, so this host has no identity; remove the file if nothing runs here")
    return Host(host_id, socket.gethostname())


def _make(path: Path) -> None:
    own = path.with_name(f"host_id.{os.getpid()}")
    descriptor = os.open(own, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(f"{secrets.token_hex(8)}\n")
        file.flush()
        os.fsync(file.fileno())
    try:
        # A link never replaces: of many who make an id at once, one wins and the others read it.
        os.link(own, path)
    except FileExistsError:
        pass
    finally:
        own.unlink()
