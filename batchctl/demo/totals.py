"""Compares the tables of the rollup with the source, in SQL of its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from batchctl.state.database import sql

if TYPE_CHECKING:
    from datetime import datetime
    from decimal import Decimal
    from typing import LiteralString

    from batchctl.state.database import Session

GRAINS = {"1m": "1 minute", "5m": "5 minutes", "1h": "1 hour"}
STATEMENT = Path(__file__).with_name("totals.sql")
TABLES = (
    """
    CREATE TABLE IF NOT EXISTS public.fact_events (
        event_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        occurred_at timestamptz NOT NULL,
        event_type text NOT NULL,
        item text NOT NULL,
        quantity integer NOT NULL,
        value numeric(12, 2) NOT NULL,
        country text NOT NULL,
        customer_id text,
        account text NOT NULL DEFAULT 'by hand',
        step text NOT NULL DEFAULT 'by hand'
    )
    """,
    "CREATE INDEX IF NOT EXISTS fact_events_occurred_at ON public.fact_events (occurred_at)",
    "COMMENT ON TABLE public.fact_events IS 'Sales and returns of a web shop, loaded by the steps 31, 32 and 33'",
    "COMMENT ON COLUMN public.fact_events.event_type IS 'sale, or return for a negative quantity'",
    "COMMENT ON COLUMN public.fact_events.value IS 'quantity times unit price'",
    "COMMENT ON COLUMN public.fact_events.step IS 'Which step of which account loaded it'",
)


class Comparison(NamedTuple):
    """What a grain's table and the source say of the same time."""

    source_events: int
    source_value: Decimal
    kept_events: int
    kept_value: Decimal
    buckets: int
    groups: int
    differing: int
    first_differing: datetime | None

    @property
    def equal(self) -> bool:
        """Tell whether the totals and every single group agree."""
        return not self.differing and (self.source_events, self.source_value) == (self.kept_events, self.kept_value)

    def line(self, grain: str) -> str:
        """Say it in words."""
        kept = f"agg_{grain}: {_amounts(self.kept_events, self.kept_value)}"
        if self.equal:
            return f"{kept} = source ({counted(self.buckets, 'bucket')}, all equal)"
        return (
            f"{kept}; the source has {_amounts(self.source_events, self.source_value)}: "
            f"{self.differing:,} of {self.groups:,} groups differ, first in bucket "
            f"{self.first_differing:%Y-%m-%d %H:%M:%S}"
        )


def make_source(session: Session) -> None:
    """Make the table of the events unless it is there."""
    # Unqualified it would land in the schema of the state, which has the role's name.
    if not session.run(sql.SQL("SELECT 1 WHERE to_regclass('public.fact_events') IS NOT NULL")):
        with session.transaction():
            for statement in TABLES:
                session.run(sql.SQL(statement))


def compare(session: Session, grain: str, until: datetime) -> Comparison:
    """Compare one grain with the source, group by group.

    Args:
        session: An open session.
        grain: One of `GRAINS`.
        until: Only events and buckets before it; where a bucket of every grain ends.
    """
    # The file is part of the program, as literal as a string in a module.
    text: LiteralString = STATEMENT.read_text(encoding="utf-8")
    statement = sql.SQL(text).format(
        width=sql.Literal(GRAINS[grain]), table=sql.Identifier("public", f"agg_{grain}"), until=sql.Literal(until)
    )
    return Comparison(*session.run(statement)[0])


def events_since(session: Session, instant: datetime) -> int:
    """Count the events that the comparison leaves out."""
    statement = sql.SQL("SELECT count(*) AS events FROM public.fact_events WHERE occurred_at >= {}")
    found: int = session.run(statement.format(sql.Literal(instant)))[0].events
    return found


def _amounts(events: int, value: Decimal) -> str:
    return f"{counted(events, 'event')}, value {value:,.2f}"


def counted(number: int, what: str) -> str:
    """Write a number of things."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"
