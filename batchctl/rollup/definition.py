"""What a rollup keeps: its source, its grains, the names of its columns and tables."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from batchctl.config import DAY, DAY_FROM_SECONDS, grain_seconds
from batchctl.errors import ConfigurationError
from batchctl.rollup.measure import problem, read_measure

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from batchctl.config import Configuration, Rollup
    from batchctl.rollup.measure import Measure, Part

LONGEST_NAME = 63
"""PostgreSQL cuts longer names without a word (bytes)."""

OWN = "batchctl_"
"""Begins the names of what only a statement of ours has."""

NEXT = "~next"
"""Ends the name of a version that is built beside the one in use; no configured name holds a tilde."""

CAPTURE = "capture"
"""Says in a description how changes are noticed, if that is not by triggers."""

RESERVED = frozenset({"bucket", "ctid", "xmin", "cmin", "xmax", "cmax", "tableoid"})


class Table(NamedTuple):
    """A table by its full name."""

    schema: str
    name: str

    def __str__(self) -> str:
        return f"{self.schema}.{self.name}"


@dataclass(frozen=True)
class Grain:
    """One table of a rollup."""

    name: str
    seconds: int
    target: str
    """The table as the configuration writes it, with the grain filled in."""
    zone: str = ""
    """The time zone of local days, empty for bins of UTC."""


@dataclass(frozen=True)
class Definition:
    """A rollup, checked as far as that goes without a database."""

    name: str
    source: str
    time: str
    dimensions: tuple[str, ...]
    where: str
    grains: tuple[Grain, ...]
    target: str
    measures: tuple[Measure, ...]
    settle_seconds: float
    budget_seconds: float
    retention_seconds: float = 0.0
    """How long the source surely holds an event; 0 for ever."""
    lookback_seconds: float = 0.0
    """How far back each tick computes anew what no trigger notes; 0 where triggers do."""

    @property
    def key(self) -> tuple[str, ...]:
        """Name the columns that identify a row of a target table."""
        return ("bucket", *self.dimensions)

    @property
    def parts(self) -> tuple[Part, ...]:
        """List the computed columns of all measures."""
        return tuple(part for measure in self.measures for part in measure.parts)

    @property
    def events(self) -> str | None:
        """Name the column that counts events, if a measure does."""
        return next((measure.name for measure in self.measures if measure.call == "count(*)"), None)

    @property
    def finest(self) -> Grain:
        """Return the grain that is built from the source."""
        return self.grains[0]

    def grain(self, name: str) -> Grain:
        """Return the grain of that name."""
        return self.grains[self._position(name)]

    def finer(self, name: str) -> Grain | None:
        """Return the grain that this one is built from, None for the one built from the source."""
        before = self.grains[: self._position(name)]
        if name == DAY:
            before = tuple(grain for grain in before if grain.seconds <= DAY_FROM_SECONDS)
        return before[-1] if before else None

    def coarser(self, name: str) -> tuple[Grain, ...]:
        """Return the grains that are built from this one."""
        return tuple(grain for grain in self.grains if self.finer(grain.name) == self.grain(name))

    def job(self, grain: str) -> str:
        """Name the row of the state table: trend/1m."""
        return f"{self.name}/{grain}"

    def as_json(self) -> dict[str, Any]:
        """Describe what decides the content of the tables and how changes are noticed, to see when that changes."""
        return {
            "source": self.source,
            "time": self.time,
            "dimensions": list(self.dimensions),
            "where": self.where,
            "grains": [grain.name for grain in self.grains],
            "target": self.target,
            "measures": {measure.name: str(measure) for measure in self.measures},
            **({"timezone": self.grains[-1].zone} if self.grains[-1].zone else {}),
            **({CAPTURE: "lookback"} if self.lookback_seconds else {}),
        }

    def _position(self, name: str) -> int:
        return [grain.name for grain in self.grains].index(name)


@dataclass(frozen=True)
class Places:
    """The tables of a rollup in one database, found once by `migrate`: a search path may differ between sessions."""

    source: Table
    targets: Mapping[str, Table]
    types: Mapping[str, str] = field(default_factory=dict, compare=False)
    """The type of each measure whose value is computed from its columns."""
    extensions: Mapping[str, str] = field(default_factory=dict, compare=False)
    """The schema of each extension that a measure needs."""
    collations: Mapping[str, str] = field(default_factory=dict, compare=False)
    """How the targets compare a dimension, where that is not how the source does."""

    def __str__(self) -> str:
        return ", ".join(map(str, (self.source, *self.targets.values())))

    def as_json(self) -> dict[str, Any]:
        """Describe the tables for the registry."""
        return {
            "source": list(self.source),
            "targets": {grain: list(table) for grain, table in self.targets.items()},
            "types": dict(self.types),
            "extensions": dict(self.extensions),
            "collations": dict(self.collations),
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Places:
        """Read what `as_json` wrote."""
        targets = {grain: Table(*table) for grain, table in found["targets"].items()}
        return cls(
            Table(*found["source"]),
            targets,
            # A rollup of an earlier version has averages, and nothing else that is computed from its columns.
            found.get("types", found.get("averages", {})),
            found.get("extensions", {}),
            found.get("collations", {}),
        )


def read_definitions(configuration: Configuration) -> tuple[Definition, ...]:
    """Check all rollups of a configuration.

    Raises:
        ConfigurationError: names the file, the key path, what was found and what is allowed.
    """
    zone = configuration.timezone or ""
    if not zone and any(DAY in rollup.grains for rollup in configuration.rollups.values()):
        from batchctl.schedule.cron import local_zone  # noqa: PLC0415 - only local days need to know

        zone = str(local_zone(None))
    return tuple(
        read_definition(name, rollup, configuration.path, zone) for name, rollup in configuration.rollups.items()
    )


def read_definition(name: str, rollup: Rollup, path: Path, zone: str = "UTC") -> Definition:
    """Check one rollup.

    Args:
        name: Its name.
        rollup: As it is configured.
        path: The file, for messages.
        zone: The time zone of local days.

    Raises:
        ConfigurationError: names the file, the key path, what was found and what is allowed.
    """
    place = f"{path}: rollup.{name}"
    measures = tuple(
        read_measure(key, text, f"{place}.measures.{key}") for key, text in sorted(rollup.measures.items())
    )
    where = rollup.where.strip()
    if where and (wrong := problem(where)):
        raise ConfigurationError(f"{place}.where: found {where!r}, which {wrong}; expected one condition in SQL")
    for key, text in (("source", rollup.source), ("time", rollup.time)):
        if not text.strip():
            raise ConfigurationError(f"{place}.{key}: found an empty text, expected the name of the {key}")
    definition = Definition(
        name=name,
        source=rollup.source,
        time=rollup.time,
        dimensions=tuple(rollup.dimensions),
        where=where,
        grains=tuple(
            Grain(
                grain,
                grain_seconds(grain),
                rollup.target.replace("{grain}", grain),
                zone if grain == DAY else "",
            )
            for grain in rollup.grains
        ),
        target=rollup.target,
        measures=measures,
        settle_seconds=rollup.settle.total_seconds(),
        budget_seconds=rollup.budget.total_seconds(),
        retention_seconds=rollup.source_retention.total_seconds(),
        lookback_seconds=rollup.lookback.total_seconds(),
    )
    _check_columns(definition, place)
    _check_retention(definition, place)
    return definition


def is_switch(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Tell whether two descriptions differ in how changes are noticed."""
    return before.get(CAPTURE) != now.get(CAPTURE)


def next_name(name: str) -> str:
    """Name the version of a rollup, or of a table, that is built beside the one in use."""
    return f"{name}{NEXT}"


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Say in words what differs between two descriptions made by `Definition.as_json`."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            found += [f"{key}.{change}" for change in differences(old, new)]
        else:
            found.append(f"{key}: was {_brief(old)}, now {_brief(new)}")
    return found


def _check_retention(definition: Definition, place: str) -> None:
    least = definition.finest.seconds + definition.settle_seconds
    if 0 < definition.retention_seconds <= least:
        raise ConfigurationError(
            f"{place}.source_retention: found {definition.retention_seconds:.0f} s, in which no bucket of "
            f"{definition.finest.name} is ever closed; expected more than {least:.0f} s, and more than the longest "
            "time without a call of aggregate"
        )


def _check_columns(definition: Definition, place: str) -> None:
    owners = {"bucket": "the start of the bucket"}
    wanted = [(dimension, "dimensions", f"dimension {dimension!r}") for dimension in definition.dimensions]
    for measure in definition.measures:
        columns = dict.fromkeys([measure.name, *(part.column for part in measure.parts)])
        wanted += [(column, f"measures.{measure.name}", f"measure {measure.name!r}") for column in columns]
    for column, key, owner in wanted:
        if column in owners:
            raise ConfigurationError(
                f"{place}.{key}: {owner} needs the column {column!r}, which is {owners[column]}; expected another name"
            )
        if column in RESERVED or column.startswith(OWN):
            raise ConfigurationError(f"{place}.{key}: found {column!r}, a reserved name; expected another name")
        if not column or len(column.encode()) > LONGEST_NAME:
            raise ConfigurationError(
                f"{place}.{key}: the column {column!r} has {len(column.encode())} bytes, expected 1 to {LONGEST_NAME}"
            )
        owners[column] = f"that of {owner}"


def _brief(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    return repr(value) if isinstance(value, str) else str(value)
