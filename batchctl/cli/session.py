"""One call of the program: its global options, and what they lead to, each made when it is first asked for."""

from __future__ import annotations

import functools
import os
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from batchctl.cli.terminal import on_terminal
from batchctl.clock import SystemClock
from batchctl.errors import ConfigurationError, UsageError, choices

if TYPE_CHECKING:
    import logging
    from datetime import tzinfo

    from batchctl.batch.guards import State
    from batchctl.clock import Clock
    from batchctl.config import Configuration
    from batchctl.rollup.definition import Definition
    from batchctl.state.database import Database
    from batchctl.state.journal import Journal
    from batchctl.state.store import Store

LogFormat = Literal["text", "json"]


def _working_directory_exists() -> bool:
    try:
        return bool(os.getcwd())  # noqa: PTH109 - asked for its error
    except FileNotFoundError:
        return False


@dataclass
class Session:
    """What every command is handed.

    Args:
        config: --config, if given.
        verbosity: How many -v minus how many -q.
        log_format: Form of the log lines.
        clock: The machine's clock.
    """

    config: Path | None = None
    verbosity: int = 0
    log_format: LogFormat = "text"
    clock: Clock = field(default_factory=SystemClock)
    log: logging.Logger | None = None
    _definitions: dict[str, Definition] = field(default_factory=dict)

    @functools.cached_property
    def configuration(self) -> Configuration:
        """Find, read and check the configuration."""
        from batchctl import config_file
        from batchctl.rollup.definition import read_definitions
        from batchctl.schedule import cron

        configuration = config_file.load(config_file.find_file(self.config, os.environ), os.environ)
        cron.validate(configuration)
        self._definitions = {each.name: each for each in read_definitions(configuration)}
        return configuration

    def definitions(self, name: str | None = None) -> tuple[Definition, ...]:
        """Return all rollups, or the named one."""
        rollups = self.configuration.rollups
        known = choices(rollups) if rollups else f"(none in {self.configuration.path})"
        if name is not None and name not in rollups:
            raise UsageError(f"no such rollup: {choices([name])}; configured: {known}")
        if not rollups:
            raise UsageError(
                f"{self.configuration.path} configures no rollup: it has no [rollup.NAME]; a file that `batchctl init` "
                "wrote has one to be uncommented"
            )
        return tuple(self._definitions.values()) if name is None else (self._definitions[name],)

    def explained(self, error: BaseException | None) -> ConfigurationError | None:
        """Say what an error of the operating system means, if it is about a path that the configuration names."""
        from batchctl.paths import explained

        if isinstance(error, FileNotFoundError) and not _working_directory_exists():
            return ConfigurationError("the working directory was removed; change to another one")
        configuration: Configuration | None = vars(self).get("configuration")
        directories = () if configuration is None else (configuration.state_dir, configuration.log_dir)
        return explained(error, directories)

    @functools.cached_property
    def zone(self) -> tzinfo:
        """Return the zone of shown times."""
        from batchctl.schedule.cron import local_zone

        return local_zone(self.configuration.timezone)

    @functools.cached_property
    def database(self) -> Database:
        """Name the database; the driver is loaded here and nowhere earlier."""
        from batchctl.state.database import open_database

        return open_database(self.configuration, self.clock)

    @functools.cached_property
    def journal(self) -> Journal:
        """Name the journal of the database."""
        from batchctl.state.journal import Journal

        return Journal(self.configuration.state_dir, self.database, self.clock)

    def connect(self, **options: Any) -> AbstractContextManager[Store]:
        """Open a store for a block."""
        from batchctl.state.store import open_store

        return open_store(self.database, self.journal, **options)

    def load_state(self) -> State:
        """Load what a batch needs of the database."""
        from batchctl.batch.guards import State
        from batchctl.state.host import this_host

        return State(self.connect, self.journal, this_host(self.configuration.state_dir))

    def logger(self, name: str) -> logging.Logger:
        """Make the logger of a batch or rollup; a later error goes through it too."""
        from batchctl import logs

        self.log = logs.set_up(
            name,
            log_dir=self.configuration.log_dir,
            zone=self.zone,
            verbosity=self.verbosity,
            form=self.log_format,
        )
        return self.log

    def only_batch(self, name: str | None) -> str:
        """Return the batch that is meant: the named one, or the only one."""
        batches = self.configuration.batches
        known = choices(batches) if batches else f"(none in {self.configuration.path})"
        if name is None:
            if len(batches) != 1:
                raise UsageError(f"which batch? Configured: {known}")
            return next(iter(batches))
        if name not in batches:
            raise UsageError(f"no such batch: {choices([name])}; configured: {known}")
        return name

    @property
    def shows_results(self) -> bool:
        """Tell whether a command that did its work says so: on a terminal or with -v, unless -q."""
        return self.verbosity > 0 or (self.verbosity == 0 and on_terminal())
