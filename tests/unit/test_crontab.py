"""The text of a crontab: our lines between markers, all others byte for byte."""

from __future__ import annotations

import shlex
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from batchctl.config_file import decode
from batchctl.errors import BatchctlError
from batchctl.schedule import crontab
from batchctl.schedule.crontab_lines import DEFAULT_PATH, this_program, wanted

# How long an example takes says something about the machine only.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
PATH = Path("/etc/batchctl.toml")
OTHER = Path("/srv/it's 100% mine/batchctl.toml")
LINES = (b"# a comment", b"0 1 * * *  /opt/batchctl --config /etc/batchctl.toml run-batch daily")
NOW = datetime(2026, 1, 1, tzinfo=UTC)

# Bytes of every kind, and often what is special here: line ends, comments, nearly markers.
PIECES = st.sampled_from(
    [b"\n", b"\r\n", b"#", b"\t", b"\0", b"\xff", b"%", b"# BEGIN batch", b"A=1\n", b"0 1 * * * x"]
)
FOREIGN = st.lists(st.one_of(PIECES, st.binary(max_size=8))).map(b"".join).filter(lambda text: b"batchctl" not in text)
ANY_LINES = st.lists(FOREIGN.filter(lambda text: b"\n" not in text), max_size=3)


@patient
@given(FOREIGN, ANY_LINES)
@example(b"# no newline", [])
def test_remove_undoes_install_byte_for_byte(text, lines):
    installed = crontab.install(text, PATH, lines)
    assert installed != text
    assert installed.endswith(b"\n")
    assert crontab.remove(installed, PATH) == text


@patient
@given(FOREIGN, ANY_LINES, ANY_LINES)
def test_installing_again_changes_nothing_and_other_lines_stay_where_they_are(text, lines, others):
    once = crontab.install(text, PATH, lines)
    assert crontab.install(once, PATH, lines) == once
    changed = crontab.install(once, PATH, others)
    assert changed == crontab.install(text, PATH, others)
    assert crontab.install(changed, PATH, lines) == once


@patient
@given(FOREIGN, FOREIGN)
def test_lines_that_were_added_below_stay_below(text, below):
    installed = crontab.install(text, PATH, LINES)
    again = crontab.install(installed + below, PATH, LINES[:1])
    assert again == crontab.install(text, PATH, LINES[:1]) + below
    # The newline that a marker needed is needed by the line below as well.
    unfinished = bool(text) and not text.endswith(b"\n")
    expected = text + (b"\n" if unfinished and below else b"") + below
    assert crontab.remove(again, PATH) == expected


@patient
@given(FOREIGN, st.permutations([PATH, OTHER, Path("/third")]), st.permutations([PATH, OTHER, Path("/third")]))
def test_several_configurations_share_a_crontab_and_leave_it_in_any_order(text, coming, leaving):
    installed = text
    for path in coming:
        installed = crontab.install(installed, path, LINES)
    assert [crontab.lines_of(installed, path) for path in coming] == [LINES] * 3
    for path in leaving:
        installed = crontab.remove(installed, path)
    assert installed == text


@patient
@given(FOREIGN)
def test_removing_what_is_not_there_changes_nothing(text):
    assert crontab.remove(text, PATH) == text
    assert crontab.lines_of(text, PATH) is None
    assert crontab.remove(crontab.install(text, OTHER, LINES), PATH) == crontab.install(text, OTHER, LINES)


def test_an_editor_that_took_the_last_newline_or_wrote_crlf_does_no_harm():
    installed = crontab.install(b"A=1\n", PATH, LINES)
    assert crontab.remove(installed[:-1], PATH) == b"A=1\n"
    assert crontab.remove(installed.replace(b"\n", b"\r\n"), PATH) == b"A=1\r\n"


BEGIN, END = b"# BEGIN batchctl /etc/batchctl.toml\n", b"# END batchctl /etc/batchctl.toml\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"A=1\n" + BEGIN, "line 2 (# BEGIN batchctl /etc/batchctl.toml): has no END below it"),
        (b"A=1\n" + END, "line 2 (# END batchctl /etc/batchctl.toml): has no BEGIN above it"),
        (BEGIN + BEGIN + END, "line 1 (# BEGIN batchctl /etc/batchctl.toml) and line 2"),
        (BEGIN + END + BEGIN + END, "line 1 (# BEGIN batchctl /etc/batchctl.toml) and line 3"),
        (BEGIN + END + END, "line 3 (# END"),
        (BEGIN + b"# END batchctl /other\n", "they name different configurations"),
        (BEGIN + b"# BEGIN batchctl /other\n# END batchctl /other\n" + END, "the first has no END before the second"),
        (b"# BEGIN batchctl\n" + END, "line 1 (# BEGIN batchctl): names no configuration"),
    ],
)
def test_damaged_markers_are_refused_with_their_lines(text, said):
    for change in (
        lambda: crontab.install(text, PATH, LINES),
        lambda: crontab.remove(text, PATH),
        lambda: crontab.install(text, OTHER, LINES),
        lambda: crontab.compare(text, PATH, LINES),
    ):
        with pytest.raises(crontab.DamagedMarkersError) as refused:
            change()
        assert said in str(refused.value)
        assert "nothing was changed" in str(refused.value)


WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"], exclude_characters="\\"), min_size=1)


@patient
@given(st.lists(WORDS, min_size=1))
@example(['/a b/it\'s "100%"/batchctl', "$HOME", "`x`;&|<>*?~#"])
def test_words_reach_the_program_as_they_are(words):
    line = crontab.command_words(words)
    # What cron does: a plain % ends the command, an escaped one is a %.
    assert line.count(b"%") == line.count(b"\\%")
    assert shlex.split(line.replace(b"\\%", b"%").decode()) == words


@pytest.mark.parametrize("word", ["a\nb", "a\\b", "a\0", "\x1b[2J"])
def test_what_crons_read_in_different_ways_is_refused(word):
    with pytest.raises(BatchctlError, match="cannot be written in a crontab"):
        crontab.command_words(["/x", word])


def test_the_difference_is_a_unified_one_and_steers_no_terminal():
    before = b"A=1\n\x1b[2J\xff\xc2\x9b\t# no newline"
    after = crontab.install(before, PATH, (b"x",))
    assert crontab.difference(before, after) == (
        "--- crontab",
        "+++ crontab, new",
        "@@ -1,2 +1,5 @@",
        " A=1",
        "-\\x1b[2J\\xff\\x9b\t# no newline",
        "\\ No newline at the end",
        "+\\x1b[2J\\xff\\x9b\t# no newline",
        "+# BEGIN batchctl /etc/batchctl.toml (newline added above)",
        "+x",
        "+# END batchctl /etc/batchctl.toml",
    )
    assert crontab.difference(after, after) == ()


def test_what_is_installed_is_compared_without_comments_and_paths():
    job = b"0 1 * * *    /usr/bin/env PATH=%s /opt/batchctl --config /etc/batchctl.toml run-batch daily"
    text = crontab.install(b"", PATH, (b"# then", job % b"/a:/b"))
    assert crontab.compare(b"", PATH, (job,)).state == "absent"
    quoted = crontab.command_words(["PATH=/it's 5 %"])
    same = crontab.compare(text, PATH, (b"# now", job.replace(b"PATH=%s", quoted)))
    assert (same.state, same.missing, same.extra) == ("current", (), ())
    changed = crontab.compare(text, PATH, (job.replace(b"0 1", b"0 2"),))
    assert changed.state == "different"
    assert (len(changed.missing), len(changed.extra)) == (1, 1)
    assert changed.missing[0].startswith("0 2 * * *")
    # They are told as they stand there, with their PATH.
    assert changed.extra == ((job % b"/a:/b").decode(),)


def test_lines_outside_the_markers_that_start_the_same_are_named():
    job = b"0 1 * * * /opt/batchctl --config /etc/batchctl.toml run-batch daily"
    other = job.replace(b"/etc/batchctl.toml", b"/srv/etc/batchctl.toml")
    text = crontab.install(b"#" + job + b"\n" + job + b"\n" + other + b"\n", PATH, (job,))
    assert crontab.compare(text, PATH, (job,)).elsewhere == ((2, job.decode()),)


# What a configuration asks for


def configured(text, zone="UTC"):
    import tomllib

    return decode(tomllib.loads(f'timezone = "{zone}"\n[database]\nembedded = true\n{text}'), PATH, {})


def asked(text, zone="UTC", search_path="", program=("/opt/b/batchctl",)):
    return wanted(configured(text, zone), program, search_path=search_path, now=NOW)


def active(result):
    return [line.decode() for line in result.lines if not line.startswith(b"#")]


STEP = '[[batch.daily.step]]\nid = "31"\ngroup = "upload"\ncommand = ["sh"]\n'
CALL = "/usr/bin/env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin /opt/b/batchctl --config"
ROLLUP = '[rollup.{}]\nsource = "s"\ntime = "t"\n{}\n[rollup.{}.measures]\nn = "count(*)"\n'


@pytest.fixture(autouse=True)
def _system_in_utc(monkeypatch):
    from batchctl.schedule import crontab_lines

    real = crontab_lines.local_zone
    monkeypatch.setattr(crontab_lines, "local_zone", lambda name: real(name or "UTC"))


def test_batches_groups_and_grains_have_lines_of_their_own_disabled_ones_too():
    text = (
        f'[batch.daily]\nschedule = "0  1 * * *"\nenabled = false\n{STEP}'
        '[batch.daily.group.upload]\nschedule = "0 13 * * *"\n' + ROLLUP.format("trend", "enabled = false", "trend")
    )
    assert active(asked(text)) == [
        f"0 1 * * *    {CALL} /etc/batchctl.toml run-batch daily",
        f"0 13 * * *   {CALL} /etc/batchctl.toml run-batch daily --group upload",
        "* * * * *    sleep 5;  /opt/b/batchctl --config /etc/batchctl.toml aggregate --grain 1m",
        "*/5 * * * *  sleep 15; /opt/b/batchctl --config /etc/batchctl.toml aggregate --grain 5m",
        "1 * * * *    /opt/b/batchctl --config /etc/batchctl.toml aggregate --grain 1h",
    ]
    assert asked(text).warnings == ()


def test_of_several_rollups_each_line_names_its_own():
    hourly = 'grains = ["1h"]\nschedule = { "1h" = "1 * * * *" }\noffset = {}\n'
    text = "".join(ROLLUP.format(name, f'{hourly}target = "{name}_{{grain}}"', name) for name in "ab")
    assert [line.partition("aggregate ")[2] for line in active(asked(text))] == [
        "--rollup a --grain 1h",
        "--rollup b --grain 1h",
    ]


def test_what_has_no_schedule_is_named_and_gets_no_line():
    text = f"[batch.daily]\n{STEP}" + ROLLUP.format("a", 'grains = ["10m"]\nschedule = {}\noffset = {}', "a")
    result = asked(text)
    assert result.lines == ()
    assert [warning.partition(" has no schedule")[0] for warning in result.warnings] == ["daily", "a/10m"]


def test_times_of_another_zone_are_translated_where_that_is_exact():
    text = f'[batch.daily]\nschedule = "0 1 * * *"\n{STEP}' + ROLLUP.format("trend", "", "trend")
    seoul = asked(text, "Asia/Seoul")
    assert [line.split("  ")[0] for line in active(seoul)] == ["0 16 * * *", "* * * * *", "*/5 * * * *", "1 * * * *"]
    assert seoul.warnings == ()
    assert b"# daily: '0 1 * * *' in Asia/Seoul is this in UTC, cron's zone." in seoul.lines
    york = asked(text, "America/New_York")
    assert active(york) == active(asked(text))
    (warning,) = york.warnings
    assert "daily: '0 1 * * *' is meant in America/New_York" in warning
    assert [line for line in york.lines if line.startswith(b"# Not as configured: daily")]


def test_the_path_finds_each_command_where_it_is_found_today(tmp_path):
    first, second, third = (tmp_path / name for name in ("one", "two", "three"))
    for directory, programs in ((first, ["own", "both"]), (second, ["both", "unused"]), (third, ["sh", "both"])):
        directory.mkdir()
        for program in programs:
            (directory / program).write_text("#!/bin/sh\n")
            (directory / program).chmod(0o755)

    def path(*commands, here, more=""):
        steps = "".join(
            f'[[batch.d.step]]\nid = "{number}"\ncommand = ["{each}"]\n{more}' for number, each in enumerate(commands)
        )
        result = asked(f'[batch.d]\nschedule = "0 1 * * *"\n{steps}', search_path=":".join(map(str, here)))
        (line,) = active(result)
        return line.split(" PATH=")[1].split()[0].removesuffix(":".join(DEFAULT_PATH)), result.not_found

    assert path("sh", here=[first, "/usr/bin", "/bin"]) == ("", ())
    assert path("own", here=[first, second]) == (f"{first}:", ())
    assert path("sh", here=[third, "/bin"]) == (f"{third}:", ())
    # What `own` needs in front of cron's PATH would change what `both` is.
    assert path("both", "own", here=[second, first]) == (f"{second}:{first}:", ())
    assert path("./own", "{step}.sh", str(first / "own"), here=[first]) == ("", ())
    assert path("own", here=[first], more='env = { PATH = "/x" }\n') == ("", ())
    nothing, (warning,) = path("missing", here=[first, "", "relative"])
    assert nothing == ""
    assert "missing is not found" in warning


def test_the_program_is_the_installed_one_and_keeps_its_virtual_environment(monkeypatch, tmp_path):
    import sys

    installed, link = tmp_path / "bin" / "batchctl", tmp_path / "batchctl"
    installed.parent.mkdir()
    installed.write_text("#!/bin/sh\n")
    installed.chmod(0o755)
    link.symlink_to(installed)
    monkeypatch.setattr(sys, "argv", [str(link)])
    assert this_program() == (str(link),)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bin/../bin/batchctl"])
    assert this_program() == (str(installed),)
    # python -m batchctl, from an interpreter that is a link to another, as in a virtual environment
    python = installed.with_name("python")
    python.symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(sys, "argv", ["/x/batchctl/__main__.py"])
    assert this_program() == (str(installed),)
    installed.unlink()
    assert this_program() == (str(python), "-m", "batchctl")
