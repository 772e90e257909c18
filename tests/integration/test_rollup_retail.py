"""Exactness on sales data: BATCHCTL_RETAIL_CSV names a real file, else rows of the same shape are made up.

BATCHCTL_RETAIL_ROWS=all takes every row of the file, otherwise every tenth; the second kind of server always does.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import logging
import os
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from batchctl.clock import SystemClock
from batchctl.config import Rollup
from batchctl.rollup.ddl import migrate
from batchctl.rollup.definition import read_definition
from batchctl.rollup.refresh import Limits, tick
from batchctl.state.database import Database
from batchctl.state.migrate import upgrade

pytestmark = pytest.mark.any_user

CLOCK = SystemClock()
LOG = logging.getLogger("trend")
COLUMNS = ("invoice", "stock_code", "quantity", "invoiced_at", "unit_price", "customer_id", "country")
# The whole data set has that many lines.
ALL_ROWS = 541_909
SAMPLE = 10  # every so many rows
STEP = 1 if os.environ.get("BATCHCTL_RETAIL_ROWS") == "all" else SAMPLE
SEED = 20101201
GRAINS = {"1m": "1 minute", "5m": "5 minutes", "1h": "1 hour"}
DEFINITION = read_definition(
    "sales",
    Rollup(
        source="sales",
        time="invoiced_at",
        dimensions=("country",),
        measures={
            "lines": "count(*)",
            "known": "count(customer_id)",
            "quantity": "sum(quantity)",
            "revenue": "sum(quantity * unit_price)",
            "cheapest": "min(unit_price)",
            "dearest": "max(unit_price)",
            "line_average": "avg(quantity * unit_price)",
            "quantity_average": "avg(quantity)",
        },
        target="sales_{grain}",
    ),
    Path("batchctl.toml"),
)
TRUTH = """
SELECT date_bin('{width}', invoiced_at, '2000-01-01Z'), country, count(*), count(customer_id), sum(quantity),
    sum(quantity * unit_price), min(unit_price), max(unit_price), avg(quantity * unit_price), avg(quantity)
FROM sales GROUP BY 1, 2
"""
KEPT = """
SELECT bucket, country, lines, known, quantity, revenue, cheapest, dearest, line_average, quantity_average
FROM sales_{grain}
"""


def rows_of_file(path, step):
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        for row in itertools.islice(reader, 0, None, step):
            yield tuple(row[column] or None for column in COLUMNS)


def generated_rows(step):
    chances = random.Random(SEED)
    invoice, lines, moment = 536365, 0, datetime(2010, 12, 1, 8, 26, tzinfo=UTC)
    countries = ["United Kingdom"] * 20 + ["Germany", "France", "EIRE", None]
    for number in range(0, ALL_ROWS, step):
        if not lines:
            invoice, lines = invoice + 1, chances.randint(1, 40)
            moment += timedelta(minutes=chances.choice([0, 1, 3, 60, 600]))
            country, customer = chances.choice(countries), chances.choice([None, chances.randint(12346, 18287)])
        lines -= 1
        quantity = chances.choice([1, 1, 2, 6, 12, -1, chances.randint(1, 5000)])
        price = f"{chances.randint(0, 99999)}E-{chances.choice([2, 2, 3])}"
        yield (
            f"{'C' if quantity < 0 else ''}{invoice}",
            f"{number % 3700}",
            quantity,
            moment,
            price,
            customer,
            country,
        )


@pytest.fixture
def session(database_url):
    # A server's role may be called like our schema, which would then come first on its path.
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {connection.info.dbname} SET search_path = public")
        connection.execute(
            "CREATE TABLE sales (invoice text, stock_code text, quantity integer, invoiced_at timestamptz, "
            "unit_price numeric, customer_id integer, country text); CREATE INDEX ON sales (invoiced_at)"
        )
    with Database(conninfo_to_dict(database_url), "batchctl", CLOCK).connect() as session:
        upgrade(session)
        yield session


def load(session, rows):
    with session.connection.cursor().copy(f"COPY sales ({', '.join(COLUMNS)}) FROM STDIN") as copy:
        for row in rows:
            copy.write_row(row)


def aggregate(session):
    results = [tick(session, DEFINITION, grain, CLOCK, LOG, Limits(CLOCK.monotonic() + 600)) for grain in GRAINS]
    for result in results:
        print(result)  # noqa: T201 - the timing, for whoever asks with -s
    return results


def check(session):
    for grain, width in GRAINS.items():
        truth, kept = TRUTH.format(width=width), KEPT.format(grain=grain)
        for one, other in ((truth, kept), (kept, truth)):
            found = session.connection.execute(f"SELECT count(*) AS rows FROM (({one}) EXCEPT ALL ({other})) AS d")
            assert found.fetchone().rows == 0


def test_every_bucket_of_every_grain_equals_its_source(session, server):
    step = STEP if server._binaries is None else SAMPLE
    path = os.environ.get("BATCHCTL_RETAIL_CSV")
    rows = list(rows_of_file(path, step) if path else generated_rows(step))
    assert len(rows) == -(-ALL_ROWS // step)
    half = len(rows) // 2
    # Half of it is there before the rollup, half comes later: every other row, so that most buckets are done twice.
    load(session, rows[::2])
    session.connection.execute("ANALYZE sales")
    migrate(session, [DEFINITION], CLOCK)
    first = aggregate(session)
    check(session)
    load(session, rows[1::2])
    second = aggregate(session)
    check(session)
    assert [result.outcome for result in (*first, *second)] == ["success"] * 6
    assert [result.remaining_buckets for result in second] == [0, 0, 0]
    assert first[0].source_rows >= half
    assert session.connection.execute("SELECT sum(lines) AS lines FROM sales_1h").fetchone().lines == len(rows)
    session.connection.execute(
        "DELETE FROM sales WHERE quantity < 0; UPDATE sales SET country = NULL WHERE country = 'EIRE'"
    )
    aggregate(session)
    check(session)
