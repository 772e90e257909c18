"""pause and unpause: what a person decides about starts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from batchctl.cli.app import command
from batchctl.cli.session import Session
from batchctl.errors import UsageError

if TYPE_CHECKING:
    from batchctl.report.jobs import JobStatus

Job = Annotated[
    str, typer.Argument(metavar="JOB", help="A batch, a group (daily/upload), a rollup or its grain (trend/1m).")
]


@command("pause")
def pause(session: Session, job: Job) -> int:
    """Refuse starts of a job and of all below it; a run in progress goes on."""
    from batchctl.cli import render
    from batchctl.report.jobs import JobReader

    top = _configured(session, job)
    with session.connect() as store:
        new = store.pause(job, batch=top if top in session.configuration.batches else None)
        statuses = JobReader(session.configuration, store, session.zone, session.clock).statuses()
    if session.shows_results:
        render.line(f"{job} is paused." if new else f"{job} was paused already.")
        running = [each for each in statuses if each.state == "running" and f"{each.job}/".startswith(f"{job}/")]
        for text in _go_on(running):
            render.line(text)
    return 0


@command("unpause")
def unpause(session: Session, job: Job) -> int:
    """Allow starts of a job and of all below it again."""
    from batchctl.cli import render
    from batchctl.guard.pause import lifted_by

    top = _configured(session, job)
    with session.connect() as store:
        lifted = store.unpause(job)
        above = store.paused([top])
    if session.shows_results:
        render.line(f"No longer paused: {', '.join(lifted)}." if lifted else f"{job} was not paused.")
    if above:
        # Also without a terminal: who unpauses a job takes it to start again.
        render.warning(f"{job} is still paused because of {lifted_by(above)}")
    return 0


def _configured(session: Session, job: str) -> str:
    """Return the batch or rollup of a job, which has to be configured."""
    from batchctl.report.jobs import pausable

    known = pausable(session.configuration)
    if job not in known:
        raise UsageError(f"no such job: {job}; configured: {', '.join(known) or '(none)'}")
    return job.partition("/")[0]


def _go_on(running: list[JobStatus]) -> list[str]:
    """Say which runs are not affected, each once."""
    runs = {(each.job.partition("/")[0], each.pid, each.host): each for each in reversed(running)}
    return [
        f"The run in progress (pid {each.pid} on {each.host}) goes on; `batchctl stop` ends it."
        if each.estimate_seconds is not None
        else f"The aggregation of {each.job} in progress (pid {each.pid} on {each.host}) goes on."
        for each in runs.values()
    ]
