"""aggregate: options, wiring, result."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from batchctl.cli.app import command
from batchctl.cli.run_batch import Json, SkipExitCode
from batchctl.cli.session import Session
from batchctl.errors import ConfigurationError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from batchctl.rollup.start import Rebuild
    from batchctl.state.store import Store


@command("aggregate")
def aggregate(
    session: Session,
    *,
    grain: Annotated[
        list[str] | None, typer.Option("--grain", metavar="G", help="Only this grain (repeatable): 1m, 5m, 1h.")
    ] = None,
    rollup: Annotated[str | None, typer.Option("--rollup", metavar="R", help="Only this rollup.")] = None,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Compute a range anew, with --from and --to.")] = False,
    start: Annotated[
        str | None, typer.Option("--from", metavar="T", help="Start of the range, inside: 2026-01-31T01:00.")
    ] = None,
    end: Annotated[str | None, typer.Option("--to", metavar="T", help="End of the range, outside.")] = None,
    jobs: Annotated[
        int, typer.Option("--jobs", metavar="N", min=1, max=64, help="Work a backlog off N chunks at a time.")
    ] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what is waiting, and change nothing.")] = False,
    skip_exit_code: SkipExitCode = 75,
    json: Json = False,
) -> int:
    """Roll up what changed in a source since the last call.

    Without --grain: every grain of every rollup, finest first.
    """
    from batchctl.cli.interruption import Interrupted, interruptible
    from batchctl.cli.terminal import on_terminal
    from batchctl.rollup.start import Aggregate, exit_code

    span = _span(session, rebuild=rebuild, start=start, end=end, dry_run=dry_run)
    view = None
    if on_terminal() and session.verbosity == 0 and not json:
        from batchctl.cli.progress import BacklogView

        view = BacklogView(session.clock)
    call = Aggregate(
        configuration=session.configuration,
        definitions=session.definitions(rollup),
        grains=grain or (),
        zone=session.zone,
        clock=session.clock,
        logger=session.logger,
        connect=(lambda **_: _look(session)) if dry_run else session.connect,
        journal=lambda: session.journal,
        rebuild=span,
        jobs=jobs,
        progress=None if view is None else view.update,
    )
    if dry_run:
        from batchctl.cli import render

        render.waiting(call.waiting(), json=json)
        return 0
    try:
        with interruptible():
            results = call.run()
    except Interrupted as interrupted:
        if session.log is not None:
            session.log.error(  # noqa: TRY400 - where it was interrupted concerns nobody
                "Ended by %s; what is not aggregated yet stays queued.", interrupted.name
            )
        return interrupted.exit_code
    finally:
        if view is not None:
            view.close()
    shown = session.shows_results and session.verbosity == 0
    if json or shown:
        from batchctl.cli import render

        render.grain_results(results, json=json, shown=shown)
    return exit_code(results, skip_exit_code, misconfigured=call.misconfigured)


def _span(session: Session, *, rebuild: bool, start: str | None, end: str | None, dry_run: bool) -> Rebuild | None:
    """Read the range of --rebuild, None without it."""
    from batchctl.rollup.start import Rebuild

    if rebuild != (start is not None and end is not None) or (start is None) != (end is None):
        raise UsageError("--rebuild, --from and --to go together: --rebuild --from 2026-01-31 --to 2026-02-01")
    if rebuild and dry_run:
        raise UsageError("--dry-run counts what is queued and queues nothing: without --rebuild, please")
    if start is not None and end is not None:
        from batchctl.cli.schedule import instant

        span = Rebuild(instant(session, "--from", start), instant(session, "--to", end))
        if span.start >= span.end:
            raise UsageError(f"--from {start} --to {end}: expected a start before the end")
        return span
    return None


@contextmanager
def _look(session: Session) -> Iterator[Store]:
    """Open a store that makes no schema and records nothing."""
    from batchctl.state.migrate import require_schema, schema_version
    from batchctl.state.store import Store

    with session.database.connect() as connection:
        if schema_version(connection) is None:
            raise ConfigurationError(f"{session.database.place} has no schema of batchctl yet; run `batchctl migrate`")
        require_schema(connection)
        yield Store(connection)
