"""status and history: what runs now, what ran, what was skipped and why."""

from __future__ import annotations

from typing import Annotated

import typer

from batchctl.cli.app import command
from batchctl.cli.run_batch import Json
from batchctl.cli.session import Session
from batchctl.errors import UsageError, choices


@command("status")
def status(session: Session, *, json: Json = False) -> int:
    """Show each job: its state, its last run, when it may start.

    A job is a batch, a group of one (daily/upload) or a rollup's grain (trend/1m).
    """
    from batchctl.cli import job_view
    from batchctl.report.jobs import JobReader

    with session.connect() as store:
        statuses = JobReader(session.configuration, store, session.zone, session.clock).statuses()
    job_view.status(statuses, zone=session.zone, json=json)
    return 0


@command("history")
def history(
    session: Session,
    job: Annotated[str | None, typer.Argument(metavar="JOB", help="Only this job, and what is below it.")] = None,
    *,
    limit: Annotated[int, typer.Option("--limit", "-n", metavar="N", min=1, help="How many entries.")] = 20,
    json: Json = False,
) -> int:
    """Show what ran and what was skipped and why, newest first."""
    from batchctl.cli import render
    from batchctl.report.configured import pausable

    with session.connect() as store:
        entries = store.history(limit, job)
        # What is no longer configured may still have a history.
        known = dict.fromkeys((*pausable(session.configuration), *(row.job for row in store.jobs())))
    if job is not None and not entries and job not in known:
        raise UsageError(f"no such job: {choices([job])}; known: {choices(known)}")
    render.history(entries, zone=session.zone, json=json)
    return 0
