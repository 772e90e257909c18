"""crontab: the lines that start batchctl, shown, installed and removed."""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from batchctl.cli.app import command
from batchctl.cli.session import Session
from batchctl.errors import ConfigurationError, ExitCode, UsageError

if TYPE_CHECKING:
    from batchctl.schedule.crontab_lines import Wanted


class Action(StrEnum):
    """What to do with the lines."""

    SHOW = "show"
    INSTALL = "install"
    REMOVE = "remove"


@command("crontab")
def crontab(
    session: Session,
    action: Annotated[
        Action, typer.Argument(metavar="show|install|remove", help="Print the lines, write them, or take them away.")
    ],
    *,
    yes: Annotated[bool, typer.Option("--yes", help="Change the crontab without asking.")] = False,
) -> int:
    """Show the lines for cron, put them into your crontab, or out.

    They stand between markers; all other lines are left as they are.
    """
    if action is Action.SHOW:
        if yes:
            raise UsageError("--yes goes with install and remove; show changes nothing")
        return _show(session)
    if not yes and not _can_ask():
        raise UsageError(f"crontab {action} asks before it changes anything; without a terminal give --yes")
    return _install(session, yes=yes) if action is Action.INSTALL else _remove(session, yes=yes)


def _show(session: Session) -> int:
    from batchctl.cli import output
    from batchctl.schedule.crontab import block

    asked = _wanted(session)
    output.crontab_lines(block(asked.path, asked.lines))
    return ExitCode.DONE


def _install(session: Session, *, yes: bool) -> int:
    from batchctl.cli import output
    from batchctl.schedule import crontab as text
    from batchctl.schedule import user_crontab

    asked = _wanted(session)
    before = user_crontab.read()
    after = text.install(before or b"", asked.path, asked.lines)
    for number, line in text.compare(before or b"", asked.path, asked.lines).elsewhere:
        output.warning(f"line {number} of the crontab is outside the markers and starts the same; remove it: {line}")
    return _change(session, before, after, yes=yes, done=f"Installed the lines of {asked.path}.")


def _remove(session: Session, *, yes: bool) -> int:
    from batchctl.schedule import crontab as text
    from batchctl.schedule import user_crontab

    path = _named(session)
    before = user_crontab.read()
    after = text.remove(before or b"", path)
    return _change(session, before, after, yes=yes, done=f"Removed the lines of {path}.")


def _change(session: Session, before: bytes | None, after: bytes, *, yes: bool, done: str) -> int:
    """Show the difference, ask, and replace the crontab."""
    from batchctl.cli import output
    from batchctl.schedule import user_crontab
    from batchctl.schedule.crontab import difference

    lines = difference(before or b"", after)
    if not lines:
        if session.shows_results:
            output.line("The crontab is as it should be; nothing changed.")
        return ExitCode.DONE
    for each in lines if session.shows_results or not yes else ():
        output.line(each)
    if not yes and not output.confirmed("Change the crontab?"):
        output.line("Nothing changed.")
        return ExitCode.FAILED
    user_crontab.replace(before, after)
    if session.shows_results:
        output.line(done)
    return ExitCode.DONE


def _wanted(session: Session) -> Wanted:
    """Make the lines, and say what will not be as the configuration says."""
    from batchctl.cli import output
    from batchctl.schedule.crontab_lines import this_program, wanted

    configuration = session.configuration
    asked = wanted(configuration, this_program(), search_path=os.environ.get("PATH", ""), now=session.clock.now())
    if not asked.lines:
        raise ConfigurationError(
            f"{configuration.path}: nothing has a schedule, so there is nothing for cron to start; "
            "set batch.NAME.schedule or configure a rollup"
        )
    for each in (*asked.warnings, *asked.not_found):
        output.warning(each)
    if os.environ.get("BATCHCTL_DATABASE_URL"):
        output.warning("$BATCHCTL_DATABASE_URL is set here, but not under cron, which uses the configured database")
    return asked


def _named(session: Session) -> Path:
    """Name the configuration file, which may be broken or gone by now."""
    from batchctl import config_file

    named = session.config or os.environ.get("BATCHCTL_CONFIG")
    return Path(named).resolve() if named else config_file.find_file(None, os.environ).resolve()


def _can_ask() -> bool:
    from batchctl.cli.terminal import on_terminal

    return on_terminal() and sys.stdin is not None and sys.stdin.isatty()
