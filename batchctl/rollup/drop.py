"""Takes away what a rollup has in the database."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from batchctl.errors import BatchctlError, ConfigurationError, UsageError
from batchctl.rollup import apply, change, compose, views
from batchctl.rollup.apply import PATIENCE_SECONDS
from batchctl.rollup.definition import NEXT, Places, Table
from batchctl.rollup.steps import removal

if TYPE_CHECKING:
    from collections.abc import Iterable

    from batchctl.clock import Clock
    from batchctl.state.database import Session


def triggers_of(session: Session, name: str) -> list[Any]:
    """List the triggers that call the function of a rollup."""
    function = compose.function_name(name)
    return session.fetch("rollup.find_triggers", function=function, schema_name=session.schema_name)


def check_droppable(
    session: Session, name: str, registered: Any, triggers: Iterable[Any], verb: str = "dropped"
) -> None:
    """Refuse what would fail later, half done."""
    # A source first: what is said of a target holds for a table that is both.
    wanted = {Table(row.schema, row.table): False for row in triggers}
    if registered is not None:
        targets = Places.from_json(registered.places).targets
        wanted |= dict.fromkeys(targets.values(), True)
        for grain, target in targets.items():
            wanted |= dict.fromkeys(views.existing(session, name, grain, target), True)
    rows = session.fetch(
        "rollup.undroppable",
        schemas=[table.schema for table in wanted],
        names=[table.name for table in wanted],
        targets=list(wanted.values()),
    )
    if foreign := [row.table for row in rows if row.foreign]:
        raise ConfigurationError(
            f"rollup.{name} cannot be {verb} by this role, which does not own {', '.join(foreign)}; "
            "connect as the owner, or as a member of it"
        )
    if depending := [f"{', '.join(row.dependants)} on {row.table}" for row in rows if row.dependants]:
        raise BatchctlError(
            f"rollup.{name} cannot be {verb}, because something else depends on its tables: {'; '.join(depending)}"
        )


def drop(
    session: Session, name: str, clock: Clock, *, dry_run: bool = False, patience: float = PATIENCE_SECONDS
) -> tuple[str, ...]:
    """Take triggers, function, tables, queue and state of a rollup away, and a half-built new version; return the SQL.

    Raises:
        UsageError: there is no such rollup in the database.
        ConfigurationError: a table belongs to another role.
        BatchctlError: a table stayed locked, or something else depends on one; call again.
    """
    rows = [row for row in session.fetch("rollup.registered") if not row.rollup.endswith(NEXT)]
    registered = next((row for row in rows if row.rollup == name), None)
    triggers = triggers_of(session, name)
    if registered is None and (not triggers or name.endswith(NEXT)):
        known = ", ".join(row.rollup for row in rows) or "(none)"
        raise UsageError(f"rollup {name!r} is not in the database; expected one of {known}")
    check_droppable(session, name, registered, triggers)
    steps = [*change.discard(session, name), *removal(session, name, registered, triggers)]
    if not dry_run:
        for step in steps:
            if not apply.apply(session, step, clock, patience):
                return drop(session, name, clock, patience=patience)
    return tuple(apply.text(session, steps))
