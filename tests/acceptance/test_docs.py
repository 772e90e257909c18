"""README and docs, compared with the program: what they show exists, and what exists is in them."""

from __future__ import annotations

import functools
import json
import logging
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from zoneinfo import ZoneInfo

import msgspec
import psycopg
import pytest
import typer
from support import ROLLUP, batch, wait_for

from batchctl import config, config_file
from batchctl.batch import attempt, plan
from batchctl.batch.guards import Guards
from batchctl.cli import app as door
from batchctl.cli.admin import STARTER
from batchctl.doctor.finding import CHECKS
from batchctl.doctor.hidden import HIDING, STARTS_CONTAINER
from batchctl.errors import MEANING, ConfigurationError, ExitCode
from batchctl.guard.lock import Holder
from batchctl.rollup.definition import read_definitions
from batchctl.schedule import cron
from batchctl.state.claim import JobState, PastRun

pytestmark = pytest.mark.any_user

PROJECT = Path(__file__).resolve().parents[2]
DOCS = PROJECT / "docs"
README = PROJECT / "README.md"
PAGES = [README, *sorted(DOCS.rglob("*.md"))]
REFERENCE = DOCS / "reference"
DASH = "\N{EN DASH}"
SHELL = ("sh", "console", "text", "crontab", "ini")
"""Languages of blocks in which commands are shown."""
REMOTE = ("http://", "https://", "mailto:")

SECTIONS = {
    "Top level": config.Document,
    "[database]": config.Database,
    "[batch.NAME]": config.Batch,
    "[[batch.NAME.step]]": config.Step,
    "[batch.NAME.group.GROUP]": config.Group,
    "[rollup.NAME]": config.Rollup,
}
"""Headings of configuration.md whose tables list the keys of a type."""

WAITING = "touch started; while ! test -e go; do sleep 0.05; done"


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its lines, and where it is."""

    place: str
    language: str
    text: str


def name_of(page):
    return str(page.relative_to(PROJECT))


def blocks(page):
    """List the fenced blocks of a page."""
    found, language, lines, start = [], None, [], 0
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        if not line.startswith("```"):
            lines.append(line)
        elif language is None:
            language, lines, start = line[3:].strip(), [], number
        else:
            found.append(Block(f"{name_of(page)}:{start}", language, "\n".join(lines) + "\n"))
            language = None
    assert language is None, f"{page}: a block is not closed"
    return found


ALL_BLOCKS = [block for page in PAGES for block in blocks(page)]


def of_languages(*languages):
    return [pytest.param(block, id=block.place) for block in ALL_BLOCKS if block.language in languages]


def prose(page):
    """Return a page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def sections(page):
    """Split a page into its sections by heading, of whatever level."""
    parts = re.split(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)[1:]
    headings, bodies = parts[::2], parts[1::2]
    assert len(set(headings)) == len(headings), f"{page}: a heading occurs twice"
    return dict(zip(headings, bodies, strict=True))


def rows(text):
    """Read the rows of the tables of a text, headings left out."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    rules = [number for number, row in enumerate(cells) if set("".join(row)) == {"-"}]
    return [row for number, row in enumerate(cells) if not any(number in (rule - 1, rule) for rule in rules)]


def code(cell):
    """Return what a cell holds as code, nothing else."""
    found = re.fullmatch(r"`([^`]*)`", cell)
    assert found, f"{cell!r} is not one piece of code"
    return found[1]


def keys(text):
    """Return the first column of a text's table, in its order."""
    return [code(row[0]) for row in rows(text)]


# Commands


def the_help(*command):
    """Return what the installed program says of itself."""
    program = Path(sys.executable).with_name("batchctl")
    return subprocess.run(
        [program, *command, "--help"], capture_output=True, text=True, check=True, env={"PATH": "/usr/bin:/bin"}
    ).stdout


@functools.cache
def the_commands():
    """Name the commands of --help in order."""
    return re.findall(r"^  ([a-z-]+) ", the_help().partition("\nCommands:\n")[2].partition("\n\n")[0], re.MULTILINE)


@functools.cache
def the_options(*command):
    """Name the options of --help, short and long."""
    listed = the_help(*command).partition("\nOptions:\n")[2].partition("\n\n")[0]
    return frozenset(
        name.strip()
        for line in listed.splitlines()
        if (match := re.match(r"  (-.+?)(?:  |$)", line))
        for name in re.findall(r"(?<![\w-])-{1,2}[A-Za-z][\w-]*", match[1])
    )


def described_options(text):
    """Name the options in the first column of a section's tables."""
    return {
        name
        for row in rows(text)
        if row[0].startswith("`-")
        for name in re.findall(r"(?<![\w-])-{1,2}[A-Za-z][\w-]*", row[0])
    }


def test_commands_md_has_each_command_in_the_order_of_help():
    described = [heading for heading in sections(REFERENCE / "commands.md") if heading not in ("Commands", "batchctl")]
    assert described == the_commands()
    assert described == list(door.COMMANDS)


def test_commands_md_has_exactly_the_options_of_help():
    described = sections(REFERENCE / "commands.md")
    everywhere = described_options(described["batchctl"])
    assert everywhere == the_options()
    assert "--version" in everywhere
    for command in the_commands():
        own = described_options(described[command])
        assert not own & everywhere, command
        assert own | (everywhere - {"--version"}) == the_options(command), command


def test_commands_md_has_the_arguments_and_the_defaults_of_help():
    described = sections(REFERENCE / "commands.md")
    for command in the_commands():
        text = the_help(command)
        usage = re.search(rf"^Usage: batchctl {command} \[OPTIONS\] ?(.*)$", text, re.MULTILINE)[1]
        # Typer writes a required argument as {JOB}, as nobody else does.
        signature = f"batchctl {command} {re.sub(r'[{}]', '', usage)}".strip()
        assert described[command].lstrip().startswith(f"`{signature}`\n"), f"{command}: expected {signature}"
        entries = [" ".join(entry.split()) for entry in re.split(r"\n(?=  -)", text)]
        for option, default in re.findall(r"(--[\w-]+) .*?\[default: ([^;\]]+)", "\n".join(entries)):
            row = next(row for row in rows(described[command]) if option in row[0])
            assert re.search(rf"Default: `?{re.escape(default)}`?\.", row[-1]), f"{command} {option}: {default}"


def test_help_names_what_each_command_does_in_full():
    assert "..." not in the_help().partition("\nCommands:\n")[2]


def test_help_fits_80_columns():
    for command in ([], *([name] for name in the_commands())):
        for line in the_help(*command).splitlines():
            assert len(line) <= 80, f"{command}: {line}"


def command_lines(block):
    """List the calls of batchctl in a block, as argument lists without the program."""
    for line in re.sub(r"\\\n\s*", "", block.text).splitlines():
        if block.language in ("console", "text") and not line.startswith("$ "):
            continue
        if line.lstrip().startswith("#"):
            continue
        text = re.sub(r"^(?:\S+ +){5}(?=\S)", "", line) if block.language == "crontab" else line.removeprefix("$ ")
        text = text.removeprefix("ExecStart=")
        for segment in re.split(r"&&|;|\||&$", text.replace("2>&1", "")):
            words = shlex.split(segment, comments=True)
            if words and words[0].rpartition("/")[2] == "batchctl":
                redirected = next((place for place, word in enumerate(words) if word.startswith(">")), len(words))
                yield words[1:redirected]


def parse(arguments):
    """Let the program's own parser read the arguments, and run nothing."""
    door._register([])
    group = typer.main.get_command(door.app)
    try:
        context = group.make_context("batchctl", list(arguments))
        name, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
        command.make_context(name, rest, parent=context)
    except Exception as error:
        # --help and --version end the parsing in their own way.
        if type(error).__name__ not in ("Exit", "NoArgsIsHelpError"):
            raise AssertionError(f"batchctl {shlex.join(arguments)}: {error!r}") from error


@pytest.mark.parametrize("block", of_languages(*SHELL))
def test_each_command_line_that_is_shown_is_one_that_the_program_takes(block):
    for arguments in command_lines(block):
        parse(arguments)


def test_command_lines_are_found_and_wrong_ones_refused():
    shown = [arguments for block in ALL_BLOCKS if block.language in SHELL for arguments in command_lines(block)]
    assert ["demo"] in shown
    assert ["--config", "/etc/batchctl.toml", "aggregate", "--grain", "1m"] in shown
    assert len(shown) > 30
    for wrong in (["no-such-command"], ["status", "--no-such-option"], ["aggregate", "--grain"], ["init", "extra"]):
        with pytest.raises(AssertionError):
            parse(wrong)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_each_command_named_in_a_sentence_exists(page):
    for text in re.findall(r"`batchctl ([^`]+)`", prose(page)):
        command, *rest = text.split()
        if command.isupper():
            continue
        if command.startswith("-"):
            assert command in the_options(), text
            continue
        assert command in the_commands(), text
        for option in (word for word in rest if word.startswith("-")):
            assert option in the_options(command), text


# Configuration


def written(value):
    """Turn a default of the code, or one that is read from TOML, into what can be compared."""
    if isinstance(value, timedelta):
        return f"{value.total_seconds():g} seconds" if value else ""
    if isinstance(value, config.Size):
        return str(value)
    if isinstance(value, str) and value and re.match(config.DURATION_PATTERN, value):
        return written(config.parse_duration(value))
    if isinstance(value, list | tuple):
        return [written(each) for each in value]
    if isinstance(value, dict):
        return {key: written(each) for key, each in value.items()}
    return value


def defaults(kind):
    """List the keys of a type with their defaults; `required` and a dash for those without."""
    found = {}
    for field in msgspec.structs.fields(kind):
        if field.required:
            found[field.encode_name] = "required"
            continue
        made = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
        found[field.encode_name] = DASH if made is None else written(made)
    return found


@pytest.mark.parametrize(("heading", "kind"), SECTIONS.items(), ids=SECTIONS)
def test_configuration_md_has_exactly_the_keys_of_the_code_with_their_defaults(heading, kind):
    table = rows(sections(REFERENCE / "configuration.md")[heading])
    described = {
        code(key): default if default in ("required", DASH) else written(tomllib.loads(f"x = {code(default)}")["x"])
        for key, default, _ in table
    }
    assert len(described) == len(table), "a key occurs twice"
    expected = defaults(kind)
    if kind is config.Document:
        for section in ("database", "batch", "rollup"):
            del expected[section]
    assert described == expected
    assert {key: type(value) for key, value in described.items()} == {
        key: type(value) for key, value in expected.items()
    }


def test_configuration_md_describes_no_section_that_is_unknown():
    headings = {heading for heading in sections(REFERENCE / "configuration.md") if heading.startswith("[")}
    assert headings == {*SECTIONS, "[rollup.NAME.measures]"} - {"Top level"}


def test_configuration_md_has_the_tokens_and_variables_of_the_code():
    text = (REFERENCE / "configuration.md").read_text()
    tokens = re.search(r"\(([a-z_|]+)\)", plan.TOKENS.pattern)[1].split("|")
    assert re.findall(r"`\{(\w+)\}`", text) == tokens
    given = set(re.findall(r'"(BATCHCTL_[A-Z_]+)"', Path(attempt.__file__).read_text()))
    read = set(re.findall(r'"(BATCHCTL_[A-Z_]+)"', Path(config_file.__file__).read_text()))
    assert set(keys(sections(REFERENCE / "configuration.md")["Environment"])) == read
    assert set(re.findall(r"BATCHCTL_[A-Z_]+", text)) == given | read


def load(text, path=PROJECT / "batchctl.toml"):
    """Check a configuration in every way that needs no database."""
    configuration = config_file.decode(tomllib.loads(text) if isinstance(text, str) else text, path, {})
    cron.validate(configuration)
    read_definitions(configuration)
    return configuration


def complete(data):
    """Add to a fragment what it leaves out: a step around its keys, a database."""
    known = {field.name for field in msgspec.structs.fields(config.Document)}
    of_step = {field.name for field in msgspec.structs.fields(config.Step)}
    inner = {key: data.pop(key) for key in list(data) if key in of_step - known}
    if inner:
        data["batch"] = {"daily": {"step": [{"id": "1", "command": ["true"], **inner}]}}
    data.setdefault("database", {"embedded": True})
    return data


@pytest.mark.parametrize("block", of_languages("toml"))
def test_each_configuration_that_is_shown_loads(block):
    load(complete(tomllib.loads(block.text)))


def test_a_configuration_with_an_unknown_key_would_not_load():
    for text in ("no_such_key = 1", "[rollup.r]\nsource = 's'", '[batch.b]\nschedule = "* *"'):
        with pytest.raises(ConfigurationError):
            load(complete(tomllib.loads(text)))


def test_the_configuration_in_readme_loads_as_it_stands():
    (block,) = [block for block in blocks(README) if block.language == "toml"]
    configuration = load(block.text)
    assert list(configuration.batches) == ["daily"]
    assert list(configuration.rollups) == ["trend"]


COMMENTED = re.compile(r"^# (\w+ *= .*)$")


def test_the_starter_loads_with_each_of_its_examples_uncommented():
    lines = STARTER.read_text().splitlines()
    first = lines.index("# [rollup.trend]")
    of_group = lines.index("# [batch.daily.group.upload]")
    head, rollup = lines[:of_group], [line.removeprefix("# ") for line in lines[first:]]
    group = [line.removeprefix("# ") for line in lines[of_group : lines.index("", of_group)]]
    plain = load("\n".join(lines))
    assert list(plain.batches) == ["daily"]
    assert not plain.rollups
    tried = []
    defaults = {"min_gap", "gap_factor", "every", "hours", "quantity", "timeout", "step_timeout", "grace", "on_failure"}
    for number, line in enumerate(head):
        if not (match := COMMENTED.match(line)):
            continue
        key = match[1].split()[0]
        changed = [*head[:number], match[1], *head[number + 1 :]]
        if key == "url":
            changed = [each for each in changed if not each.startswith("embedded")]
        loaded = load("\n".join(changed))
        assert key not in defaults or (loaded.batches == plain.batches), f"{key}: not the default, as the starter says"
        tried.append(key)
    assert {"timezone", "state_dir", "log_dir", "url", "schema"} | defaults == set(tried)
    everything = [match[1] if (match := COMMENTED.match(line)) else line for line in [*head, *group, *rollup]]
    loaded = load("\n".join(line for line in everything if not line.startswith("url")))
    assert list(loaded.rollups) == ["trend"]
    assert loaded.batches["daily"].group["upload"].schedule == "0 13 * * *"
    assert not plain.batches["daily"].group
    without = [line for line in [*head, *rollup] if not line.startswith(("grains", "target", "source_retention"))]
    assert load("\n".join(without)).rollups == loaded.rollups, "grains and target are shown with their defaults"


def test_the_json_schema_is_the_generated_one():
    expected = json.dumps(config.json_schema(), indent=2) + "\n"
    assert (REFERENCE / "batchctl.schema.json").read_text() == expected


@pytest.mark.parametrize("block", of_languages("crontab"))
def test_each_crontab_line_has_a_time_that_cron_knows(block):
    for line in block.text.splitlines():
        if line and not re.match(r"#|\w+=", line):
            assert cron.problem(" ".join(line.split(maxsplit=5)[:5])) is None, line


# Exit codes, JSON, schema


def test_exit_codes_md_has_the_codes_of_the_program():
    described = dict(rows((REFERENCE / "exit-codes.md").read_text()))
    assert described == {
        "128+N" if each is ExitCode.SIGNAL else str(int(each)): MEANING[each].removeprefix("128+N: ")
        for each in ExitCode
    }
    for meaning in described.values():
        assert meaning in " ".join(the_help().split())


def json_keys(heading):
    return set(keys(sections(REFERENCE / "json.md")[heading]))


def inner_keys(heading):
    """Return the keys that a row of json.md lists in words."""
    (text,) = [row[1] for row in rows(sections(REFERENCE / "json.md")[heading]) if "with the keys" in row[1]]
    return set(re.findall(r"`(\w+)`", text.partition("with the keys")[2]))


def test_json_md_has_the_keys_of_run_batch(batchctl):
    batchctl.configure(batch([("31", WAITING, 'group = "search"')], 'schedule = "0 1 * * *"'))
    planned = batchctl.json("run-batch", "--dry-run")
    assert set(planned) == json_keys("run-batch --dry-run")
    assert {frozenset(step) for step in planned["steps"]} == {frozenset(inner_keys("run-batch --dry-run"))}
    process = batchctl.start("run-batch", "--json")
    wait_for((batchctl.directory / "started").exists)
    skipped = batchctl.json("run-batch", code=75)
    (batchctl.directory / "go").touch()
    stdout, _ = process.communicate(timeout=60)
    ran = json.loads(stdout)
    assert set(ran) == set(skipped) == json_keys("run-batch")
    assert set(skipped["holder"]) == json_keys("holder")
    assert {frozenset(step) for step in ran["steps"]} == {frozenset(json_keys("steps"))}


@pytest.mark.each_server
def test_json_md_has_the_keys_of_the_commands_that_show(batchctl):
    batchctl.configure(batch([("31", "true")], 'schedule = "0 1 * * *"') + ROLLUP)
    batchctl("run-batch")
    batchctl("run-batch", code=75)
    for command, inner, heading in (
        ("status", "jobs", "jobs of status"),
        ("history", "entries", "entries"),
        ("next", "jobs", "jobs of next"),
    ):
        printed = batchctl.json(command)
        assert set(printed) == json_keys(command)
        assert {frozenset(each) for each in printed[inner]} == {frozenset(json_keys(heading))}, command
    guards = [guard for job in batchctl.json("next")["jobs"] for guard in job["guards"]]
    assert {frozenset(guard) for guard in guards} == {frozenset(json_keys("guards"))}


def test_json_md_has_the_keys_of_simulate(batchctl):
    batchctl.configure(batch([("31", "true")], 'schedule = "0 1 * * *"'))
    printed = batchctl.json("simulate", "--duration", "26h")
    assert set(printed) == json_keys("simulate")
    headings = {"events": "events", "jobs": "jobs of simulate", "recommendations": "recommendations"}
    for inner, heading in headings.items():
        assert {frozenset(each) for each in printed[inner]} == {frozenset(json_keys(heading))}, inner


def test_the_simulation_that_is_shown_is_what_the_program_writes(tmp_path):
    """README's sentence and the picture in schedules.md."""
    page = DOCS / "explanation" / "schedules.md"
    called, drawn = [block for block in blocks(page) if block.language in ("console", "text")]
    (arguments,) = command_lines(called)
    done = subprocess.run(
        [Path(sys.executable).with_name("batchctl"), *arguments, "--timezone", "UTC"],
        cwd=tmp_path, capture_output=True, text=True, check=True, env={"PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert drawn.text in done.stdout
    (sentence,) = re.findall(r'"(It starts [^"]+)"', README.read_text())
    assert sentence in done.stdout.splitlines()


def test_json_md_has_the_keys_of_what_is_left(batchctl):
    batchctl.configure(batch([("31", "sleep 300 & echo $! >agent")], 'min_gap = "0s"\ngrace = "1s"'))
    batchctl("run-batch")
    skipped = batchctl.json("run-batch", code=75)
    assert {frozenset(each) for each in skipped["orphans"]} == {frozenset(json_keys("orphans of run-batch"))}
    printed = batchctl.json("orphans", "--kill")
    assert set(printed) == json_keys("orphans")
    assert {frozenset(each) for each in printed["orphans"]} == {frozenset(json_keys("orphans of orphans"))}


def test_json_md_has_the_keys_of_doctor(batchctl):
    batchctl.configure(batch([("31", "true")]))
    document = batchctl.json("doctor", code=None)
    described = sections(REFERENCE / "json.md")
    assert list(document) == keys(described["doctor"])
    for check in document["checks"]:
        assert list(check) == keys(described["checks of doctor"])


def test_doctor_md_has_each_check_and_each_program_that_hides():
    described = sections(DOCS / "how-to" / "doctor.md")
    assert keys(described["What is checked"]) == list(CHECKS)
    hiding = [name for row in rows(described["Steps that hide"]) for name in re.findall(r"`([a-z-]+)`", row[0])]
    assert [name for name in hiding if name not in STARTS_CONTAINER] == list(HIDING)


def test_json_md_has_the_keys_of_aggregate(batchctl):
    batchctl.configure(ROLLUP)
    with psycopg.connect(batchctl.url) as connection:
        connection.execute("CREATE TABLE fact_events (occurred_at timestamptz)")
        connection.execute("INSERT INTO fact_events VALUES (now() - interval '3 hours')")
    batchctl("migrate")
    printed = batchctl.json("aggregate")
    assert set(printed) == json_keys("aggregate")
    assert [each["outcome"] for each in printed["rollups"]] == ["success"] * 3
    assert {frozenset(each) for each in printed["rollups"]} == {frozenset(json_keys("rollups"))}
    waiting = batchctl.json("aggregate", "--dry-run")
    assert set(waiting) == json_keys("aggregate --dry-run")
    assert {frozenset(each) for each in waiting["rollups"]} == {frozenset(inner_keys("aggregate --dry-run"))}


TABLES = """
SELECT relname, obj_description(pg_class.oid), attname, format_type(atttypid, atttypmod), attnotnull,
       col_description(pg_class.oid, attnum)
FROM pg_class JOIN pg_attribute ON attrelid = pg_class.oid
WHERE relnamespace = 'batchctl'::regnamespace AND relkind IN ('r', 'p', 'v', 'm') AND attnum > 0 AND NOT attisdropped
ORDER BY relname, attnum
"""


@pytest.mark.each_server
def test_schema_md_has_the_tables_columns_and_comments_of_a_real_database(batchctl):
    batchctl.configure("")
    batchctl("status")
    made = {}
    with psycopg.connect(batchctl.url) as connection:
        for table, about, column, kind, required, comment in connection.execute(TABLES):
            assert about, f"{table} has no comment"
            assert comment, f"{table}.{column} has no comment"
            shown = kind.replace("timestamp with time zone", "timestamptz") + (" not null" if required else "")
            made.setdefault(table, (about, []))[1].append((column, shown, comment))
    described = {}
    for heading, text in sections(REFERENCE / "schema.md").items():
        if rows(text):
            about = " ".join(text.strip().partition("\n\n")[0].split())
            described[heading] = (about, [(code(column), kind, comment) for column, kind, comment in rows(text)])
    assert described == made


# README, links, the tree


def test_readme_has_two_commands_to_copy():
    found = [block for block in blocks(README) if block.language == "sh"]
    assert [block.text.count("\n") for block in found] == [1, 1]


class FixedClock(SimpleNamespace):
    """A clock that stands still."""

    def now(self):
        return self.at


def test_the_skips_in_readme_are_those_that_the_program_writes():
    (block,) = [block for block in blocks(README) if block.language == "text"]
    shown = [line for line in block.text.splitlines() if not line.startswith("$ ")]
    (example,) = [block for block in blocks(README) if block.language == "toml"]
    configuration = load(example.text)
    zone = ZoneInfo(configuration.timezone)

    def local(day, hour):
        return datetime(2024, 1, day, hour, tzinfo=zone).astimezone(UTC)

    guards = Guards(
        configuration=configuration,
        job="daily",
        force_gap=False,
        zone=zone,
        clock=FixedClock(at=local(2, 1)),
        log=logging.getLogger("test"),
    )
    held = guards.held(Holder("host1", 4711, 1, "boot", local(1, 1)))
    state = JobState(
        now=local(2, 7),
        last_started_at=local(1, 1),
        last_completed_at=local(2, 3),
        paused=(),
        past_runs=(PastRun(timedelta(hours=26).total_seconds()),),
    )
    early = guards._decide(state)
    assert [(held.reason, held.message), (early.reason, early.message)] == [
        ("running", shown[0]),
        ("gap", shown[1]),
    ]
    assert len(shown) == 2


def anchors(page):
    """List what the headings of a page can be linked by."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in sections(page)}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_each_relative_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(REMOTE):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert linked.is_relative_to(PROJECT), target
        assert not anchor or anchor in anchors(linked), target


def test_each_page_can_be_reached_from_readme():
    found, new = set(), {README}
    while new:
        found |= new
        targets = {
            (page.parent / target.partition("#")[0]).resolve()
            for page in new
            for target in re.findall(r"\]\(([^)\s]+)\)", prose(page))
            if not target.startswith(REMOTE)
        }
        new = {target for target in targets if target.suffix == ".md"} - found
    assert found == set(PAGES)


def test_the_tree_in_design_md_is_the_tree_of_the_package():
    (block,) = [block for block in blocks(DOCS / "explanation" / "design.md") if block.language == "text"]
    stack, described = [], set()
    for line in block.text.splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        stack[depth:] = [name.rstrip("/")]
        if not name.endswith("/"):
            described.add("/".join(stack))
    plumbing = {f"batchctl/{room}/__init__.py" for room in ("cli", "batch", "rollup", "report", "demo", "doctor")}
    plumbing |= {f"batchctl/{room}/__init__.py" for room in ("guard", "schedule", "state")}
    real = {
        str(path.relative_to(PROJECT))
        for path in (PROJECT / "batchctl").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert described == real - plumbing


@pytest.mark.parametrize("page", PAGES[1:], ids=name_of)
def test_a_page_fits_120_columns(page):
    for line in prose(page).splitlines():
        assert len(line) <= 120 or line.startswith("|"), line
