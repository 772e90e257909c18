"""run-batch: options, wiring, result."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from batchctl.cli.app import command
from batchctl.cli.session import Session

SkipExitCode = Annotated[
    int, typer.Option("--skip-exit-code", metavar="N", min=0, max=255, help="Exit code of a skip.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")]


@command("run-batch")
def run_batch(
    session: Session,
    batch: Annotated[str | None, typer.Argument(help="Which batch, if several are configured.")] = None,
    *,
    account: Annotated[str | None, typer.Option("--account", metavar="A", help="Only this account.")] = None,
    group: Annotated[str | None, typer.Option("--group", metavar="G", help="Only the steps of this group.")] = None,
    step: Annotated[list[str] | None, typer.Option("--step", metavar="S", help="Only this step (repeatable).")] = None,
    force_gap: Annotated[bool, typer.Option("--force-gap", help="Start whatever min_gap and every say.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would run, and start nothing.")] = False,
    skip_exit_code: SkipExitCode = 75,
    json: Json = False,
) -> int:
    """Run a batch, unless it runs already or ran too recently."""
    from batchctl.batch.plan import make_plan
    from batchctl.cli import render

    name = session.only_batch(batch)
    plan = make_plan(name, session.configuration.batches[name], account=account, group=group, steps=step or ())
    if dry_run:
        render.plan(plan, json=json)
        return 0

    from batchctl.batch.guards import Guards
    from batchctl.batch.start import Start

    # With -v the log lines on standard error say everything.
    shown = session.shows_results and session.verbosity == 0 and not json
    live = render.run_view(plan, shown=shown)
    with live as watch:
        guards = Guards(
            configuration=session.configuration,
            plan=plan,
            force_gap=force_gap,
            zone=session.zone,
            clock=session.clock,
            log=session.logger(name),
        )
        result = Start(guards, session.load_state, watch, dict(os.environ)).run()
    render.run_result(result, json=json, shown=shown)
    return skip_exit_code if result.outcome == "skipped" else result.exit_code
