"""Steps 31, 32 and 33 of the demo: load one third of events.csv into the table fact_events.

A step may be started again at any time, because it first takes away what it loaded before, in the same transaction.
The database comes from PGHOST, PGPORT, PGUSER and PGDATABASE, which batchctl.toml sets for the step.
"""

# ruff: noqa: T201 - a step's output is its log

from __future__ import annotations

import argparse
import csv
from datetime import datetime
from decimal import Decimal
from itertools import islice
from pathlib import Path

import psycopg

THIRDS = ("31", "32", "33")
DELETE = "DELETE FROM public.fact_events WHERE account = %s AND step = %s"
COPY = """
COPY public.fact_events
    (occurred_at, event_type, item, quantity, value, country, customer_id, account, step)
FROM STDIN
"""


def event(row: dict[str, str]) -> tuple[object, ...]:
    """Make the columns of an event from a line of the file."""
    quantity = int(row["quantity"])
    value = (quantity * Decimal(row["unit_price"])).quantize(Decimal("0.01"))
    event_type = "return" if quantity < 0 else "sale"
    occurred_at = datetime.fromisoformat(row["invoiced_at"])
    return occurred_at, event_type, row["stock_code"], quantity, value, row["country"], row["customer_id"] or None


def main() -> None:
    """Replace this step's third of the events."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--step", required=True, choices=THIRDS)
    parser.add_argument("--account", required=True)
    parser.add_argument("--quantity", required=True, type=int, help="rows of one COPY, at most")
    options = parser.parse_args()
    loader = (options.account, options.step)
    size = max(options.quantity, 1)

    with Path("events.csv").open(encoding="utf-8", newline="") as file, psycopg.connect() as connection:
        deleted = connection.execute(DELETE, loader).rowcount
        print(f"Step {options.step}: removed {deleted:,} events of an earlier run")
        # Every third line: the first, fourth, seventh and so on for step 31.
        lines = islice(csv.DictReader(file), THIRDS.index(options.step), None, len(THIRDS))
        loaded = copies = 0
        while rows := list(islice(lines, size)):
            with connection.cursor().copy(COPY) as copy:
                for row in rows:
                    copy.write_row((*event(row), *loader))
            loaded += len(rows)
            copies += 1
        print(f"Step {options.step}: loaded {loaded:,} events in batches of up to {size:,} rows ({copies} COPY)")


if __name__ == "__main__":
    main()
