from __future__ import annotations

import logging
import math
import os
import random
import statistics
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import tuple_row
from support import skip_or_fail

from batchctl.clock import SystemClock
from batchctl.config import Rollup
from batchctl.errors import ConfigurationError, ExitCode
from batchctl.rollup.ddl import migrate
from batchctl.rollup.definition import read_definition
from batchctl.rollup.drop import drop
from batchctl.rollup.refresh import tick
from batchctl.state.database import Database
from batchctl.state.migrate import upgrade

pytestmark = pytest.mark.any_user

CLOCK = SystemClock()
LOG = logging.getLogger("trend")
SEED = int(os.environ.get("BATCHCTL_TEST_SEED", "0")) or random.SystemRandom().randrange(1, 10**9)
WIDTHS = {"1m": "1 minute", "5m": "5 minutes", "1h": "1 hour"}
SPREADS = ("stddev", "stddev_samp", "stddev_pop", "variance", "var_samp", "var_pop")
TYPES = {
    "small": "smallint",
    "whole": "integer",
    "big": "bigint",
    "price": "numeric",
    "ratio": "real",
    "wide": "double precision",
}


@pytest.fixture
def session(database_url):
    # A server's role may be called like our schema, which would then come first on its path.
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {connection.info.dbname} SET search_path = public")
        connection.execute(
            "CREATE TABLE fact_events (occurred_at timestamptz, item text, "
            f"{', '.join(f'{name} {kind}' for name, kind in TYPES.items())}); CREATE INDEX ON fact_events (occurred_at)"
        )
    with Database(conninfo_to_dict(database_url), "batchctl", CLOCK).connect() as session:
        upgrade(session)
        yield session


def define(measures, **keys):
    keys = {"source": "fact_events", "time": "occurred_at", "dimensions": ("item",)} | keys
    return read_definition("trend", Rollup(measures=measures, **keys), Path("batchctl.toml"))


def query(session, text):
    with session.connection.cursor(row_factory=tuple_row) as cursor:
        return cursor.execute(text).fetchall()


def aggregate(session, definition):
    found = [tick(session, definition, grain.name, CLOCK, LOG) for grain in definition.grains]
    assert all(result.outcome == "success" for result in found), found
    return found


def close(one, other, tolerance):
    """Compare two numbers as numbers; NULL, NaN and infinity are equal to themselves only."""
    if one is None or other is None or not math.isfinite(one) or not math.isfinite(other):
        return repr(one) == repr(other)
    # PostgreSQL takes the root of a variance of 16 digits to as many places as that has, which may be none.
    last = 10.0 ** one.as_tuple().exponent if isinstance(one, Decimal) else 1e-12
    return math.isclose(one, other, rel_tol=tolerance, abs_tol=last)


def spreads():
    return {f"{function}_{column}": f"{function}({column})" for function in SPREADS for column in TYPES}


def fill(session, chances, rows):
    special = [None, "NaN", "Infinity", "-Infinity"]
    with session.connection.cursor() as cursor:
        for _ in range(rows):
            item = chances.choice(["a", "b", "c", None])
            strange = special if item == "c" and chances.random() < 0.2 else [None]
            number = chances.choice([chances.uniform(-1000, 1000), 1e9 + chances.random(), 0, chances.random() * 1e-9])
            cursor.execute(
                "INSERT INTO fact_events VALUES (%s, %s, %s, %s, %s, %s, %s, %s)",
                [
                    f"2025-11-13 06:{chances.randrange(60):02d}:{chances.randrange(60):02d}Z",
                    item,
                    chances.choice([None, chances.randint(-32768, 32767)]),
                    chances.choice([None, chances.randint(-(2**31), 2**31 - 1)]),
                    chances.choice([None, chances.randint(-(2**63), 2**63 - 1)]),
                    chances.choice([*strange, Decimal(chances.randint(-(10**12), 10**12)).scaleb(-4)]),
                    chances.choice([*strange, number]),
                    chances.choice([*strange, number]),
                ],
            )


def test_spreads_are_postgresqls_own_at_every_grain(session):
    print(f"BATCHCTL_TEST_SEED={SEED}")  # noqa: T201 - shown with a failure, to play it again
    fill(session, random.Random(SEED), 400)
    definition = define(spreads())
    migrate(session, [definition], CLOCK)
    aggregate(session, definition)
    seen = set()
    for grain, width in WIDTHS.items():
        own = query(
            session,
            f"SELECT date_bin('{width}', occurred_at, '2000-01-01Z'), item, {', '.join(spreads().values())} "
            "FROM fact_events GROUP BY 1, 2 ORDER BY 1, 2",
        )
        kept = query(session, f"SELECT bucket, item, {', '.join(spreads())} FROM agg_{grain} ORDER BY 1, 2")
        assert len(own) == len(kept) > 3
        for truth, found in zip(own, kept, strict=True):
            assert truth[:2] == found[:2]
            for name, one, other in zip(spreads(), truth[2:], found[2:], strict=True):
                assert type(one) is type(other), (name, one, other)
                # PostgreSQL itself rounds doubles at each row; a mean of 1e9 leaves few digits.
                tolerance = 1e-12 if isinstance(one, Decimal) else 1e-3
                assert close(one, other, tolerance), (grain, name, truth[:2], one, other)
                seen.add("NULL" if one is None else "NaN" if math.isnan(one) else "0" if one == 0 else "number")
    assert seen == {"NULL", "NaN", "0", "number"}


def test_the_types_of_spreads_are_postgresqls_own(session):
    migrate(session, [define(spreads())], CLOCK)
    kinds = dict(
        query(session, "SELECT attname, atttypid::regtype::text FROM pg_attribute WHERE attrelid = 'agg_1h'::regclass")
    )
    types = ", ".join(f"pg_typeof({call})::text" for call in spreads().values())
    own = query(session, f"SELECT {types} FROM (SELECT) AS one LEFT JOIN fact_events ON true")
    assert tuple(kinds[name] for name in spreads()) == own[0]
    assert kinds["var_pop_whole_squares"] == kinds["var_pop_wide_squares"] == "numeric"


def test_a_large_mean_does_not_spoil_a_small_spread(session):
    chances = random.Random(SEED)
    values = [1e9 + chances.random() * 1e-3 for _ in range(500)]
    with session.connection.cursor() as cursor:
        for number, value in enumerate(values):
            cursor.execute(
                "INSERT INTO fact_events (occurred_at, wide) VALUES (%s, %s)",
                [f"2025-11-13 06:{number % 60:02d}Z", value],
            )
    definition = define({"sd": "stddev_pop(wide)"})
    migrate(session, [definition], CLOCK)
    aggregate(session, definition)
    truth = math.sqrt(statistics.pvariance([Fraction(value) for value in values]))
    ((found,),) = query(session, "SELECT sd FROM agg_1h")
    assert math.isclose(found, truth, rel_tol=1e-12)
    # The negative control: the same formula in double precision has no right digit.
    ((naive,),) = query(session, "SELECT sqrt(abs(avg(wide * wide) - avg(wide) ^ 2)) FROM fact_events")
    assert not math.isclose(naive, truth, rel_tol=0.5)


def test_a_group_without_values_and_one_with_a_single_value(session):
    session.connection.execute(
        "INSERT INTO fact_events (occurred_at, item, whole) VALUES "
        "('2025-11-13 06:01Z', 'none', NULL), ('2025-11-13 06:01Z', 'one', 5), ('2025-11-13 06:01Z', NULL, 7)"
    )
    measures = {"samp": "stddev(whole)", "pop": "stddev_pop(whole)", "mean": "avg(whole)", "n": "count(whole)"}
    definition = define(measures)
    migrate(session, [definition], CLOCK)
    aggregate(session, definition)
    for grain in WIDTHS:
        assert query(session, f"SELECT item, n, mean, samp, pop FROM agg_{grain} ORDER BY 1") == [
            ("none", 0, None, None, None),
            ("one", 1, 5, None, 0),
            (None, 1, 7, None, 0),
        ]


def test_what_has_no_finite_sum_is_kept_as_postgresql_has_it(session):
    session.connection.execute(
        "INSERT INTO fact_events (occurred_at, item, price, wide) VALUES "
        "('2025-11-13 06:01Z', 'a', 'NaN', 'NaN'), ('2025-11-13 06:02Z', 'a', 1, 1), "
        "('2025-11-13 06:01Z', 'b', 'Infinity', 'Infinity'), ('2025-11-13 06:02Z', 'b', 2, 2), "
        "('2025-11-13 06:01Z', 'c', 'Infinity', 'Infinity'), ('2025-11-13 06:02Z', 'c', '-Infinity', '-Infinity')"
    )
    measures = {
        f"{function}_{column}": f"{function}({column})"
        for function in ("sum", "min", "max", "avg", "count", *SPREADS)
        for column in ("price", "wide")
    }
    definition = define(measures)
    migrate(session, [definition], CLOCK)
    aggregate(session, definition)
    own = query(session, f"SELECT item, {', '.join(measures.values())} FROM fact_events GROUP BY 1 ORDER BY 1")
    kept = query(session, f"SELECT item, {', '.join(measures)} FROM agg_1h ORDER BY 1")
    assert repr(kept) == repr(own)


def test_a_filter_keeps_what_is_true_and_leaves_out_null(session):
    session.connection.execute(
        "INSERT INTO fact_events (occurred_at, item, whole) VALUES "
        "('2025-11-13 06:01Z', '10%', 1), ('2025-11-13 06:01Z', 'it''s; (x', 2), ('2025-11-13 06:01Z', NULL, 4), "
        "('2025-11-13 06:01Z', '10%', NULL), ('2025-11-13 06:01Z', 'c', 16)"
    )
    where = "item LIKE '10%' AND whole % 2 = 1 OR item = 'it''s; (x' OR whole IS NULL AND false"
    definition = define({"n": "count(*)", "total": "sum(whole)"}, where=where, dimensions=())
    migrate(session, [definition], CLOCK)
    aggregate(session, definition)
    for grain in WIDTHS:
        assert query(session, f"SELECT n, total FROM agg_{grain}") == [(2, 3)]


@pytest.fixture
def sketching(session):
    """A session with both extensions in a schema that is on no search path."""
    available = {name for (name,) in query(session, "SELECT name FROM pg_available_extensions")}
    if not {"hll", "tdigest"} <= available:
        if query(session, "SELECT version() LIKE '%Debian%'") == [(True,)]:
            skip_or_fail("postgresql-15-hll and postgresql-15-tdigest are not installed")
        pytest.skip("the embedded server has no extensions of others")
    session.connection.execute('CREATE SCHEMA "odd %s"')
    for name in ("hll", "tdigest"):
        session.connection.execute(f'CREATE EXTENSION {name} SCHEMA "odd %s"')
    return session


SKETCHES = {
    "items": "count(distinct price)",
    "median": "percentile_cont(0.5) within group (order by wide)",
    "p95": "percentile_cont(0.95) within group (order by wide)",
}


def test_sketches_come_near_the_truth_at_every_grain(sketching):
    print(f"BATCHCTL_TEST_SEED={SEED}")  # noqa: T201 - shown with a failure, to play it again
    sketching.connection.execute(f"SELECT setseed({SEED % 1000 / 1000})")
    sketching.connection.execute(
        "INSERT INTO fact_events (occurred_at, item, price, wide) "
        "SELECT '2025-11-13 06:00Z'::timestamptz + random() * interval '1 hour', 'a', floor(random() * 5000), "
        "random() FROM generate_series(1, 20000)"
    )
    definition = define(SKETCHES)
    migrate(sketching, [definition], CLOCK)
    aggregate(sketching, definition)
    for grain, width in WIDTHS.items():
        own = query(
            sketching,
            f"SELECT date_bin('{width}', occurred_at, '2000-01-01Z'), {', '.join(SKETCHES.values())} FROM fact_events "
            "GROUP BY 1 ORDER BY 1",
        )
        kept = query(sketching, f"SELECT bucket, items, median, p95 FROM agg_{grain} ORDER BY 1")
        for truth, found in zip(own, kept, strict=True):
            assert truth[0] == found[0]
            assert math.isclose(truth[1], found[1], rel_tol=0.12), (grain, truth, found)
            # Of values that are spread evenly from 0 to 1, an error of the value is one of the rank.
            assert math.isclose(truth[2], found[2], abs_tol=0.04), (grain, truth, found)
            assert math.isclose(truth[3], found[3], abs_tol=0.04), (grain, truth, found)


def test_what_did_not_change_is_not_written_again(sketching):
    sketching.connection.execute(
        "INSERT INTO fact_events (occurred_at, price, wide) "
        "SELECT '2025-11-13 06:00Z'::timestamptz + random() * interval '1 hour', n, n FROM generate_series(1, 3000) n"
    )
    definition = define(SKETCHES)
    migrate(sketching, [definition], CLOCK)
    aggregate(sketching, definition)
    # Another order of the same rows.
    sketching.connection.execute(
        "CREATE TABLE again AS SELECT * FROM fact_events ORDER BY random(); DELETE FROM fact_events; "
        "INSERT INTO fact_events SELECT * FROM again"
    )
    (_, fives, hours) = [tick(sketching, definition, grain.name, CLOCK, LOG) for grain in definition.grains]
    assert (fives.buckets, hours.buckets) == (0, 0)
    sketching.connection.execute("UPDATE fact_events SET wide = wide + 1 WHERE wide = 7")
    assert [result.rows_written for result in aggregate(sketching, definition)] == [1, 1, 1]


def test_few_distinct_values_are_counted_exactly_by_equality(sketching):
    sketching.connection.execute(
        "INSERT INTO fact_events (occurred_at, item, price, wide) VALUES "
        "('2025-11-13 06:01Z', 'a', 1.0, 'NaN'), ('2025-11-13 06:01Z', 'a', 1.00, 1), "
        "('2025-11-13 06:02Z', 'a', 1, 'Infinity'), ('2025-11-13 06:02Z', 'a', NULL, '-Infinity'), "
        "('2025-11-13 06:02Z', 'b', NULL, NULL), ('2025-11-13 06:02Z', NULL, 2, 3)"
    )
    definition = define(SKETCHES)
    migrate(sketching, [definition], CLOCK)
    aggregate(sketching, definition)
    for grain in ("5m", "1h"):
        assert query(sketching, f"SELECT item, items, median FROM agg_{grain} ORDER BY 1") == [
            ("a", 1, 1.0),
            ("b", 0, None),
            (None, 1, 3.0),
        ]
    assert drop(sketching, "trend", CLOCK)


def test_a_type_that_cannot_be_hashed_is_refused(sketching):
    with pytest.raises(ConfigurationError, match=r"rollup\.trend\.measures\.n: .*hash function for type point"):
        migrate(sketching, [define({"n": "count(distinct point(1, wide))"})], CLOCK)


@pytest.mark.parametrize(("extension", "text"), [("hll", SKETCHES["items"]), ("tdigest", SKETCHES["median"])])
def test_an_extension_that_is_missing_is_named_with_its_package(session, extension, text):
    before = query(session, "SELECT count(*) FROM pg_class")
    place = r"rollup\.trend\.measures\.m: found "
    with pytest.raises(ConfigurationError, match=rf"{place}.*the extension {extension}") as caught:
        migrate(session, [define({"m": text})], CLOCK)
    assert caught.value.exit_code == ExitCode.CONFIGURATION
    message = str(caught.value)
    assert f"run `CREATE EXTENSION {extension}` in this database" in message
    ((available, major),) = query(
        session,
        f"SELECT EXISTS (SELECT FROM pg_available_extensions WHERE name = '{extension}'), "
        "current_setting('server_version_num')::integer / 10000",
    )
    assert (f"postgresql-{major}-{extension}" in message) is not available
    assert query(session, "SELECT count(*) FROM pg_class") == before
