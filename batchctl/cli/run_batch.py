"""run-batch: options, wiring, result."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from batchctl.cli.app import command
from batchctl.cli.session import Session
from batchctl.errors import UsageError

SkipExitCode = Annotated[
    int, typer.Option("--skip-exit-code", metavar="N", min=0, max=255, help="Exit code of a skip.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")]


@command("run-batch")
def run_batch(
    session: Session,
    batch: Annotated[
        str | None, typer.Argument(metavar="BATCH", help="Which batch, if several are configured.")
    ] = None,
    *,
    account: Annotated[str | None, typer.Option("--account", metavar="A", help="Only this account.")] = None,
    group: Annotated[str | None, typer.Option("--group", metavar="G", help="Only the steps of this group.")] = None,
    step: Annotated[list[str] | None, typer.Option("--step", metavar="S", help="Only this step (repeatable).")] = None,
    force_gap: Annotated[bool, typer.Option("--force-gap", help="Lift min_gap, gap_factor and every.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would run, and start nothing.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the last run without success at the first step that is not done.")
    ] = False,
    run: Annotated[str | None, typer.Option("--run", metavar="RUN", help="With --resume: this run.")] = None,
    skip_exit_code: SkipExitCode = 75,
    json: Json = False,
) -> int:
    """Run a batch, unless it runs already or ran too recently."""
    from batchctl.batch.plan import make_plan
    from batchctl.batch.resume import Wish, Work, find_work
    from batchctl.cli import render

    name = session.only_batch(batch)
    configured = session.configuration.batches[name]
    if run is not None and not resume:
        raise UsageError("--run RUN goes with --resume")
    if resume and (account is not None or step):
        raise UsageError("--resume continues a run as it was started; leave out --account and --step")
    # What the options name is checked in any case.
    plan = make_plan(name, configured, accounts=[account] if account else (), group=group, steps=step or ())
    if dry_run:
        work = Work(plan)
        if resume:
            with session.connect() as store:
                work = find_work(store, name, configured, Wish(run, group))
        render.plan(work, json=json)
        return 0

    from batchctl.batch.guards import Guards
    from batchctl.batch.start import Start, handled_signals

    # With -v the log lines on standard error say everything.
    shown = session.shows_results and session.verbosity == 0 and not json
    # From before the lock is taken until the result is said: a signal never leaves a run without its end.
    with handled_signals() as interruption:
        with render.run_view(plan, shown=shown) as watch:
            guards = Guards(
                configuration=session.configuration,
                job=plan.job,
                force_gap=force_gap,
                zone=session.zone,
                clock=session.clock,
                log=session.logger(name),
            )
            wanted = Wish(run, group) if resume else Work(plan)
            result = Start(guards, wanted, session.load_state, watch, dict(os.environ), interruption).run()
        render.run_result(result, json=json, shown=shown)
    return skip_exit_code if result.outcome == "skipped" else result.exit_code
