"""The configuration as frozen types; `config_file` reads them from TOML."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping  # noqa: TC003 - msgspec reads the annotations
from datetime import timedelta
from itertools import groupby
from pathlib import Path  # noqa: TC003 - the same
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

# `$` alone would let a final newline pass.
DURATION_PATTERN = r"^([0-9]+d)?([0-9]+h)?([0-9]+m)?([0-9]+s)?$(?!\n)"
SIZE_PATTERN = r"^([1-9][0-9]{0,5}(kB|MB|GB))?$(?!\n)"
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$(?!\n)"
# Controls of terminals, and what is not seen or changes the direction of text: names must read as what they are.
CONTROLS = r"\x00-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff"
IDENTIFIER_PATTERN = rf"^[^\s/.{CONTROLS}]([^/{CONTROLS}]*[^\s/{CONTROLS}])?$(?!\n)"
LONGEST_NAME = 60
"""Characters; a file name has at most 255 bytes, and a character up to four."""
GRAIN_PATTERN = r"^([1-9][0-9]*[smh]|1d)$(?!\n)"
DAY = "1d"
"""The grain of local days."""
DAY_FROM_SECONDS = 15 * 60
"""The coarsest grain that a local day is built from: every zone is a multiple of that away from UTC."""
SCHEMA_PATTERN = r"^(?!pg_)[^%\x00-\x1f]+$(?!\n)"
HOUR = 3600
LONGEST_DAYS = 3650
SPOKEN_HOURS = 72

Name = Annotated[
    str, Meta(pattern=NAME_PATTERN, max_length=LONGEST_NAME, description="letters, digits, and . _ - inside")
]
Identifier = Annotated[
    str,
    Meta(
        pattern=IDENTIFIER_PATTERN,
        max_length=LONGEST_NAME,
        description="no slash and no control character, no dot in front, no space at either end",
    ),
]
Grain = Annotated[
    str, Meta(pattern=GRAIN_PATTERN, description="a number and s, m or h, up to 1h: 1m, 5m, 1h; or 1d, a local day")
]
Count = Annotated[int, Meta(ge=0, le=2_147_483_647)]


class Duration(timedelta):
    """A length of time, written like 90s, 15m, 6h or 1d12h."""

    def __str__(self) -> str:
        remaining = int(self.total_seconds())
        parts = []
        # Operators speak of 30h and 48h, not of 1d6h and 2d.
        days = (("d", 86400),) if remaining % 86400 == 0 and remaining > SPOKEN_HOURS * HOUR else ()
        for unit, seconds in (*days, ("h", HOUR), ("m", 60), ("s", 1)):
            count, remaining = divmod(remaining, seconds)
            if count:
                parts.append(f"{count}{unit}")
        return "".join(parts) or "0s"


class OptionalDuration(Duration):
    """A length of time, or an empty text for none."""


def parse_duration(text: str) -> Duration:
    """Read 90s, 15m, 6h or 1d12h.

    Raises:
        ValueError: it is anything else; the message says what is allowed.
    """
    if not text or re.match(DURATION_PATTERN, text) is None:
        raise ValueError(f"found {text!r}, expected a duration such as 90s, 15m, 6h or 1d12h")
    amounts = {unit: int(number) for number, unit in re.findall(r"([0-9]+)([dhms])", text)}
    units = {"d": 86400, "h": HOUR, "m": 60, "s": 1}
    seconds = sum(number * units[unit] for unit, number in amounts.items())
    if seconds > LONGEST_DAYS * units["d"]:
        raise ValueError(f"found {text!r}, expected a duration of at most {LONGEST_DAYS}d")
    return Duration(seconds=seconds)


class Size(int):
    """A number of bytes, written like 500kB, 64MB or 2GB, or an empty text for no limit."""

    def __str__(self) -> str:
        for unit, count in reversed(SIZE_UNITS.items()):
            if self and self % count == 0:
                return f"{self // count}{unit}"
        return f"{int(self)}B" if self else ""


SIZE_UNITS = {"kB": 1000, "MB": 1_000_000, "GB": 1_000_000_000}


def parse_size(text: str) -> Size:
    """Read 500kB, 64MB or 2GB; an empty text is 0, for no limit.

    Raises:
        ValueError: it is anything else; the message says what is allowed.
    """
    if re.match(SIZE_PATTERN, text) is None:
        raise ValueError(f"found {text!r}, expected a size such as 500kB, 64MB or 2GB, or nothing for no limit")
    return Size(int(text[:-2]) * SIZE_UNITS[text[-2:]]) if text else Size()


def duration_default(text: str) -> Any:
    """Make a field's default from its written form."""
    return msgspec.field(default_factory=lambda: parse_duration(text))


class Database(Struct, frozen=True, forbid_unknown_fields=True):
    """Where the state lives."""

    url: Annotated[str, Meta(min_length=1)] | None = None
    embedded: bool = False
    schema: Annotated[str, Meta(pattern=SCHEMA_PATTERN, max_length=63)] = "batchctl"


class Step(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One command of a batch."""

    id: Identifier
    command: Annotated[tuple[str, ...], Meta(min_length=1)]
    group: Name | None = None
    quantity: Count | None = None
    timeout: Duration | None = None
    retries: Count = 0
    env: Mapping[str, str] = {}


class Group(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a group of steps does differently from its batch."""

    parallel: bool = False
    schedule: str = ""
    min_gap: Duration | None = None
    every: OptionalDuration | None = None
    hours: str | None = None


class Batch(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A list of steps that runs for each account."""

    step: Annotated[tuple[Step, ...], Meta(min_length=1)]
    schedule: str = ""
    accounts: Annotated[tuple[Identifier, ...], Meta(min_length=1)] = ("default",)
    max_parallel: Annotated[int, Meta(ge=1)] = 1
    min_gap: Duration = duration_default("6h")
    gap_factor: Annotated[float, Meta(ge=0, le=100)] = 0
    every: OptionalDuration = msgspec.field(default_factory=OptionalDuration)
    timeout: Duration = duration_default("30h")
    step_timeout: Duration = duration_default("5h")
    grace: Duration = duration_default("30s")
    quantity: Count = 100
    on_failure: Literal["continue", "stop"] = "continue"
    on_lost_database: Literal["continue", "stop"] = "continue"
    leftovers: Literal["skip", "ignore"] = "skip"
    output_cap: Size = msgspec.field(default_factory=lambda: parse_size("64MB"))
    hours: str = ""
    enabled: bool = True
    group: Mapping[Name, Group] = {}

    @property
    def groups(self) -> tuple[str, ...]:
        """Name the groups of the steps, in the order of the file."""
        return tuple(dict.fromkeys(step.group for step in self.step if step.group is not None))

    def quantity_of(self, step: Step) -> int:
        """Return the quantity of a step: its own, or that of the batch."""
        return self.quantity if step.quantity is None else step.quantity

    def stages(self, steps: Iterable[Step]) -> tuple[tuple[Step, ...], ...]:
        """Say which of these steps run together: those of a parallel group that follow each other, else each alone."""
        stages: list[tuple[Step, ...]] = []
        for name, members in groupby(steps, key=lambda step: step.group):
            following = tuple(members)
            together = name in self.group and self.group[name].parallel
            stages += [following] if together else [(step,) for step in following]
        return tuple(stages)


class Rollup(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is counted from a source, and in which grains."""

    source: Annotated[str, Meta(min_length=1)]
    time: Annotated[str, Meta(min_length=1)]
    measures: Annotated[Mapping[str, str], Meta(min_length=1)]
    dimensions: tuple[str, ...] = ()
    where: str = ""
    grains: Annotated[tuple[Grain, ...], Meta(min_length=1)] = ("1m", "5m", "1h")
    target: str = "agg_{grain}"
    schedule: Mapping[Grain, str] = msgspec.field(
        default_factory=lambda: {"1m": "* * * * *", "5m": "*/5 * * * *", "1h": "1 * * * *"}
    )
    offset: Mapping[Grain, Duration] = msgspec.field(
        default_factory=lambda: {"1m": parse_duration("5s"), "5m": parse_duration("15s")}
    )
    settle: Duration = duration_default("3s")
    source_retention: OptionalDuration = msgspec.field(default_factory=OptionalDuration)
    lookback: OptionalDuration = msgspec.field(default_factory=OptionalDuration)
    budget: Duration = duration_default("50s")
    hours: str = ""
    enabled: bool = True


class Document(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole file, as written."""

    timezone: str | None = None
    language: Literal["en"] = "en"
    state_dir: str | None = None
    log_dir: str | None = None
    database: Database = Database()
    batch: Mapping[Name, Batch] = {}
    rollup: Mapping[Name, Rollup] = {}


class Configuration(Struct, frozen=True, kw_only=True):
    """The file with its paths made absolute and its defaults filled in."""

    path: Path
    timezone: str | None
    state_dir: Path
    log_dir: Path
    database: Database
    batches: Mapping[str, Batch]
    rollups: Mapping[str, Rollup]

    @property
    def directory(self) -> Path:
        """Name the directory that relative paths, and the steps, start from."""
        return self.path.parent


def grain_seconds(grain: str) -> int:
    """Turn 1m into 60; most local days are as long as 1d says."""
    return int(grain[:-1]) * {"s": 1, "m": 60, "h": HOUR, "d": 24 * HOUR}[grain[-1]]


def json_schema() -> dict[str, Any]:
    """Describe the file for editors, as JSON Schema."""

    def describe(kind: type) -> dict[str, Any]:
        if issubclass(kind, Size):
            return {"type": "string", "pattern": SIZE_PATTERN, "description": str(kind.__doc__)}
        pattern = DURATION_PATTERN if issubclass(kind, OptionalDuration) else f"(?!^$){DURATION_PATTERN}"
        return {"type": "string", "pattern": pattern, "description": str(kind.__doc__)}

    return msgspec.json.schema(Document, schema_hook=describe)
