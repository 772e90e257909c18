"""What a call did to a grain, and how far it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

Outcome = Literal["success", "empty", "skipped", "failed"]


@dataclass(frozen=True)
class GrainResult:
    """What one call did to one grain; the fields are the keys of the JSON document."""

    rollup: str
    grain: str
    outcome: Outcome
    reason: str | None = None
    buckets: int = 0
    source_rows: int = 0
    """Rows read: of the source for the finest grain, of the next finer table for the others."""
    rows_written: int = 0
    rows_deleted: int = 0
    remaining_buckets: int = 0
    """Closed and still queued."""
    duration_seconds: float = 0.0
    ignored_buckets: int = 0
    """Changed in the source and not recomputed, because they are older than `source_retention`."""
    detail: str | None = None
    """Of a skip: the reason in words."""


class Advance(NamedTuple):
    """How far the backlog of a grain is: the closed buckets that waited at first, buckets done, rows read for them."""

    rollup: str
    grain: str
    waiting: int
    buckets: int
    source_rows: int
