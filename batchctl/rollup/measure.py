"""Measures: how the configuration writes them, the columns they are kept in, how each merges upwards."""

from __future__ import annotations

import re
from dataclasses import dataclass

from batchctl.errors import ConfigurationError

ALLOWED = "count(*), count(x), sum(x), min(x), max(x) or avg(x)"
MERGE = {"count": "sum", "sum": "sum", "min": "min", "max": "max"}
"""How the values of finer buckets make the value of a coarser one."""

CALL = re.compile(r"\s*([A-Za-z]+)\s*\((.*)\)\s*", re.DOTALL)
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


@dataclass(frozen=True)
class Part:
    """One stored column of a measure."""

    column: str
    function: str
    expression: str

    @property
    def merge(self) -> str:
        """Name the function that merges finer buckets into a coarser one."""
        return MERGE[self.function]


@dataclass(frozen=True)
class Measure:
    """One value kept for each group of a bucket."""

    name: str
    function: str
    expression: str

    def __str__(self) -> str:
        return f"{self.function}({self.expression})"

    @property
    def parts(self) -> tuple[Part, ...]:
        """List the columns that are computed; an average is its sum and count, because averages do not merge."""
        if self.function == "avg":
            return (
                Part(f"{self.name}_sum", "sum", self.expression),
                Part(f"{self.name}_count", "count", self.expression),
            )
        return (Part(self.name, self.function, self.expression),)


def read_measure(name: str, text: str, place: str) -> Measure:
    """Read `sum(value)`.

    Raises:
        ConfigurationError: it is anything but one of the functions around one expression.
    """
    call = CALL.fullmatch(text)
    function, expression = (call[1].lower(), call[2].strip()) if call else ("", "")
    known = function in ("count", "sum", "min", "max", "avg")
    if not known or not expression or (expression == "*" and function != "count"):
        raise ConfigurationError(f"{place}: found {text!r}, expected {ALLOWED}")
    if re.match(r"(distinct|all)\b", expression, re.IGNORECASE):
        raise ConfigurationError(f"{place}: found {text!r}, expected {ALLOWED}, without DISTINCT or ALL")
    if wrong := problem(expression, one=True):
        raise ConfigurationError(f"{place}: found {text!r}, whose x {wrong}; expected {ALLOWED}")
    return Measure(name, function, expression)


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
