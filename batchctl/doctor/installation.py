"""The program and the configuration: where they are, and whether cron would find and anybody could change them."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from batchctl.config_file import FILE_NAME
from batchctl.doctor.access import changeable
from batchctl.doctor.finding import error, ok, warning

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from batchctl.config import Configuration
    from batchctl.doctor.finding import Finding

PASSWORD = re.compile(r"://[^/@]*:[^/@]+@|[?&\s]password\s*=|^password\s*=", re.IGNORECASE)
"""A password inside a database URL or a connection string."""


def check_program(program: Path) -> Iterator[Finding]:
    """Check that cron can start the program, and that nobody else can put another in its place."""
    if not program.exists():
        yield error("program", f"{program} does not exist", "install batchctl there, or call it by its present path")
        return
    if not os.access(program, os.X_OK) or not program.is_file():
        yield error("program", f"{program} cannot be executed by this user", f"chmod +x {program}, and its directories")
        return
    others = changeable(program)
    if others is None:
        yield ok("program", f"{program} is there, and nobody else can change it")
        return
    yield error(
        "program",
        f"{others.part}, on the way to {program}: {others.who}, and so decides what cron runs as this user",
        f"{others.closed_by}, or install batchctl below directories of root or of this user",
    )


def check_configuration(
    configuration: Configuration, named: Path | None, environment: Mapping[str, str], crontab: Path | None
) -> Iterator[Finding]:
    """Check that cron finds the configuration that was found here, and who can change and read it.

    Args:
        configuration: The configuration.
        named: --config as it was given, None without.
        environment: The environment of this call.
        crontab: The configuration that installed crontab lines name.
    """
    path = configuration.path
    found = f"{path} is valid"
    how = None if crontab == path else _only_here(path, named, environment)
    if how is not None:
        yield warning(
            "configuration",
            f"{path} was found {how}, which cron does not have",
            f"name it in each crontab line: --config {path}",
        )
    elif crontab == path:
        found += ", and the crontab names it"
    others = changeable(path)
    if others is not None:
        yield error(
            "configuration",
            f"{others.part}: {others.who}, and the commands in {path} run as this user",
            f"{others.closed_by}, or call it as the user whose crontab it is for",
        )
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & stat.S_IROTH and PASSWORD.search(configuration.database.url or "") and _configured(environment):
        yield warning(
            "configuration",
            f"{path} holds the database's password, and anybody may read it (mode {mode:04o})",
            f"chmod 600 {path}, or keep the password in ~/.pgpass",
        )
    if how is None and others is None:
        yield ok("configuration", found)
    yield from _only_in_environment(environment)


def _configured(environment: Mapping[str, str]) -> bool:
    return not environment.get("BATCHCTL_DATABASE_URL")


def _only_here(path: Path, named: Path | None, environment: Mapping[str, str]) -> str | None:
    """Say by what of this call's surroundings the file was found; None if it is found from everywhere."""
    if named is not None:
        return None if named.is_absolute() else f"by the relative path {named}"
    if environment.get("BATCHCTL_CONFIG"):
        return "by $BATCHCTL_CONFIG"
    if Path(FILE_NAME).resolve() == path:
        return "in the working directory"
    return None


def _only_in_environment(environment: Mapping[str, str]) -> Iterator[Finding]:
    # Passwords are looked at where the database is: only there it is known whether one is needed.
    if environment.get("BATCHCTL_DATABASE_URL"):
        yield warning(
            "configuration",
            "$BATCHCTL_DATABASE_URL decides here which database is used, and cron does not set it",
            "write it into the configuration as database.url, or set it in the crontab",
        )
