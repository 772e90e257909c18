"""doctor: what makes cron jobs fail silently."""

from __future__ import annotations

import os
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
        try:
            found = examine_as_cron((*program, *options), _path_of_cron(session), os.environ)
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


def _path_of_cron(session: Session) -> str:
    """Return the PATH that the crontab sets for this configuration, as far as that can be read here."""
    from batchctl.doctor.cron import read_lines

    try:
        path = session.configuration.path
    except BatchctlError:
        path = None
    return read_lines(path).path()
