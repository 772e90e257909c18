"""A bucket on its way through a tick: in seconds since 1970, because PostgreSQL knows years that Python does not."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import NamedTuple

EARLIEST = datetime.min.replace(tzinfo=UTC).timestamp()
"""The first second that can be shown without the help of PostgreSQL."""


class Bucket(NamedTuple):
    """A bucket that is to be computed: its start and end as seconds since 1970, and as it is shown."""

    start: int
    end: int
    shown: str


def shown(start: float) -> str:
    """Write the start of a bucket, given as seconds since 1970, for people."""
    return datetime.fromtimestamp(start, UTC).replace(tzinfo=None).isoformat(" ", "seconds")
