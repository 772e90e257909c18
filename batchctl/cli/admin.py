"""init, migrate and demo: setting things up."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from batchctl.cli.app import command
from batchctl.cli.session import Session
from batchctl.errors import ConfigurationError

STARTER = Path(__file__).with_name("starter.toml")


@command("init")
def init(session: Session) -> int:
    """Write a commented starter configuration, on the embedded database; never overwrite one."""
    from batchctl.cli import render
    from batchctl.config_file import FILE_NAME

    path = session.config or Path(FILE_NAME)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(STARTER.read_text(encoding="utf-8"))
    except FileExistsError:
        raise ConfigurationError(f"{path} exists and is left alone; name another with --config") from None
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written: {error.strerror}") from error
    if session.shows_results:
        render.line(f"Wrote {path}. Next: edit it, then `batchctl run-batch`, `batchctl status`.")
    return 0
