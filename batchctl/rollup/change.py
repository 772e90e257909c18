"""Plans what a changed definition needs: a new version beside the old one, or the end of one that no longer fits."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from batchctl.errors import ConfigurationError
from batchctl.rollup import compose, partitions, views
from batchctl.rollup.definition import Places, next_name
from batchctl.rollup.source import find
from batchctl.rollup.steps import Step, completion, creation, removal, tracking
from batchctl.rollup.swap import Change, next_places
from batchctl.state.database import sql

if TYPE_CHECKING:
    from collections.abc import Sequence

    from batchctl.rollup.definition import Definition
    from batchctl.state.database import Session


class Beginning(NamedTuple):
    """What has to be made before the new version can be filled."""

    change: Change
    steps: tuple[Step, ...]
    missed: tuple[str, ...]
    """Tables whose changes the new version may have missed, so that it begins anew."""


def begin(session: Session, definition: Definition, before: Any, differences: Sequence[str]) -> Beginning:
    """Check a changed rollup against the database and list what is missing of its new version.

    Args:
        session: An open session.
        definition: As it is configured.
        before: The row of the registry for what is in use.
        differences: What differs, in words.

    Raises:
        ConfigurationError: it does not fit its source, or a name is somebody else's.
    """
    found = find(session, definition, None, set(Places.from_json(before.places).targets.values()))
    change = Change(before, definition, found, tuple(differences))
    _refuse_loss(session, change)
    # Only to see now rather than after hours that a name is taken.
    views.creation(session, definition, found)
    made, making = _row(session, definition.name), (next_name(definition.name), definition.as_json())
    if made is not None and _fits(session, made, change):
        complete = "unfinished" not in made.definition
        steps, missed = tracking(session, change.next_definition, change.next_found, again=complete)
        source = change.found.places.source
        steps += partitions.remembering(session, change.next_definition, source, queued=not complete)
        if not complete:
            steps, missed = [*steps, completion(session, change.next_definition.name)], []
        return Beginning(change, tuple(replace(step, expects=(making,)) for step in steps), tuple(missed))
    steps, _ = tracking(session, change.next_definition, change.next_found, again=False, afresh=True)
    source = change.found.places.source
    steps += partitions.remembering(session, change.next_definition, source, queued=True, afresh=True)
    rest = [replace(step, expects=(making,)) for step in (*steps, completion(session, change.next_definition.name))]
    create = creation(session, change.next_definition, change.next_found)
    return Beginning(change, (*discard(session, definition.name), create, *rest), ())


def discard(session: Session, name: str) -> tuple[Step, ...]:
    """List the steps that take a new version away, or what a swap has left of it; none if there is nothing."""
    new = next_name(name)
    ours = {"function": compose.function_name(new), "schema_name": session.schema_name}
    made, triggers = _row(session, name), session.fetch("rollup.find_triggers", **ours)
    if made is None and not triggers and session.fetch_one("rollup.find_function", **ours) is None:
        return ()
    steps = removal(session, new, made, triggers)
    if made is None:
        return tuple(replace(step, expects=((new, None),)) for step in steps)
    described = {key: value for key, value in made.definition.items() if key != "unfinished"}
    first, *rest = steps
    leaving = {**described, "dropping": True}
    return (
        replace(first, expects=((new, described),)),
        *(replace(step, expects=((new, leaving),)) for step in rest),
    )


def _refuse_loss(session: Session, change: Change) -> None:
    """Refuse to replace tables that hold what can no longer be computed."""
    definition = change.definition
    if not definition.retention_seconds:
        return
    floor = compose.floor(definition, definition.finest)
    for table in change.before_places.targets.values():
        if not session.fetch_one("rollup.name_taken", schema_name=table.schema, table=table.name).relation:
            continue
        statement = session.statement("swap.is_kept_only_here", target=sql.Identifier(*table), floor=floor)
        if session.run(statement)[0].kept:
            raise ConfigurationError(
                f"rollup.{definition.name} has changed ({'; '.join(change.differences)}), and {table} holds buckets "
                "older than its source_retention, which cannot be built anew; undo the change, or configure it as a "
                f"rollup of another name and target, or give them up: `batchctl migrate --drop {definition.name}`, "
                "then `batchctl migrate`"
            )


def _row(session: Session, name: str) -> Any:
    return next((row for row in session.fetch("rollup.registered") if row.rollup == next_name(name)), None)


def _fits(session: Session, made: Any, change: Change) -> bool:
    described = {key: value for key, value in made.definition.items() if key != "unfinished"}
    places = next_places(change.found.places)
    if described != change.definition.as_json() or Places.from_json(made.places) != places:
        return False
    return all(
        session.fetch_one("rollup.name_taken", schema_name=table.schema, table=table.name).relation
        for table in places.targets.values()
    )
