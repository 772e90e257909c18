"""Decodes a parsed configuration into types; every error names its key path, what was found and what is allowed."""

from __future__ import annotations

import itertools
import os
import re
import typing
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from batchctl.config import (
    CONTROLS,
    DAY,
    DAY_FROM_SECONDS,
    GRAIN_PATTERN,
    HOUR,
    IDENTIFIER_PATTERN,
    LONGEST_NAME,
    NAME_PATTERN,
    SCHEMA_PATTERN,
    Batch,
    Database,
    Document,
    Duration,
    Group,
    OptionalDuration,
    Rollup,
    Size,
    Step,
    grain_seconds,
    parse_duration,
    parse_size,
)
from batchctl.errors import ConfigurationError, choices
from batchctl.paths import home_directory

WORDS = {
    "str": "a text in quotes",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "array": "a list",
    "object": "a table",
}
"""What msgspec calls things, and what TOML's users do."""
NAME_RULES = (
    (r"^$", "a name, not nothing"),
    (r"[^A-Za-z0-9_.-]", "a name of the letters A to Z and a to z, digits, and . _ - inside"),
    (r"^[^A-Za-z0-9]", "a name that begins with a letter or a digit"),
)
IDENTIFIER_RULES = (
    (r"^$", "a text that is not empty"),
    (rf"[{CONTROLS}]", "a text without control characters or characters that are not seen"),
    (r"/", "a text without a slash"),
    (r"^\.", "a text that does not begin with a dot"),
    (r"^\s", "a text that does not begin with a space"),
    (r"\s$", "a text that does not end with a space"),
)
"""What breaks a rule of a name, with what is expected instead, in words."""
LONGEST_GRACE = parse_duration("2m")
"""The longest grace of a run that ends itself within its lease."""

Kind = TypeVar("Kind", bound=msgspec.Struct)


class Reader:
    """Decodes section by section, so that every error can name its full key path and the keys allowed there."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def refuse(self, key_path: str, problem: str) -> None:
        raise ConfigurationError(f"{self.path}: {key_path}: {problem}" if key_path else f"{self.path}: {problem}")

    def directory(self, text: str) -> Path:
        expanded = home_directory() / text[2:] if text.startswith("~/") else Path(text)
        return Path(os.path.normpath(self.path.parent / expanded))

    def document(self, data: dict[str, Any]) -> Document:
        batches = {name: self.batch(raw, f"batch.{name}") for name, raw in self.tables(data, "batch", "batch")}
        rollups = {name: self.rollup(raw, f"rollup.{name}") for name, raw in self.tables(data, "rollup", "rollup")}
        database = self.section(data.get("database", {}), Database, "database")
        rest = {key: value for key, value in data.items() if key not in ("batch", "rollup", "database")}
        document = self.section(rest, Document, "", keys=frozenset({"batch", "rollup", "database"}))
        if document.timezone is not None:
            self.timezone(document.timezone)
        for name in batches.keys() & rollups.keys():
            self.refuse(f"rollup.{name}", "a batch has this name too; expected names that differ, they are jobs alike")
        self.unique_targets(rollups)
        return msgspec.structs.replace(document, database=database, batch=batches, rollup=rollups)

    def timezone(self, name: str) -> None:
        import zoneinfo  # noqa: PLC0415 - only where a zone is named

        try:
            zoneinfo.ZoneInfo(name)
        except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
            self.refuse("timezone", f"found {name!r}, expected a name of the time zone database such as Asia/Seoul")

    def unique_targets(self, rollups: dict[str, Rollup]) -> None:
        seen: dict[str, str] = {}
        for name, rollup in rollups.items():
            for grain in rollup.grains:
                # Unqualified targets live in the schema of their source, so equal texts may be different tables.
                schema = rollup.source.rpartition(".")[0] if "." not in rollup.target else ""
                table = f"{schema}.{rollup.target.replace('{grain}', grain)}"
                if table in seen:
                    self.refuse(
                        f"rollup.{name}.target",
                        f"{table.lstrip('.')!r} is also written by rollup.{seen[table]}; expected one table each, "
                        f'such as target = "{name}_{{grain}}"',
                    )
                seen[table] = name

    def batch(self, raw: dict[str, Any], key_path: str) -> Batch:
        steps = raw.get("step", [])
        if not isinstance(steps, list) or not steps:
            self.refuse(
                f"{key_path}.step", f"found {_brief(raw.get('step'))}, expected at least one [[{key_path}.step]]"
            )
        decoded = tuple(self.section(step, Step, f"{key_path}.step[{number}]") for number, step in enumerate(steps))
        groups = {
            name: self.section(group, Group, f"{key_path}.group.{name}")
            for name, group in self.tables(raw, "group", f"{key_path}.group")
        }
        rest = {key: value for key, value in raw.items() if key != "group"}
        batch = self.section({**rest, "step": [{"id": "0", "command": ["true"]}]}, Batch, key_path)
        batch = msgspec.structs.replace(batch, step=decoded, group=groups)
        self.unique(f"{key_path}.accounts", batch.accounts)
        self.unique(f"{key_path}.step", tuple(step.id for step in decoded))
        for name in groups.keys() - set(batch.groups):
            self.refuse(f"{key_path}.group.{name}", f"no step has this group; expected one of {choices(batch.groups)}")
        for number, step in enumerate(decoded):
            self.positive(f"{key_path}.step[{number}].timeout", step.timeout)
            for name in step.env:
                if not name or "=" in name:
                    self.refuse(f"{key_path}.step[{number}].env", f"found the name {name!r}, expected one without =")
            for text in (*step.command, *step.env, *step.env.values()):
                if "\0" in text:
                    self.refuse(f"{key_path}.step[{number}]", "found a NUL character, which no command can be given")
        self.positive(f"{key_path}.timeout", batch.timeout)
        self.positive(f"{key_path}.step_timeout", batch.step_timeout)
        if batch.on_lost_database == "stop" and batch.grace > LONGEST_GRACE:
            self.refuse(
                f"{key_path}.grace",
                f'found {batch.grace}, expected at most {LONGEST_GRACE} with on_lost_database = "stop": '
                "the steps must have ended before the lease of five minutes is over",
            )
        return batch

    def rollup(self, raw: dict[str, Any], key_path: str) -> Rollup:
        rollup = self.section(raw, Rollup, key_path)
        self.grains(f"{key_path}.grains", rollup.grains)
        if len(rollup.grains) > 1 and "{grain}" not in rollup.target:
            self.refuse(
                f"{key_path}.target", f"found {rollup.target!r}, expected {{grain}} in it: a table for each grain"
            )
        for key in ("schedule", "offset"):
            for grain in raw.get(key, {}):
                if grain not in rollup.grains:
                    self.refuse(f"{key_path}.{key}.{grain}", f"expected one of the grains {choices(rollup.grains)}")
        self.unique(f"{key_path}.dimensions", rollup.dimensions)
        if "bucket" in rollup.dimensions:
            self.refuse(f"{key_path}.dimensions", "found 'bucket', which the table's own column is called")
        for name in rollup.measures:
            if name == "bucket" or name in rollup.dimensions:
                whose = "the column of the bucket" if name == "bucket" else "a dimension"
                self.refuse(f"{key_path}.measures.{name}", f"{whose} has this name too; expected another one")
        return rollup

    def grains(self, key_path: str, grains: tuple[str, ...]) -> None:
        bins = [grain for grain in grains if grain != DAY]
        for grain in bins:
            if HOUR % grain_seconds(grain):
                self.refuse(key_path, f"found {grain!r}, expected a grain that divides 1h, such as 1m or 5m; or 1d")
        for finer, coarser in itertools.pairwise(bins):
            if grain_seconds(coarser) % grain_seconds(finer) or grain_seconds(coarser) == grain_seconds(finer):
                self.refuse(
                    key_path, f"found {finer!r} before {coarser!r}, expected finest first and each dividing the next"
                )
        if DAY in grains[:-1]:
            self.refuse(key_path, f"found {DAY!r} before {grains[-1]!r}, expected finest first, and {DAY} once")
        if DAY in grains and not any(grain_seconds(grain) <= DAY_FROM_SECONDS for grain in bins):
            self.refuse(
                key_path,
                f"found {DAY!r} without a grain of at most 15m to build it from; expected one, such as 5m",
            )

    def tables(self, data: dict[str, Any], key: str, key_path: str) -> list[tuple[str, dict[str, Any]]]:
        found = data.get(key, {})
        if not isinstance(found, dict):
            self.refuse(key_path, f"found {_brief(found)}, expected tables such as [{key_path}.NAME]")
        for name, table in found.items():
            if rule := _broken(name, NAME_RULES):
                self.refuse(f"{key_path}.{name!r}", f"expected {rule}")
            if not isinstance(table, dict):
                self.refuse(f"{key_path}.{name}", f"found {_brief(table)}, expected a table")
        return list(found.items())

    def section(self, raw: Any, kind: type[Kind], key_path: str, keys: frozenset[str] = frozenset()) -> Kind:
        allowed = set(kind.__struct_fields__) - keys
        if isinstance(raw, dict):
            for key in raw.keys() - allowed:
                self.refuse(
                    f"{key_path}.{key}" if key_path else key,
                    f"unknown key; allowed here: {', '.join(sorted(set(kind.__struct_fields__)))}",
                )
        try:
            return msgspec.convert(raw, kind, dec_hook=_decode_hook)
        except msgspec.ValidationError as error:
            problem, _, place = str(error).partition(" - at `$")
            inner = place.rstrip("`").replace("[...]", "")
            self.refuse((key_path + inner).lstrip("."), _explain(problem, raw, inner, kind))
            raise

    def unique(self, key_path: str, values: tuple[str, ...]) -> None:
        for value in values:
            if values.count(value) > 1:
                self.refuse(key_path, f"found {value!r} twice, expected each once")

    def positive(self, key_path: str, value: Duration | None) -> None:
        if value is not None and not value:
            self.refuse(key_path, "found 0s, expected a duration longer than nothing")


def _decode_hook(kind: type, value: Any) -> Any:
    if issubclass(kind, Size):
        if not isinstance(value, str):
            # ValueError is what msgspec turns into an error with a key path.
            raise ValueError(f'found {_brief(value)}, expected a size in quotes such as "64MB"')  # noqa: TRY004
        return parse_size(value)
    if issubclass(kind, Duration):
        if not isinstance(value, str):
            # ValueError is what msgspec turns into an error with a key path.
            raise ValueError(  # noqa: TRY004
                f'found {_brief(value)}, expected a duration in quotes such as "90s" or "6h"'
            )
        if issubclass(kind, OptionalDuration):
            return OptionalDuration(seconds=parse_duration(value).total_seconds()) if value else OptionalDuration()
        return parse_duration(value)
    raise NotImplementedError(kind)


def _explain(problem: str, raw: Any, inner: str, kind: type) -> str:
    """Say what was found where msgspec only says what it wanted."""
    if problem.startswith("found"):
        return problem
    found = raw
    for key, index in re.findall(r"\.(\w+)|\[(\d+)\]", inner):
        try:
            found = found[key] if key else found[int(index)]
        except (KeyError, IndexError, TypeError):
            return problem
    if missing := re.match(r"Object missing required field `(\w+)`", problem):
        return f"the key {missing[1]!r} is required and missing"
    expected = re.sub(r"^Expected ", "", problem).partition(", got")[0].replace("`", "")
    expected = expected.replace(" | null", "")
    for word, meant in WORDS.items():
        expected = re.sub(rf"\b{word}\b", meant, expected)
    for pattern, text in (
        (NAME_PATTERN, _broken(found, NAME_RULES)),
        (IDENTIFIER_PATTERN, _broken(found, IDENTIFIER_RULES)),
        (GRAIN_PATTERN, "a grain such as 1m, 5m, 1h or 1d"),
        (SCHEMA_PATTERN, "a name without % that does not begin with pg_"),
    ):
        if text and (repr(pattern) in expected or pattern in expected):
            expected = text
    if isinstance(found, str) and expected.endswith(f"of length <= {LONGEST_NAME}"):
        expected = f"at most {LONGEST_NAME} characters"
    if problem.startswith("Invalid enum value"):
        words = typing.get_args(typing.get_type_hints(kind)[inner.lstrip(".")])
        expected = " or ".join(repr(word) for word in words)
    return f"found {_brief(found)}, expected {expected}"


def _broken(name: Any, rules: tuple[tuple[str, str], ...]) -> str | None:
    """Say in words which rule a name breaks, None if it breaks none."""
    if isinstance(name, str):
        for pattern, expected in rules:
            if re.search(pattern, name):
                return expected
        if len(name) > LONGEST_NAME:
            return f"at most {LONGEST_NAME} characters"
    return None


def _brief(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict | list):
        kind = "table" if isinstance(value, dict) else "list"
        return f"a {kind}" if value else f"an empty {kind}"
    return repr(value)
