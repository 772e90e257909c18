"""Tables on terminals of every width: nothing vanishes."""

from __future__ import annotations

import random

import pytest

from batchctl.cli.table import laid_out, printable

HISTORY = ("at", "job", "outcome", "duration", "run", "why")
ROWS = [
    ("2026-01-01 01:00:00", "daily", "success", "26h0m", "20260101T010000Z-0a1b2c", ""),
    ("2026-01-01 07:00:00", "daily/upload", "skipped", "", "", "too early " * 20 + "END"),
]


def test_without_a_terminal_each_row_is_one_line():
    assert laid_out(("job", "why"), [("daily", "a b"), ("x", "")], None) == ["job    why", "daily  a b", "x"]


@pytest.mark.parametrize("width", [20, 40, 80, 100, 132, 300])
def test_nothing_vanishes_and_no_line_is_too_long(width):
    lines = laid_out(HISTORY, ROWS, width)
    assert all(len(line) <= width for line in lines), lines
    shown = "".join("".join(lines).split())
    for cell in (*HISTORY, *ROWS[0], *ROWS[1]):
        assert "".join(cell.split()) in shown, cell


def test_at_80_columns_sentences_are_readable():
    lines = laid_out(HISTORY, ROWS, 80)
    assert lines[0].split() == ["at", "job", "outcome", "duration", "run"]
    assert lines[1].split() == ["why"]
    assert lines[2] == "2026-01-01 01:00:00  daily         success  26h0m     20260101T010000Z-0a1b2c"
    assert lines[3] == "2026-01-01 07:00:00  daily/upload  skipped"
    assert lines[4] == "    " + "too early " * 7 + "too"
    assert len(lines) == 7


@pytest.mark.parametrize("seed", range(5))
def test_random_tables(seed):
    chance = random.Random(seed)
    for _ in range(50):
        count, width = chance.randint(1, 8), chance.randint(20, 200)
        columns = [f"c{number}" for number in range(count)]
        rows = [
            ["x" * chance.choice([0, 1, 5, 20, 90]) + " y" * chance.choice([0, 0, 3, 50]) for _ in columns]
            for _ in range(chance.randint(0, 5))
        ]
        lines = laid_out(columns, rows, width)
        assert all(len(line) <= width for line in lines)
        whole = "".join("".join(row) for row in (columns, *rows))
        assert sorted("".join(lines).replace(" ", "")) == sorted(whole.replace(" ", ""))


def test_what_would_do_something_to_a_terminal_is_escaped():
    assert printable("a\x1b[31mb\nc\u202ed \u65e5") == "a\\x1b[31mb\\nc\\u202ed \u65e5"
    assert laid_out(("x",), [("load [eu]",)], 80) == ["x", "load [eu]"]
