from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from batchctl.config import Rollup, parse_duration
from batchctl.errors import ConfigurationError, ExitCode
from batchctl.rollup.definition import Places, Table, differences, read_definition
from batchctl.rollup.measure import read_measure

PATH = Path("/etc/batchctl.toml")


def rollup(**keys):
    return Rollup(**{"source": "fact_events", "time": "occurred_at", "measures": {"events": "count(*)"}} | keys)


def read(**keys):
    return read_definition("trend", rollup(**keys), PATH)


@pytest.mark.parametrize(
    ("text", "function", "expression"),
    [
        ("count(*)", "count", "*"),
        (" Count ( * ) ", "count", "*"),
        ("count(item)", "count", "item"),
        ("sum(value)", "sum", "value"),
        ("sum(quantity * (unit_price - 1))", "sum", "quantity * (unit_price - 1)"),
        ("min(coalesce(a, b))", "min", "coalesce(a, b)"),
        ("max(case when a = ')' then 1 end)", "max", "case when a = ')' then 1 end"),
        ("avg((a) + (b))", "avg", "(a) + (b)"),
        ("sum(length($tag$ ) ' $tag$))", "sum", "length($tag$ ) ' $tag$)"),
        (r"sum(length(e'it\') ; s'))", "sum", r"length(e'it\') ; s')"),
        ('sum("odd ) , name")', "sum", '"odd ) , name"'),
        ("sum(value % 10)", "sum", "value % 10"),
        ("STDDEV_POP(value)", "stddev_pop", "value"),
        ("count(DISTINCT lower(item))", "count distinct", "lower(item)"),
        ("count(distinct(item))", "count distinct", "(item)"),
        ("count(distinction)", "count", "distinction"),
        ("Percentile_Cont ( .95 ) WITHIN  GROUP (ORDER BY value - (a))", "percentile_cont", "value - (a)"),
    ],
)
def test_a_measure_is_a_function_of_an_expression(text, function, expression):
    measure = read_measure("m", text, "place")
    assert (measure.function, measure.expression) == (function, expression)


@pytest.mark.parametrize(
    "text",
    [
        "median(x)",
        "count(distinct)",
        "count(distinct *)",
        "count(distinct a, b)",
        "count(all x)",
        "stddev(distinct x)",
        "percentile_cont(0.5)",
        "percentile_cont(x)",
        "percentile_cont(0.5) within group (order by a, b)",
        "percentile_cont(0.5) within group (order by )",
        "count distinct(x)",
        "sum(ALL x)",
        "count()",
        "sum(*)",
        "sum(x) + 1",
        "sum(x) + sum(y)",
        "sum(x",
        "sum(x))",
        "sum((x)",
        "sum(a), sum(b)",
        "sum(a, b)",
        "sum('x)",
        'sum("x)',
        "sum(x -- all of it\n)",
        "sum(x /* all */)",
        "sum(x); drop table fact_events",
        "sum(1; 2)",
        "value",
        "",
    ],
)
def test_anything_else_is_refused_with_its_key(text):
    with pytest.raises(ConfigurationError) as caught:
        read(measures={"foo": text})
    message = str(caught.value)
    assert message.startswith("/etc/batchctl.toml: rollup.trend.measures.foo: found ")
    assert repr(text) in message
    assert "count(*), count(x), count(distinct x), sum(x), min(x), max(x), avg(x), " in message
    assert caught.value.exit_code == ExitCode.CONFIGURATION


@pytest.mark.parametrize("fraction", ["1.01", "2", "..5", "1.2.3"])
def test_a_percentile_is_of_a_fraction(fraction):
    with pytest.raises(ConfigurationError, match=r"measures\.m: .*a fraction from 0 to 1"):
        read_measure("m", f"percentile_cont({fraction}) within group (order by x)", "measures.m")


@pytest.mark.parametrize("fraction", ["0", "1", ".5", "0.95", "1.0"])
def test_a_percentile_is_written_as_it_is_read(fraction):
    measure = read_measure("m", f"percentile_cont({fraction}) within group (order by x)", "")
    assert measure.fraction == fraction
    assert read_measure("m", str(measure), "") == measure


@pytest.mark.parametrize("name", ["stddev", "stddev_samp", "stddev_pop", "variance", "var_samp", "var_pop"])
def test_a_spread_is_kept_as_count_sum_and_squares(name):
    measure = read_measure("m", f"{name}(v)", "")
    assert [part.column for part in measure.parts] == ["m_count", "m_sum", "m_squares"]
    assert {part.form.merged for part in measure.parts} == {"sum({column})"}


@pytest.mark.parametrize("where", ["a) or (b", "(a", "a; b", "a -- b", "a /* b", "a = 'b", 'a = "b'])
def test_a_filter_that_would_escape_is_refused(where):
    with pytest.raises(ConfigurationError, match=r"rollup\.trend\.where: found"):
        read(where=where)


def test_a_filter_may_hold_commas_and_quotes():
    assert read(where=" kind in ('a', 'b;') and x like '10%' ").where == "kind in ('a', 'b;') and x like '10%'"


def test_an_average_is_kept_as_sum_and_count():
    parts = read_measure("value_avg", "avg(value)", "").parts
    assert [(part.column, part.form.computed, part.form.merged) for part in parts] == [
        ("value_avg_sum", "sum({x})", "sum({column})"),
        ("value_avg_count", "count({x})", "sum({column})"),
    ]


@pytest.mark.parametrize(("function", "merge"), [("count", "sum"), ("sum", "sum"), ("min", "min"), ("max", "max")])
def test_how_a_measure_merges_upwards(function, merge):
    assert read_measure("m", f"{function}(x)", "").parts[0].form.merged == f"{merge}({{column}})"


@pytest.mark.parametrize(
    "keys",
    [
        {"measures": {"x": "avg(v)", "x_sum": "sum(v)"}},
        {"measures": {"x": "avg(v)", "x_count": "min(v)"}},
        {"measures": {"bucket": "count(*)"}},
        {"dimensions": ("bucket",)},
        {"measures": {"batchctl_x": "count(*)"}},
        {"dimensions": ("x_sum",), "measures": {"x": "avg(v)"}},
        {"dimensions": ("a", "a")},
        {"dimensions": ("events",)},
        {"measures": {"xmin": "min(x)"}},
        {"dimensions": ("batchctl_rows",)},
        {"dimensions": ("batchctl_row",)},
        {"measures": {"m" * 60: "avg(x)"}},
        {"measures": {"": "count(*)"}},
        {"time": " "},
    ],
)
def test_columns_that_collide_are_refused(keys):
    with pytest.raises(ConfigurationError, match=r"^/etc/batchctl\.toml: rollup\.trend\."):
        read(**keys)


def test_each_grain_is_built_from_the_one_before():
    definition = read()
    assert [(grain.name, grain.seconds, grain.target) for grain in definition.grains] == [
        ("1m", 60, "agg_1m"),
        ("5m", 300, "agg_5m"),
        ("1h", 3600, "agg_1h"),
    ]
    assert definition.finer("1m") is None
    assert definition.finer("1h") == definition.grain("5m")
    assert definition.coarser("1m") == (definition.grain("5m"),)
    assert definition.coarser("1h") == ()
    assert definition.job("5m") == "trend/5m"


def test_the_order_of_measures_is_not_a_change():
    one = read(measures={"a": "count(*)", "b": "sum(v)"})
    other = read(measures={"b": "SUM( v )", "a": "count( * )"})
    assert differences(one.as_json(), other.as_json()) == []


def test_a_change_is_named():
    changes = differences(
        read(measures={"a": "count(*)", "b": "sum(v)"}).as_json(),
        read(
            measures={"a": "count(*)", "b": "sum(w)", "c": "min(v)"}, dimensions=("item",), settle=parse_duration("1h")
        ).as_json(),
    )
    assert changes == [
        "dimensions: was [], now [item]",
        "measures.b: was 'sum(v)', now 'sum(w)'",
        "measures.c: was nothing, now 'min(v)'",
    ]


def test_places_survive_the_registry():
    places = Places(Table("public", "fact_events"), {"1m": Table("public", "agg_1m")})
    assert Places.from_json(places.as_json()) == places
    # Found anew by each `migrate`, and no reason to take the tables for others.
    types, extensions = {"price": "numeric"}, {"hll": "public"}
    read = Places.from_json(replace(places, types=types, extensions=extensions).as_json())
    assert (read.types, read.extensions) == (types, extensions)
    assert replace(places, types=types, extensions=extensions) == places


def test_events_are_counted_by_the_measure_that_counts_rows():
    assert read(measures={"n": "count(*)", "v": "count(v)"}).events == "n"
    assert read(measures={"v": "count(v)"}).events is None


def test_a_retention_in_which_nothing_is_ever_closed_is_refused():
    assert read().retention_seconds == 0
    assert read(source_retention=parse_duration("64s")).retention_seconds == 64
    with pytest.raises(ConfigurationError, match=r"source_retention: found 63 s.*expected more than 63 s"):
        read(source_retention=parse_duration("63s"))
    assert read(source_retention=parse_duration("30d")).as_json() == read().as_json()
