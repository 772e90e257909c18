"""Steps 61, 62 and 63 of the demo: write the top items of fact_events to out/ as CSV.

The file is complete or the former one: it is written under another name and then renamed.
The database comes from PGHOST, PGPORT, PGUSER and PGDATABASE, which batchctl.toml sets for the step.
"""

# ruff: noqa: T201 - a step's output is its log

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import psycopg

BY_VALUE = """
SELECT item, sum(value) AS value, sum(quantity) AS quantity
FROM public.fact_events
WHERE account = %(account)s
GROUP BY item
ORDER BY sum(value) DESC, item
LIMIT %(top)s
"""
BY_QUANTITY = """
SELECT item, sum(quantity) AS quantity, sum(value) AS value
FROM public.fact_events
WHERE account = %(account)s
GROUP BY item
ORDER BY sum(quantity) DESC, item
LIMIT %(top)s
"""
BY_COUNTRY = """
SELECT country, place, item, value
FROM (
    SELECT
        country, item, sum(value) AS value,
        row_number() OVER (PARTITION BY country ORDER BY sum(value) DESC, item) AS place
    FROM public.fact_events
    WHERE account = %(account)s
    GROUP BY country, item
) AS ranked
WHERE place <= %(top)s
ORDER BY country, place
"""
EXPORTS = {
    "61": ("top-items-by-value", BY_VALUE),
    "62": ("top-items-by-quantity", BY_QUANTITY),
    "63": ("top-items-by-country", BY_COUNTRY),
}


def main() -> None:
    """Write this step's file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--step", required=True, choices=EXPORTS)
    parser.add_argument("--account", required=True)
    parser.add_argument("--quantity", required=True, type=int, help="how many top items")
    options = parser.parse_args()
    name, query = EXPORTS[options.step]

    with psycopg.connect() as connection:
        cursor = connection.execute(query, {"account": options.account, "top": options.quantity})
        columns = [column.name for column in cursor.description or ()]
        rows = cursor.fetchall()
    path = Path("out", f"{options.account}-{name}.csv")
    path.parent.mkdir(exist_ok=True)
    new = path.with_suffix(".csv.new")
    with new.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
    new.replace(path)
    print(f"Step {options.step}: wrote {len(rows):,} rows to {path}")


if __name__ == "__main__":
    main()
