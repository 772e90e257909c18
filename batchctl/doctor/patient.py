"""What is examined: a program, a configuration, and the environment that cron will give them."""

from __future__ import annotations

import os
import pwd
from dataclasses import dataclass
from typing import TYPE_CHECKING

from batchctl.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from batchctl.clock import Clock
    from batchctl.config import Configuration
    from batchctl.rollup.definition import Definition
    from batchctl.state.database import Database

CRON_PATH = "/usr/bin:/bin"
"""The PATH of a crontab that sets none."""


@dataclass(frozen=True)
class Patient:
    """What is examined, each part made when it is first asked for.

    Args:
        program: How cron is to call this program, its first word absolute.
        named: The configuration file as --config names it, None if it does not.
        environment: The environment of this call.
        clock: The machine's clock.
        configuration: Finds, reads and checks the configuration.
        definitions: The configured rollups, checked.
        database: Names the database.
    """

    program: tuple[str, ...]
    named: Path | None
    environment: Mapping[str, str]
    clock: Clock
    configuration: Callable[[], Configuration]
    definitions: Callable[[], Sequence[Definition]]
    database: Callable[[], Database]


def own_entry() -> pwd.struct_passwd:
    """Return the passwd entry of the user.

    Raises:
        ConfigurationError: there is none; cron then runs nothing for this user.
    """
    try:
        return pwd.getpwuid(os.geteuid())
    except KeyError:
        raise ConfigurationError(
            f"user id {os.geteuid()} has no passwd entry, so cron runs nothing for it; use a user that the system knows"
        ) from None
