"""doctor: what makes cron jobs fail silently."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from batchctl.cli.app import command
from batchctl.cli.run_batch import Json
from batchctl.cli.session import Session
from batchctl.errors import BatchctlError


@command("doctor")
def doctor(
    session: Session,
    *,
    as_cron: Annotated[bool, typer.Option("--as-cron", help="Look from inside cron's environment.")] = False,
    json: Json = False,
) -> int:
    """Check everything that makes cron jobs fail silently.

    And say what to do.
    """
    from batchctl.cli import render
    from batchctl.doctor.cron_environment import examine_as_cron
    from batchctl.doctor.examination import Examination
    from batchctl.doctor.finding import exit_code, raised
    from batchctl.doctor.patient import Patient
    from batchctl.schedule.crontab_lines import this_program

    program = this_program()
    if as_cron:
        options = [] if session.config is None else ["--config", str(session.config)]
        configuration = _found_here(session)
        try:
            found = examine_as_cron((*program, *options), _path_of_cron(configuration), os.environ, configuration)
        except BatchctlError as problem:
            found = (raised("environment", problem),)
    else:
        patient = Patient(
            program,
            session.config,
            dict(os.environ),
            session.clock,
            configuration=lambda: session.configuration,
            definitions=lambda: session.definitions() if session.configuration.rollups else (),
            database=lambda: session.database,
        )
        found = Examination(patient).run()
    render.findings(found, json=json, everything=session.verbosity >= 0)
    return exit_code(found)


def _found_here(session: Session) -> Path | None:
    """Return the configuration file, if it can be read here."""
    try:
        return session.configuration.path
    except BatchctlError:
        return None


def _path_of_cron(configuration: Path | None) -> str:
    """Return the PATH that the crontab sets for this configuration."""
    from batchctl.doctor.cron import read_lines

    return read_lines(configuration).path()
