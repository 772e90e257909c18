"""Finds, reads and decodes the configuration file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchctl.config import Configuration, Database
from batchctl.config_reader import Reader
from batchctl.errors import ConfigurationError
from batchctl.paths import home_directory

if TYPE_CHECKING:
    from collections.abc import Mapping

FILE_NAME = "batchctl.toml"
NONE_FOUND = "no configuration file"
"""How the message begins."""
SYSTEM_FILE = Path("/etc") / FILE_NAME
SYSTEM_STATE_DIRECTORY = Path("/var/lib/batchctl")


def find_file(option: Path | None, environment: Mapping[str, str]) -> Path:
    """Name the configuration file: the option, $BATCHCTL_CONFIG, here, the home directory, /etc.

    Raises:
        ConfigurationError: none of them exists.
    """
    named = option or (Path(environment["BATCHCTL_CONFIG"]) if environment.get("BATCHCTL_CONFIG") else None)
    if named is not None:
        if not _is_file(named, refuse=True):
            if named.is_dir():
                raise ConfigurationError(f"{named} is a directory; name the file, such as {named / FILE_NAME}")
            raise ConfigurationError(
                f"{named}: no such configuration file; `batchctl init --config {named}` writes one"
            )
        return named
    # Root keeps its state in a system directory, so it may do without a home.
    homes = [] if os.geteuid() == 0 and not Path("/root").exists() else [home_directory() / ".config/batchctl"]
    places = [Path(FILE_NAME), *(home / FILE_NAME for home in homes), SYSTEM_FILE]
    for place in places:
        if _is_file(place, refuse=False):
            return place
    raise ConfigurationError(
        f"{NONE_FOUND}: looked for {', '.join(str(place) for place in places)}; "
        "`batchctl init` writes a starter, --config or $BATCHCTL_CONFIG names another"
    )


def _is_file(path: Path, *, refuse: bool) -> bool:
    try:
        return path.is_file()
    except OSError as error:
        # Somebody else's directory is passed over in a search, as if it were empty.
        if refuse:
            raise ConfigurationError(f"{path}: cannot be read: {error.strerror}") from error
        return False


def load(path: Path, environment: Mapping[str, str]) -> Configuration:
    """Read and decode a configuration file.

    Raises:
        ConfigurationError: it cannot be read or says something that is not allowed.
    """
    import tomllib  # noqa: PLC0415 - `batchctl --help` needs no parser

    try:
        data = tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path}: byte {error.start} is not UTF-8, which TOML requires") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{path.absolute()}: not valid TOML: {error}") from error
    return decode(data, path.resolve(), environment)


def decode(data: dict[str, Any], path: Path, environment: Mapping[str, str]) -> Configuration:
    """Turn a parsed document into the configuration.

    Raises:
        ConfigurationError: names the file, the key path, what was found and what is allowed.
    """
    reader = Reader(path)
    document = reader.document(data)
    database = document.database
    if environment.get("BATCHCTL_DATABASE_URL"):
        database = Database(url=environment["BATCHCTL_DATABASE_URL"], schema=database.schema)
    elif (database.url is None) != database.embedded:
        found = "found neither url nor" if database.url is None else "found both url and"
        reader.refuse("database", f"{found} embedded; expected `embedded = true` or a `url`, one of them")
    if document.state_dir is not None:
        state_dir = reader.directory(document.state_dir)
    elif os.geteuid() == 0:
        state_dir = SYSTEM_STATE_DIRECTORY
    else:
        state_dir = home_directory() / ".local/state/batchctl"
    return Configuration(
        path=path,
        timezone=document.timezone,
        state_dir=state_dir,
        log_dir=reader.directory(document.log_dir) if document.log_dir is not None else state_dir / "log",
        database=database,
        batches=document.batch,
        rollups=document.rollup,
    )
