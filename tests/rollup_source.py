"""A source and its rollup for tests of exactness, and the oracle: what GROUP BY over the source says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from batchctl.config import Rollup
from batchctl.rollup.definition import read_definition

if TYPE_CHECKING:
    import psycopg

MEASURES = {
    "events": "count(*)",
    "valued": "count(value)",
    "value_sum": "sum(value)",
    "value_min": "min(value)",
    "value_max": "max(value)",
    "value_avg": "avg(value)",
    "weight_sum": "sum(weight)",
    "weight_max": "max(weight)",
}
"""Of numbers that add up exactly, and of floating point."""
BUCKETS = {
    "1m": "date_bin('1 minute', occurred_at, '2000-01-01Z')",
    "5m": "date_bin('5 minutes', occurred_at, '2000-01-01Z')",
    "1h": "date_bin('1 hour', occurred_at, '2000-01-01Z')",
}
"""The start of an event's bucket at each grain."""
GRAINS = tuple(BUCKETS)
FAR_FUTURE = "2090-01-01Z"
"""Events from here on are in buckets that no test sees closed."""

CONFIGURATION = """
[rollup.trend]
source = "fact_events"
time = "occurred_at"
dimensions = ["event_type", "item"]
settle = "0s"
[rollup.trend.measures]
""" + "".join(f'{name} = "{call}"\n' for name, call in MEASURES.items())

DEFINITION = read_definition(
    "trend",
    Rollup(source="fact_events", time="occurred_at", dimensions=("event_type", "item"), measures=MEASURES),
    Path("batchctl.toml"),
)
"""The same for tests that call the functions."""

_COLUMNS = """
id bigint NOT NULL DEFAULT nextval('fact_ids'), owner integer NOT NULL DEFAULT 0, occurred_at timestamptz,
event_type text, item text, value numeric, weight double precision
"""
PLAIN = f"""
CREATE SEQUENCE fact_ids;
CREATE TABLE fact_events ({_COLUMNS}, PRIMARY KEY (id));
CREATE INDEX ON fact_events (occurred_at);
"""
PARTITIONED = f"""
CREATE SEQUENCE fact_ids;
CREATE TABLE fact_events ({_COLUMNS}) PARTITION BY LIST (event_type);
CREATE TABLE views PARTITION OF fact_events FOR VALUES IN ('view') PARTITION BY LIST (item);
CREATE TABLE views_a PARTITION OF views FOR VALUES IN ('a');
CREATE TABLE views_rest PARTITION OF views DEFAULT;
CREATE TABLE rest PARTITION OF fact_events DEFAULT;
CREATE INDEX ON fact_events (occurred_at);
"""

# Floating point agrees up to rounding only: the order of adding up is the server's choice.
_ROUNDED = {"weight_sum"}
_TRUTH = f"""
SELECT {{bucket}}, event_type, item, {
    ", ".join(f"round({call}::numeric, 6)" if name in _ROUNDED else call for name, call in MEASURES.items())
}
FROM fact_events WHERE isfinite(occurred_at) AND occurred_at < '{FAR_FUTURE}' GROUP BY 1, 2, 3
"""
_KEPT = f"""
SELECT bucket, event_type, item, {
    ", ".join(f"round({name}::numeric, 6)" if name in _ROUNDED else name for name in MEASURES)
}
FROM agg_{{grain}}
"""


def create_source(connection: psycopg.Connection, source: str = PLAIN) -> None:
    """Create the table of events, in public whatever the server's role is called."""
    connection.execute(f"ALTER DATABASE {connection.info.dbname} SET search_path = public")
    connection.execute("SET search_path = public")
    connection.execute(source)


def differences(connection: psycopg.Connection) -> list[tuple]:
    """Return each row that only the source says or only a grain's table holds: (grain, side, bucket, …)."""
    found = []
    for grain, bucket in BUCKETS.items():
        truth, kept = _TRUTH.format(bucket=bucket), _KEPT.format(grain=grain)
        for side, one, other in (("missing", truth, kept), ("wrong", kept, truth)):
            # As text: Python knows neither years before Christ nor those after 9999.
            rows = connection.execute(f"SELECT t::text FROM (({one}) EXCEPT ALL ({other})) AS t").fetchall()
            found += [(grain, side, row[0]) for row in rows]
    return found
