"""Measures: how the configuration writes them, the columns they are kept in, how each merges upwards."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import NamedTuple

from batchctl.errors import ConfigurationError

ALLOWED = (
    "count(*), count(x), count(distinct x), sum(x), min(x), max(x), avg(x), stddev(x), stddev_samp(x), stddev_pop(x), "
    "variance(x), var_samp(x), var_pop(x) or percentile_cont(0.95) within group (order by x)"
)
"""Every measure that merges upwards."""

DOUBLE = "double precision"
DISTINCT = "count distinct"
PERCENTILE = "percentile_cont"

CALL = re.compile(r"\s*([A-Za-z_]+)\s*\((.*)\)\s*", re.DOTALL)
UNIQUE = re.compile(r"distinct\b(.*)", re.DOTALL | re.IGNORECASE)
WITHIN = re.compile(
    r"\s*percentile_cont\s*\(\s*([\d.]+)\s*\)\s*within\s+group\s*\(\s*order\s+by\b(.*)\)\s*", re.DOTALL | re.IGNORECASE
)
TOKEN = re.compile(
    r"""
      (?<!\w)[eE]'(?:[^'\\]|\\.|'')*'             # text with escapes
    | '(?:[^']|'')*'                              # text
    | "(?:[^"]|"")*"                              # a quoted name
    | (?<![\w$])(\$(?:[A-Za-z_]\w*)?\$).*?\1      # text between dollars
    | (?P<comment>--|/\*)
    | (?P<character>.)
    """,
    re.DOTALL | re.VERBOSE,
)


class Form(NamedTuple):
    """How a stored column is made, in SQL with places in braces: x, the column, the schema of an extension."""

    computed: str
    """From rows of the source."""
    merged: str
    """From the rows of finer buckets."""
    meaning: str
    """In words or in SQL, for people."""
    wide: str = ""
    """From rows of the source where PostgreSQL itself computes in double precision, if that differs."""
    compared: str = ""
    """What tells two values apart, by an operator that is there on every search path; empty for the column itself."""


class Function(NamedTuple):
    """A function of SQL as a rollup keeps it."""

    forms: dict[str, Form]
    """The stored columns: what their names end with, and how each is made."""
    value: str = ""
    """The value that is shown, computed from those columns in one row; empty if a column is the value."""
    type: str = ""
    """The type of that value, empty for the one that PostgreSQL gives to its own function."""
    extension: str = ""
    """The extension of PostgreSQL that it needs."""


def _plain(function: str, merge: str, wide: str = "") -> Form:
    return Form(f"{function}({{x}})", f"{merge}({{column}})", f"{function}({{x}})", wide)


COUNT = _plain("count", "sum")

# In numeric every sum is exact, so that neither the order of the rows nor a mean that is large beside the differences
# spoils what the squares leave over. A cast of a double to numeric would cut it to 15 digits; the shortest text of it
# is as near as a double can tell, and that of its fraction alone nearer still.
EXACT = "({x})::numeric"
WIDE = f"({{x}})::{DOUBLE}"
EXACT_WIDE = f"(trunc({WIDE})::text::numeric + ({WIDE} - trunc({WIDE}))::text::numeric)"
SPREAD = {
    "_count": COUNT,
    "_sum": Form(f"sum({EXACT})", "sum({column})", "sum({x}), exactly", f"sum({EXACT_WIDE})"),
    "_squares": Form(
        f"sum({EXACT} * {EXACT})", "sum({column})", "sum({x} * {x}), exactly", f"sum({EXACT_WIDE} * {EXACT_WIDE})"
    ),
}
# NaN is greater than 0 here, and infinity less infinity is NaN, which are PostgreSQL's own answers.
SAMPLE = "greatest({count} * {squares} - {sum} * {sum}, 0) / ({count}::numeric * ({count} - 1))"
POPULATION = "greatest({count} * {squares} - {sum} * {sum}, 0) / ({count}::numeric * {count})"


def _spread(variance: str, least: int, root: str = "") -> Function:
    return Function(SPREAD, f"CASE WHEN {{count}} >= {least} THEN ({root}({variance}))::{{type}} END")


# Both sketches are made with their size written down, because the extension's defaults can be set by a session.
HLL = Form(
    # Equal values have equal hashes by PostgreSQL's own function: 1.0 and 1.00, for instance, which hll_hash_any
    # takes for two.
    "{extension}.hll_add_agg({extension}.hll_hash_bigint(hash_array_extended(ARRAY[{x}], 0)), 11, 5, -1, 1)"
    " FILTER (WHERE ({x}) IS NOT NULL)",
    "{extension}.hll_union_agg({column})",
    "Sketch (hll) of the distinct values of {x}",
    compared="{extension}.hll_send({column})",
)
TDIGEST = Form(
    # In an order of its own, so that the same rows make the same sketch. NaN keeps tdigest busy for ever.
    "{extension}.tdigest(({x})::double precision, 100 ORDER BY ({x})::double precision)"
    " FILTER (WHERE ({x})::double precision > '-Infinity' AND ({x})::double precision < 'Infinity')",
    "{extension}.tdigest({column} ORDER BY bucket)",
    "Sketch (tdigest) of the values of {x}",
    compared="{extension}.tdigest_send({column})",
)

FUNCTIONS = {
    "count": Function({"": COUNT}),
    "sum": Function({"": _plain("sum", "sum")}),
    "min": Function({"": _plain("min", "min")}),
    "max": Function({"": _plain("max", "max")}),
    # In the average's own type, so that the division of integers keeps its fraction. A plain sum of `real` rounds to
    # six digits at each step, and PostgreSQL's average does not.
    "avg": Function(
        {"_sum": _plain("sum", "sum", "sum(({x})::double precision)"), "_count": COUNT},
        "{sum}::{type} / nullif({count}, 0)",
    ),
    **{name: _spread(SAMPLE, 2) for name in ("variance", "var_samp")},
    **{name: _spread(SAMPLE, 2, "sqrt") for name in ("stddev", "stddev_samp")},
    "var_pop": _spread(POPULATION, 1),
    "stddev_pop": _spread(POPULATION, 1, "sqrt"),
    DISTINCT: Function(
        {"_hll": HLL}, "coalesce(round({extension}.hll_cardinality({hll})), 0)::{type}", "bigint", "hll"
    ),
    # The function of tdigest is an aggregate, here of one row.
    PERCENTILE: Function(
        {"_tdigest": TDIGEST},
        "(SELECT {extension}.tdigest_percentile(one.digest, {fraction}) FROM (SELECT {tdigest}) AS one (digest))",
        DOUBLE,
        "tdigest",
    ),
}


@dataclass(frozen=True)
class Part:
    """One stored column of a measure."""

    column: str
    form: Form
    expression: str

    def __str__(self) -> str:
        return self.form.meaning.format(x=self.expression)


@dataclass(frozen=True)
class Measure:
    """One value kept for each group of a bucket."""

    name: str
    function: str
    expression: str
    fraction: str = ""
    """Of a percentile: 0.95."""

    def __str__(self) -> str:
        if self.function == PERCENTILE:
            return f"{self.function}({self.fraction}) within group (order by {self.expression})"
        return f"count(distinct {self.expression})" if self.function == DISTINCT else self.call

    @property
    def call(self) -> str:
        """Write `sum(value)`, for functions that PostgreSQL has under the same name."""
        return f"{self.function}({self.expression})"

    @property
    def parts(self) -> tuple[Part, ...]:
        """List the columns that are computed; an average is its sum and count, because averages do not merge."""
        return tuple(
            Part(self.name + ending, form, self.expression) for ending, form in FUNCTIONS[self.function].forms.items()
        )

    @property
    def value(self) -> str:
        """Return the SQL of the value in terms of the parts, empty if the only part is the value."""
        return FUNCTIONS[self.function].value

    @property
    def type(self) -> str:
        """Return the type of that value, empty for the one of PostgreSQL's own function."""
        return FUNCTIONS[self.function].type

    @property
    def extension(self) -> str:
        """Name the extension of PostgreSQL that it needs, empty for none."""
        return FUNCTIONS[self.function].extension


def read_measure(name: str, text: str, place: str) -> Measure:
    """Read `sum(value)`.

    Raises:
        ConfigurationError: it is anything but one of the functions around one expression.
    """
    measure = _parse(name, text)
    wrong = ConfigurationError(f"{place}: found {text!r}, expected {ALLOWED}")
    if measure is None or not measure.expression or (measure.expression == "*" and measure.function != "count"):
        raise wrong
    if measure.fraction and not _is_fraction(measure.fraction):
        raise ConfigurationError(f"{place}: found {text!r}, expected a fraction from 0 to 1 in percentile_cont(...)")
    if re.match(r"(distinct|all)\b", measure.expression, re.IGNORECASE):
        raise ConfigurationError(
            f"{place}: found {text!r}, expected {ALLOWED}, without DISTINCT (except in count) or ALL"
        )
    if unfit := problem(measure.expression, one=True):
        raise ConfigurationError(f"{place}: found {text!r}, whose x {unfit}; expected {ALLOWED}")
    return measure


def _parse(name: str, text: str) -> Measure | None:
    if within := WITHIN.fullmatch(text):
        return Measure(name, PERCENTILE, within[2].strip(), within[1])
    call = CALL.fullmatch(text)
    if call is None:
        return None
    function, expression = call[1].lower(), call[2].strip()
    if function == "count" and (unique := UNIQUE.fullmatch(expression)):
        return Measure(name, DISTINCT, unique[1].strip())
    return Measure(name, function, expression) if function in FUNCTIONS and function != PERCENTILE else None


def _is_fraction(text: str) -> bool:
    return re.fullmatch(r"\d+(\.\d*)?|\.\d+", text) is not None and Decimal(text) <= 1


def problem(text: str, *, one: bool = False) -> str:
    """Say why a piece of SQL cannot stand between parentheses; empty if it can."""
    depth = 0
    for token in TOKEN.finditer(text):
        character = token["character"]
        depth += {"(": 1, ")": -1}.get(character, 0)
        if token["comment"]:
            return "holds a comment"
        if depth < 0:
            return "closes a parenthesis that it did not open"
        if character in ("'", '"'):
            return "opens a quote that it does not close"
        if character == ";":
            return "holds a semicolon"
        if character == "," and not depth and one:
            return "is more than one expression"
    return "opens a parenthesis that it does not close" if depth else ""
