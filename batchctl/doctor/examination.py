"""All checks in their order; what one of them needs and cannot have, it alone goes without."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec

from batchctl.doctor.cron import check_cron, check_crontab, read_lines, zone_of_daemon
from batchctl.doctor.finding import CHECKS, raised
from batchctl.doctor.installation import check_configuration, check_program
from batchctl.doctor.places import check_directory, check_disk
from batchctl.doctor.steps import check_steps
from batchctl.doctor.surroundings import check_locale, check_timezone
from batchctl.errors import BatchctlError
from batchctl.schedule.cron import local_zone

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from batchctl.config import Configuration
    from batchctl.doctor.cron import Lines
    from batchctl.doctor.finding import Finding
    from batchctl.doctor.patient import Patient
    from batchctl.state.database import Database, Session

Values = ParamSpec("Values")
ANSWER_SECONDS, START_SECONDS = 30.0, 120.0
"""How long the checks of a database may take in all; the embedded one may have to be started first."""


class Examination:
    """The findings of one call."""

    def __init__(self, patient: Patient) -> None:
        self._patient = patient
        self._found: list[Finding] = []

    def run(self) -> tuple[Finding, ...]:
        """Run every check; return what was found, in the order of CHECKS."""
        patient = self._patient
        configuration = self._configuration()
        lines = read_lines(configuration.path if configuration else None)
        for program in dict.fromkeys((Path(patient.program[0]), *lines.programs)):
            self._add("program", check_program, program)
        self._add("locale", check_locale, patient.environment)
        self._add("cron", check_cron, patient.clock)
        if configuration is not None:
            self._examine(configuration, lines)
        return tuple(sorted(self._found, key=lambda finding: CHECKS.index(finding.check)))

    def _configuration(self) -> Configuration | None:
        try:
            return self._patient.configuration()
        except BatchctlError as problem:
            self._found.append(raised("configuration", problem))
            return None

    def _examine(self, configuration: Configuration, lines: Lines) -> None:
        patient, clock = self._patient, self._patient.clock
        named = configuration.path if lines.active else None
        self._add("configuration", check_configuration, configuration, patient.named, patient.environment, named)
        self._add("crontab", check_crontab, configuration, patient.program, clock)
        self._add(
            "timezone",
            check_timezone,
            configuration.timezone,
            clock.now(),
            patient.environment,
            cron_zone=zone_of_daemon(),
            translated=bool(lines.active),
        )
        here = patient.environment.get("PATH", os.defpath)
        for name, batch in configuration.batches.items():
            self._add("step", check_steps, name, batch, configuration.directory, lines.path(name), here)
        self._add("state_dir", check_directory, "state_dir", configuration.state_dir)
        if configuration.log_dir != configuration.state_dir / "log":
            self._add("log_dir", check_directory, "log_dir", configuration.log_dir)
        self._add("disk", check_disk, (configuration.state_dir, configuration.log_dir))
        self._add("database", self._database, configuration)

    def _database(self, configuration: Configuration) -> Iterable[Finding]:
        """Ask the database, but not for ever; what was found before it fell silent is kept."""
        from batchctl.doctor.database import check_journals, check_reachable  # noqa: PLC0415 - loads the driver
        from batchctl.state.journal import Journal  # noqa: PLC0415 - the same
        from batchctl.state.within import within  # noqa: PLC0415 - the same

        patient = self._patient
        database = patient.database()
        limit = START_SECONDS if database.embedded else ANSWER_SECONDS
        reached = False
        try:
            problems = within(limit, lambda: list(check_reachable(database)))
            self._found += problems
            reached = not any(finding.state == "error" for finding in problems)
            if reached:
                within(limit, lambda: self._connected(configuration, database))
        except BatchctlError as problem:
            reached = False
            yield raised("database", problem)
        journal = Journal(configuration.state_dir, database, patient.clock)
        self._add("journal", check_journals, journal.path, reached=reached)
        if not reached:
            self._jobs_without_database(configuration)

    def _connected(self, configuration: Configuration, database: Database) -> None:
        from batchctl.doctor.database import check_schema, check_server  # noqa: PLC0415 - loads the driver
        from batchctl.doctor.rollups import not_migrated  # noqa: PLC0415 - the same
        from batchctl.state.migrate import schema_version  # noqa: PLC0415 - the same
        from batchctl.state.sql import LATEST_VERSION  # noqa: PLC0415 - the same

        with database.connect() as session:
            self._add("database", check_server, session, database.place, self._patient.clock)
            self._add("database", check_schema, session)
            if schema_version(session) == LATEST_VERSION:
                self._state(configuration, session)
                return
            if schema_version(session) is None:
                self._found += map(not_migrated, configuration.rollups)
        self._jobs_without_database(configuration)

    def _state(self, configuration: Configuration, session: Session) -> None:
        from batchctl.doctor import jobs, rollups  # noqa: PLC0415 - loads the driver
        from batchctl.state.store import Store  # noqa: PLC0415 - the same

        patient, clock = self._patient, self._patient.clock
        store = Store(session)
        zone = local_zone(configuration.timezone)
        rows = {row.job: row for row in store.jobs()}
        now = store.now()
        self._add("orphans", jobs.check_orphans, configuration, store, clock)
        self._add("job", jobs.check_jobs, configuration, rows)
        self._add("schedule", jobs.check_schedules, configuration, store, now, zone)
        for definition in patient.definitions():
            self._add("rollup", rollups.check_rollup, session, definition, clock)
        for name, rollup in configuration.rollups.items():
            self._add("rollup", rollups.check_lag, session, name, rollup, rows, now=now, zone=zone)
        self._add("rollup", rollups.check_strangers, session, configuration.rollups)
        if configuration.rollups:
            self._add("rollup", rollups.check_silenced, session)

    def _jobs_without_database(self, configuration: Configuration) -> None:
        from batchctl.doctor import jobs  # noqa: PLC0415 - not every call comes this far

        self._add("orphans", jobs.check_orphans, configuration, None, self._patient.clock)
        self._add("job", jobs.check_jobs, configuration, {})

    def _add(
        self,
        check: str,
        look: Callable[Values, Iterable[Finding]],
        *values: Values.args,
        **more: Values.kwargs,
    ) -> None:
        """Keep what a check finds; an error that a job would meet is a finding too."""
        try:
            self._found.extend(look(*values, **more))
        except (BatchctlError, OSError) as problem:
            self._found.append(raised(check, problem))
