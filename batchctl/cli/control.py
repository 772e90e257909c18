"""pause, unpause and stop: what a person decides about starts and runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from batchctl.cli.app import command
from batchctl.cli.session import Session
from batchctl.errors import UsageError, choices

if TYPE_CHECKING:
    from batchctl.report.jobs import JobStatus

Job = Annotated[
    str, typer.Argument(metavar="JOB", help="A batch, a group (daily/upload), a rollup or its grain (trend/1m).")
]


@command("pause")
def pause(session: Session, job: Job) -> int:
    """Refuse starts of a job and all below it.

    A run in progress goes on.
    """
    from batchctl.cli import output
    from batchctl.report.jobs import JobReader

    top = _configured(session, job)
    with session.connect() as store:
        new = store.pause(job, batch=top if top in session.configuration.batches else None)
        statuses = JobReader(session.configuration, store, session.zone, session.clock).statuses()
    if session.shows_results:
        output.line(f"{job} is paused." if new else f"{job} was paused already.")
        running = [each for each in statuses if each.state == "running" and f"{each.job}/".startswith(f"{job}/")]
        for text in _go_on(running):
            output.line(text)
    return 0


@command("unpause")
def unpause(session: Session, job: Job) -> int:
    """Allow starts of a job and all below it again."""
    from batchctl.cli import output
    from batchctl.guard.pause import lifted_by

    top = _configured(session, job)
    with session.connect() as store:
        lifted = store.unpause(job)
        above = store.paused([top])
    if session.shows_results:
        output.line(f"No longer paused: {', '.join(lifted)}." if lifted else f"{job} was not paused.")
    if above:
        # Also without a terminal: who unpauses a job takes it to start again.
        output.warning(f"{job} is still paused because of {lifted_by(above)}")
    return 0


def _configured(session: Session, job: str) -> str:
    """Return the batch or rollup of a job, which has to be configured."""
    from batchctl.report.configured import pausable

    known = pausable(session.configuration)
    if job not in known:
        raise UsageError(f"no such job: {choices([job])}; configured: {choices(known)}")
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


@command("stop")
def stop(
    session: Session,
    batch: Annotated[
        str | None, typer.Argument(metavar="BATCH", help="Which batch, if several are configured.")
    ] = None,
    *,
    after_step: Annotated[bool, typer.Option("--after-step", help="Let the running steps end by themselves.")] = False,
    now: Annotated[bool, typer.Option("--now", help="Kill the running steps, without grace.")] = False,
) -> int:
    """Ask the live run of a batch to end.

    Wherever it runs; the command returns at once, and status shows when the run has ended.
    """
    from batchctl.batch.interruption import Stop
    from batchctl.batch.stop import ask_to_end
    from batchctl.cli import output
    from batchctl.state.host import this_host

    if after_step and now:
        raise UsageError("--after-step and --now exclude each other")
    state_dir = session.configuration.state_dir
    said = ask_to_end(
        session.only_batch(batch),
        Stop.AFTER_STEP if after_step else Stop.NOW if now else Stop.STOP,
        state_dir=state_dir,
        host=this_host(state_dir).host_id,
        connect=session.connect,
        clock=session.clock,
    )
    if session.shows_results:
        output.line(said)
    return 0
