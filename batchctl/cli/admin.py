"""init, migrate and demo: setting things up."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from batchctl.cli.app import command
from batchctl.cli.session import Session
from batchctl.errors import ConfigurationError, UsageError

STARTER = Path(__file__).with_name("starter.toml")


@command("init")
def init(session: Session) -> int:
    """Write a commented starter configuration.

    It uses the embedded database. A file that exists is never overwritten.
    """
    from batchctl.cli import output
    from batchctl.config_file import FILE_NAME

    path = session.config or Path(FILE_NAME)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(STARTER.read_text(encoding="utf-8"))
    except FileExistsError:
        raise ConfigurationError(f"{path} exists and is left alone; name another with --config") from None
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written: {error.strerror}") from error
    if session.shows_results:
        output.line(f"Wrote {path}. Next: edit it, then `batchctl run-batch`, `batchctl status`.")
    return 0


@command("migrate")
def migrate(
    session: Session,
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the SQL, and keep nothing of it.")] = False,
    drop: Annotated[
        str | None, typer.Option("--drop", metavar="ROLLUP", help="Take a rollup's tables and tracking away again.")
    ] = None,
    jobs: Annotated[
        int,
        typer.Option("--jobs", metavar="N", min=1, max=64, help="Build a changed rollup anew N chunks at a time."),
    ] = 1,
) -> int:
    """Upgrade the schema, make tables and triggers of rollups.

    The triggers notice what changes in the source. Calling it again does no harm.
    """
    from batchctl.cli import output, render
    from batchctl.rollup import ddl
    from batchctl.rollup.drop import drop as drop_rollup
    from batchctl.rollup.refresh import Limits
    from batchctl.state.migrate import upgrade

    definitions = session.definitions() if session.configuration.rollups else ()
    with session.database.connect() as connection, ExitStack() as stack:
        if dry_run:
            stack.enter_context(connection.transaction(discard=True))
        upgraded = upgrade(connection)
        warnings: tuple[str, ...] = ()
        if drop is not None:
            statements = drop_rollup(connection, drop, session.clock, dry_run=dry_run)
            done = [f"Dropped {drop}."]
        else:
            made = ddl.migrate(
                connection,
                definitions,
                session.clock,
                dry_run=dry_run,
                logger=session.logger,
                say=output.line if session.shows_results else lambda _: None,
                limits=Limits(jobs=jobs, connect=session.database.connect),
            )
            statements, warnings = made.statements, made.warnings
            looking_back = {each.name for each in definitions if each.lookback_seconds}
            done = [
                f"Made the tables{' and triggers' * (name not in looking_back)} of {name}." for name in made.created
            ]
            done += [f"The new tables of {name} took the place of the old ones." for name in made.changed]
            done += [f"Dropped the unfinished new tables of {name}." for name in made.discarded]
            if statements and not done:
                done = ["Made what was missing: triggers, a function or views; --dry-run shows which beforehand."]
    if dry_run:
        render.statements([*upgraded.statements, *statements] or ["-- Nothing to do"])
    lines = [*(f"Applied {name}." for name in upgraded.names), *done]
    render.migrated(lines or ["Nothing to do."], warnings, shown=session.shows_results and not dry_run)
    return 0


@command("demo")
def demo(
    session: Session,
    *,
    directory: Annotated[
        Path, typer.Option("--directory", metavar="DIR", help="Where everything of the demo goes.")
    ] = Path("batchctl-demo"),
    data: Annotated[
        Path | None, typer.Option("--data", metavar="FILE.csv", help="Another file with the sample's columns.")
    ] = None,
    stop: Annotated[bool, typer.Option("--stop", help="End the demo's database server.")] = False,
    clean: Annotated[bool, typer.Option("--clean", help="End the server and remove the directory.")] = False,
) -> int:
    """Show a batch and rollups at work on a day's real sales."""
    from batchctl.cli import output
    from batchctl.demo import tour

    if data is not None and (stop or clean):
        raise UsageError("--data goes with a demo that runs, not with --stop or --clean")
    if clean:
        return tour.clean(directory, session.clock, output.line)
    if stop:
        return tour.stop(directory, session.clock, output.line)
    return tour.run(directory, data, session.clock, output.line)
