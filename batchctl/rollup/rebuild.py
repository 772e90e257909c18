"""Fills the new version of a rollup, until it is as far as the source is."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from batchctl.errors import BatchctlError
from batchctl.rollup.chunk import since
from batchctl.rollup.refresh import tick

if TYPE_CHECKING:
    from batchctl.rollup.apply import Manner
    from batchctl.rollup.result import Advance, GrainResult
    from batchctl.rollup.swap import Change
    from batchctl.state.database import Session

CAUGHT_UP_SECONDS = 5.0
"""What the new version lacks after so short a round is left to the ticks after it."""
ELSEWHERE_SECONDS = 1.0
"""How long to wait while another migration fills the same tables."""
NEWS_SECONDS = 5.0
"""How often somebody who waits is told how far it is."""


def fill(session: Session, change: Change, manner: Manner) -> bool:
    """Work off the history of a new version, all grains, newest first; False if it was taken away meanwhile.

    What was committed stays when this is interrupted, and the next call goes on from there.

    Args:
        session: An open session, no transaction begun.
        change: The change.
        manner: How; without a deadline.

    Raises:
        BatchctlError: a bucket cannot be computed by the new definition.
    """
    clock = manner.clock
    while True:
        begun = clock.monotonic()
        results = []
        for grain in change.definition.grains:
            result = _fill_grain(session, change, grain.name, manner)
            if result is None:
                return False
            results.append(result)
        outcomes = {result.outcome for result in results}
        if "skipped" in outcomes:
            clock.sleep(ELSEWHERE_SECONDS)
        elif (
            outcomes == {"empty"}
            or since(begun, clock) < CAUGHT_UP_SECONDS
            # Each round would compute the same buckets again; the ticks do that too.
            or change.definition.lookback_seconds
        ):
            return True


def _fill_grain(session: Session, change: Change, grain: str, manner: Manner) -> GrainResult | None:
    clock, say = manner.clock, manner.say
    log = manner.logger(change.definition.name)
    told = clock.monotonic()

    def progress(advance: Advance) -> None:
        nonlocal told
        if clock.monotonic() - told >= NEWS_SECONDS:
            told = clock.monotonic()
            say(f"rollup.{change.definition.name}: {advance.buckets:,} buckets of {grain} built so far")

    reason = None
    try:
        limits = replace(manner.limits, deadline=math.inf, progress=progress)
        result = tick(session, change.next_definition, grain, clock, log, limits)
        reason = result.reason if result.outcome == "failed" else None
    except BatchctlError:
        if _stands(session, change):
            raise
        return None
    if not _stands(session, change):
        return None
    if reason is not None:
        raise BatchctlError(
            f"rollup.{change.definition.name}: its new tables cannot be built, the old ones stay: {grain}: {reason}. "
            "Correct the source, or the definition, and run `batchctl migrate` again; what is built already is kept"
        )
    if result.buckets:
        say(f"rollup.{change.definition.name}: {grain} built ({result.buckets:,} buckets)")
    return result


def _stands(session: Session, change: Change) -> bool:
    """Tell whether the new version is still what is configured here."""
    rows = session.fetch("rollup.registered")
    return any(
        row.rollup == change.next_definition.name and row.definition == change.definition.as_json() for row in rows
    )
