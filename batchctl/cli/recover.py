"""orphans and recover: what is left when something died."""

from __future__ import annotations

from typing import Annotated

import typer

from batchctl.cli.app import command
from batchctl.cli.run_batch import Json
from batchctl.cli.session import Session
from batchctl.errors import BatchctlError, ExitCode, UsageError


@command("orphans")
def orphans(
    session: Session,
    *,
    kill: Annotated[bool, typer.Option("--kill", help="End them: SIGTERM, grace, SIGKILL.")] = False,
    json: Json = False,
) -> int:
    """Show, or end, what earlier runs left alive on this host."""
    from batchctl.batch.recovery import Leftovers, ask_recorded
    from batchctl.cli import output, render
    from batchctl.state.host import this_host

    configuration = session.configuration
    try:
        host = this_host(configuration.state_dir)
        recorded = ask_recorded(session.connect, configuration.batches, host.host_id)
    except BatchctlError as error:
        # Locks and marks of processes are enough to find nearly everything.
        output.complain(f"{error}; looked without what is recorded there")
        recorded = {}
    leftovers = Leftovers(configuration, recorded, session.clock)
    found = leftovers.kill() if kill else leftovers.find()
    render.orphans(found, zone=session.zone, json=json)
    remaining = [left for left in found if left.killed is False]
    if remaining:
        output.complain(f"{len(remaining)} of {len(found)} could not be ended: end them as their user, or as root")
    return ExitCode.FAILED if remaining else ExitCode.DONE


@command("recover")
def recover(
    session: Session,
    run: Annotated[
        str | None,
        typer.Argument(metavar="RUN", help="Which run; without it every dead run of the configured batches."),
    ] = None,
    *,
    force: Annotated[
        bool, typer.Option("--force", help="Also if its claim is not over: you know that its host is gone.")
    ] = False,
) -> int:
    """Close a run that died: nothing waits for it any more."""
    from batchctl.batch.recovery import Recovery
    from batchctl.cli import output
    from batchctl.state.host import this_host

    if force and run is None:
        raise UsageError(
            "--force says that one particular host is gone, so it needs the RUN; `batchctl history` lists them"
        )
    recovery = Recovery(
        session.configuration,
        session.connect,
        this_host(session.configuration.state_dir),
        session.zone,
        session.clock,
        session.logger,
    )
    said, refused = ([recovery.close(run, force=force)], []) if run is not None else recovery.close_all()
    for text in (said or ["Nothing to close."]) if session.shows_results else ():
        output.line(text)
    for text in refused:
        output.complain(text)
    return ExitCode.FAILED if refused else ExitCode.DONE
