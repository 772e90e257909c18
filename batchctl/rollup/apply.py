"""Runs the steps of a migration, each in a transaction of its own that holds up the application for a moment only."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from batchctl.errors import BatchctlError
from batchctl.rollup.steps import LOCK_MILLISECONDS, LOCK_TIMEOUT
from batchctl.state.database import sql

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from logging import Logger

    from batchctl.clock import Clock
    from batchctl.rollup.refresh import Limits
    from batchctl.rollup.steps import Step
    from batchctl.state.database import Session

PAUSE_SECONDS = 0.8
PATIENCE_SECONDS = 30.0
PASSING = {"unfinished"}
"""What a registered definition carries for a while, and what no step expects or forbids."""


class Manner(NamedTuple):
    """How a migration goes about its work."""

    clock: Clock
    """Waits between attempts."""
    patience: float
    """Seconds after which a table that is never free is given up."""
    logger: Callable[[str], Logger]
    """Makes the logger of a rollup that is built anew."""
    say: Callable[[str], None]
    """Takes a line for somebody who waits."""
    limits: Limits
    """How many chunks of new tables are built at a time."""


def exclude_others(session: Session) -> None:
    """Let no other migration look or change anything until the transaction that is open has ended."""
    # The lock is only ours, so no timeout that the role has for the application's sake may end the wait for it.
    session.run(session.statement("rollup.set_lock_timeout", milliseconds=sql.Literal(0)))
    session.run(_one_migration(session))


def apply(session: Session, step: Step, clock: Clock, patience: float) -> bool:
    """Run a step in a transaction, again and again while a table that it locks is busy; False if it is obsolete.

    Args:
        session: An open session, no transaction begun.
        step: The step.
        clock: Waits between the attempts.
        patience: Seconds after which a table that is never free is given up.

    Raises:
        BatchctlError: it was never free.
    """
    give_up = clock.monotonic() + patience
    while True:
        try:
            with session.transaction():
                return _run(session, step)
        except BatchctlError as error:
            if getattr(error.__cause__, "sqlstate", None) not in LOCK_TIMEOUT:
                raise
            if clock.monotonic() >= give_up:
                raise BatchctlError(
                    f"{step.locks} was locked for {patience:.0f} s, by a long transaction or another migration; what "
                    "was done so far stays. Run the command again when that has ended (pg_stat_activity shows it)"
                ) from error
        clock.sleep(PAUSE_SECONDS)


def text(session: Session, steps: Iterable[Step]) -> Iterable[str]:
    """Write steps as SQL, transactions included."""
    for step in steps:
        yield "BEGIN;"
        yield "SET LOCAL lock_timeout = 0;"
        yield f"{_one_migration(session).as_string()};"
        if step.locks:
            yield f"SET LOCAL lock_timeout = {LOCK_MILLISECONDS};"
        yield from (f"{statement.as_string()};" for statement in step.statements)
        yield "COMMIT;"


def _one_migration(session: Session) -> sql.Composed:
    return session.statement("rollup.one_migration", name=sql.Literal(session.schema_name))


def _run(session: Session, step: Step) -> bool:
    exclude_others(session)
    if step.expects:
        found = {row.rollup: row.definition for row in session.fetch("rollup.registered")}
        for rollup, definition in step.expects:
            present = found.get(rollup)
            if present is not None:
                present = {key: value for key, value in present.items() if key not in PASSING}
            if present != definition:
                return False
    if step.locks:
        session.run(session.statement("rollup.set_lock_timeout", milliseconds=sql.Literal(LOCK_MILLISECONDS)))
    for statement in step.statements:
        session.run(statement)
    return True
