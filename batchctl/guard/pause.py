"""What keeps a paused job from starting, in words (pure)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def lifted_by(paused: Sequence[str]) -> str:
    """Name what is paused, and the command that lifts all of it: `daily, lifted by ...`."""
    # The name of a batch or a rollup covers all below it.
    job = paused[0] if len(paused) == 1 else paused[0].partition("/")[0]
    return f"{', '.join(paused)}, lifted by `batchctl unpause {job}`"
