"""Every mistake in a configuration names its key path, what was found and what is allowed."""

from __future__ import annotations

import tomllib
from datetime import timedelta
from pathlib import Path

import pytest

from batchctl import config_file
from batchctl.config import Duration, parse_duration
from batchctl.errors import ConfigurationError, choices
from batchctl.rollup.definition import read_definitions
from batchctl.schedule import cron

BASE = """
[database]
embedded = true
[batch.daily]
{batch}
[[batch.daily.step]]
id = "31"
group = "search"
command = ["true"]
{step}
[rollup.trend]
source = "fact_events"
time = "occurred_at"
{rollup}
[rollup.trend.measures]
{measures}
"""


def load(batch="", step="", rollup="", measures='events = "count(*)"', text=BASE):
    data = tomllib.loads(text.format(batch=batch, step=step, rollup=rollup, measures=measures))
    configuration = config_file.decode(data, Path("/etc/batchctl.toml"), {})
    cron.validate(configuration)
    read_definitions(configuration)
    return configuration


def test_defaults_are_those_that_are_promised():
    configuration = load()
    batch, rollup = configuration.batches["daily"], configuration.rollups["trend"]
    assert (batch.accounts, batch.max_parallel, batch.quantity) == (("default",), 1, 100)
    assert (str(batch.min_gap), str(batch.timeout), str(batch.step_timeout), str(batch.grace)) == (
        "6h", "30h", "5h", "30s",
    )  # fmt: skip
    assert (batch.on_failure, batch.leftovers, batch.enabled, batch.hours) == ("continue", "skip", True, "")
    assert (rollup.grains, rollup.target, str(rollup.settle), str(rollup.budget)) == (
        ("1m", "5m", "1h"), "agg_{grain}", "3s", "50s",
    )  # fmt: skip
    assert rollup.schedule == {"1m": "* * * * *", "5m": "*/5 * * * *", "1h": "1 * * * *"}


@pytest.mark.parametrize(
    ("part", "text", "path", "found"),
    [
        ("batch", 'min_gap = "6 h"', "batch.daily.min_gap", "found '6 h', expected a duration such as 90s"),
        ("batch", "min_gap = 6", "batch.daily.min_gap", "found 6, expected a duration in quotes"),
        ("batch", 'min_gap = ""', "batch.daily.min_gap", "found '', expected a duration"),
        ("batch", 'min_gap = "99999999999d"', "batch.daily.min_gap", "found '99999999999d'"),
        ("batch", "mingap = 1", "batch.daily.mingap", "unknown key; allowed here: accounts, enabled"),
        ("batch", 'on_failure = "halt"', "batch.daily.on_failure", "found 'halt', expected 'continue' or 'stop'"),
        ("batch", 'accounts = ["a", "a"]', "batch.daily.accounts", "found 'a' twice"),
        ("batch", 'accounts = ["a/b"]', "batch.daily.accounts[0]", "found 'a/b'"),
        ("batch", "accounts = []", "batch.daily.accounts", "found an empty list"),
        ("batch", "max_parallel = 0", "batch.daily.max_parallel", "found 0, expected a whole number >= 1"),
        ("batch", "gap_factor = inf", "batch.daily.gap_factor", "found inf"),
        ("batch", "gap_factor = nan", "batch.daily.gap_factor", "found nan"),
        ("batch", 'timeout = "3651d"', "batch.daily.timeout", "expected a duration of at most 3650d"),
        ("batch", "quantity = 3000000000", "batch.daily.quantity", "found 3000000000"),
        ("batch", 'accounts = ["a\\n"]', "batch.daily.accounts[0]", "expected a text without"),
        ("batch", 'accounts = [".."]', "batch.daily.accounts[0]", "found '..'"),
        ("batch", 'accounts = [""]', "batch.daily.accounts[0]", "found '', expected a text that is not empty"),
        ("batch", 'accounts = ["a "]', "batch.daily.accounts[0]", "found 'a ', expected a text that does not end"),
        ("batch", 'accounts = [" a"]', "batch.daily.accounts[0]", "a text that does not begin with a space"),
        ("batch", 'accounts = [".a"]', "batch.daily.accounts[0]", "a text that does not begin with a dot"),
        ("batch", 'accounts = ["a\\u202eb"]', "batch.daily.accounts[0]", r"found 'a\u202eb', expected a text without"),
        ("batch", f'accounts = ["{"x" * 61}"]', "batch.daily.accounts[0]", "expected at most 60 characters"),
        ("step", f"[batch.daily.group.{'x' * 61}]", "batch.daily.group.'xxx", "expected at most 60 characters"),
        ("step", 'env = { "A=B" = "x" }', "batch.daily.step[0].env", "found the name 'A=B'"),
        ("batch", 'timeout = "0s"', "batch.daily.timeout", "found 0s"),
        ("batch", 'schedule = "61 * * * *"', "batch.daily.schedule", "found '61 * * * *'"),
        ("batch", 'hours = "25"', "batch.daily.hours", "found '25', expected cron's hour field"),
        ("batch", 'hours = "0 - 6"', "batch.daily.hours", "found '0 - 6'"),
        ("step", "[batch.daily.group.serch]", "batch.daily.group.serch", "no step has this group"),
        ("step", 'quantity = "x"', "batch.daily.step[0].quantity", "found 'x'"),
        (
            "step",
            '[[batch.daily.step]]\nid = 32\ncommand = ["x"]',
            "batch.daily.step[1].id",
            "found 32, expected a text in quotes",
        ),
        ("step", '[[batch.daily.step]]\nid = "32"', "batch.daily.step[1]", "'command' is required"),
        ("step", '[[batch.daily.step]]\nid = "32"\ncommand = "ls -l"', "batch.daily.step[1].command", "found 'ls -l'"),
        ("step", '[[batch.daily.step]]\nid = "32"\ncommand = []', "batch.daily.step[1].command", "found an empty list"),
        ("step", '[[batch.daily.step]]\nid = "31"\ncommand = ["x"]', "batch.daily.step", "found '31' twice"),
        ("step", '[[batch.daily.step]]\nid = "32"\ncommand = ["a\\u0000b"]', "batch.daily.step[1]", "NUL"),
        ("rollup", 'grains = ["1m", "7m"]', "rollup.trend.grains", "found '7m', expected a grain that divides 1h"),
        ("rollup", 'grains = ["5m", "1m"]', "rollup.trend.grains", "found '5m' before '1m'"),
        ("rollup", 'grains = ["2h"]', "rollup.trend.grains", "found '2h'"),
        ("rollup", 'grains = ["1x"]', "rollup.trend.grains[0]", "found '1x', expected a grain such as"),
        ("rollup", 'target = "agg"', "rollup.trend.target", "found 'agg', expected {grain}"),
        ("rollup", 'schedule = { "2m" = "* * * * *" }', "rollup.trend.schedule.2m", "one of the grains 1m, 5m, 1h"),
        ("rollup", 'schedule = { "1m" = "* * *" }', "rollup.trend.schedule.1m", "found '* * *'"),
        ("rollup", 'dimensions = ["bucket"]', "rollup.trend.dimensions", "found 'bucket'"),
        ("rollup", 'dimensions = ["events"]', "rollup.trend.measures.events", "a dimension has this name too"),
        ("measures", 'bucket = "sum(x)"', "rollup.trend.measures.bucket", "the column of the bucket has this name too"),
        ("measures", 'm = "median(x)"', "rollup.trend.measures.m", "found 'median(x)'"),
    ],
)
def test_mistakes(part, text, path, found):
    with pytest.raises(ConfigurationError) as raised:
        load(**{part: text})
    message = str(raised.value)
    assert message.startswith(f"/etc/batchctl.toml: {path}"), message
    assert found in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "database: found neither url nor embedded"),
        ('[database]\nurl = "postgresql://x"\nembedded = true', "database: found both"),
        ('[database]\nurl = ""', "database.url: found ''"),
        ('[database]\nembedded = true\nschema = "a%b"', "database.schema: found 'a%b', expected a name without %"),
        ('[database]\nembedded = true\nschema = "pg_x"', "database.schema: found 'pg_x'"),
        ('[batch."d\\n"]\n[database]\nembedded = true', "expected a name"),
        ("foo = 1\n[database]\nembedded = true", "foo: unknown key"),
        ('timezone = "Mars/Olympus"\n[database]\nembedded = true', "timezone: found 'Mars/Olympus'"),
        ("batch = 1\n[database]\nembedded = true", "batch: found 1, expected tables"),
        ("[batch]\ndaily = 1\n[database]\nembedded = true", "batch.daily: found 1, expected a table"),
        ("[batch.daily]\n[database]\nembedded = true", "batch.daily.step: found nothing"),
        (f"[batch.{'x' * 61}]", "expected at most 60 characters"),
        ('[batch.""]', "batch.'': expected a name, not nothing"),
        ('[batch."-x"]', "batch.'-x': expected a name that begins with a letter or a digit"),
        ('[batch."a b"]\n[database]\nembedded = true', "batch.'a b': expected a name"),
    ],
)
def test_mistakes_above_the_sections(text, problem):
    with pytest.raises(ConfigurationError, match=r"^/x/batchctl\.toml: ") as raised:
        config_file.decode(tomllib.loads(text), Path("/x/batchctl.toml"), {})
    assert problem in str(raised.value)


@pytest.mark.parametrize("name", ["a", "a b", "a.b-c", "x" * 60, "\u65e5\u672c", "load [eu]"])
def test_names_of_accounts_and_steps_that_are_allowed(name):
    batch = load(f'accounts = ["{name}"]', f'[[batch.daily.step]]\nid = "{name}"\ncommand = ["true"]').batches["daily"]
    assert batch.accounts == (name,)
    assert batch.step[1].id == name


def test_a_name_that_could_be_misread_is_quoted_in_a_list():
    assert choices(["a", "a.b/c-1", "b c", "d,e"]) == "a, a.b/c-1, 'b c', 'd,e'"
    assert choices([]) == "(none)"


def test_files_that_are_not_there_or_not_toml(tmp_path):
    with pytest.raises(ConfigurationError, match="no such configuration file"):
        config_file.find_file(tmp_path / "none.toml", {})
    with pytest.raises(ConfigurationError, match=r"is a directory; name the file, such as .*/batchctl.toml"):
        config_file.find_file(tmp_path, {})
    broken = tmp_path / "broken.toml"
    broken.write_text("[database\n")
    with pytest.raises(ConfigurationError, match="not valid TOML"):
        config_file.load(broken, {})
    broken.write_bytes(b"a = '\xff'")
    with pytest.raises(ConfigurationError, match="not UTF-8"):
        config_file.load(broken, {})


def test_paths_are_relative_to_the_file_and_the_environment_names_file_and_database(tmp_path, monkeypatch):
    path = tmp_path / "batchctl.toml"
    path.write_text('state_dir = "state"\nlog_dir = "../log"\n')
    monkeypatch.chdir("/")
    assert config_file.find_file(None, {"BATCHCTL_CONFIG": str(path)}) == path
    configuration = config_file.load(path, {"BATCHCTL_DATABASE_URL": "postgresql:///x"})
    assert (configuration.state_dir, configuration.log_dir) == (tmp_path / "state", tmp_path.parent / "log")
    assert configuration.database.url == "postgresql:///x"


def test_the_home_directory_is_not_the_environments(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere/else")
    monkeypatch.setenv("XDG_STATE_HOME", "/somewhere/else")
    monkeypatch.setattr("os.geteuid", lambda: 65534)
    configuration = config_file.decode({"database": {"embedded": True}}, Path("/x/batchctl.toml"), {})
    assert not str(configuration.state_dir).startswith("/somewhere")


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("15m", 900), ("6h", 21600), ("1d12h", 129600), ("0s", 0)])
def test_durations(text, seconds):
    duration = parse_duration(text)
    assert duration == timedelta(seconds=seconds)
    assert parse_duration(str(duration)) == duration


@pytest.mark.parametrize("text", ["", "6", "h", "1h1d", "-1h", "1.5h", "6 h", "6H", "٣h"])
def test_what_is_no_duration(text):
    with pytest.raises(ValueError, match="expected a duration"):
        parse_duration(text)


@pytest.mark.parametrize(("hours", "text"), [(30, "30h"), (36, "36h"), (48, "48h"), (96, "4d"), (97, "97h")])
def test_a_duration_shows_as_people_say_it(hours, text):
    assert str(Duration(hours=hours)) == text


def test_a_directory_that_may_not_be_read_is_an_error_only_where_it_was_named(tmp_path, monkeypatch):
    def refuse(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(ConfigurationError, match="cannot be read: Permission denied"):
        config_file.find_file(tmp_path / "x.toml", {})
    with pytest.raises(ConfigurationError, match="no configuration file"):
        config_file.find_file(None, {})
