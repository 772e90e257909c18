"""simulate: what a schedule really does, through the installed command."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import psycopg
import pytest
from support import PROGRAM, batch

pytestmark = pytest.mark.any_user

HOUR = 3600
DAILY = ("--schedule", "0 1 * * *", "--start", "2024-01-01", "--timezone", "UTC")


@pytest.fixture
def simulate(tmp_path):
    """The command in an empty directory, as a stranger calls it: no configuration, no database."""

    def call(*arguments, code=0):
        done = subprocess.run(
            [str(PROGRAM), "simulate", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False,
            stdin=subprocess.DEVNULL, env={"PATH": "/usr/bin:/bin"},
        )  # fmt: skip
        assert done.returncode == code, done
        return done

    call.json = lambda *arguments: json.loads(call(*arguments, "--json").stdout)
    return call


def brief(played):
    """Return each event as the day and hour of its cron time, what happens, and when it ends."""
    return [
        (event["scheduled_at"][8:16], event["reason"] or event["action"], event["ends_at"] and event["ends_at"][8:16])
        for event in played["events"]
    ]


CADENCES = {
    "26 h": (
        ["--duration", "26h"], 48,
        [("01T01:00", "start", "02T03:00"), ("02T01:00", "running", None), ("03T01:00", "start", "04T03:00"),
         ("04T01:00", "running", None)],
    ),
    "30 h": (
        ["--duration", "30h"], 48,
        [("01T01:00", "start", "02T07:00"), ("02T01:00", "running", None), ("03T01:00", "start", "04T07:00"),
         ("04T01:00", "running", None)],
    ),
    "cut after 24.5 h": (
        ["--duration", "30h", "--timeout", "24h30m"], 48,
        [("01T01:00", "start", "02T01:30"), ("02T01:00", "running", None), ("03T01:00", "start", "04T01:30"),
         ("04T01:00", "running", None)],
    ),
    "26 h, gap_factor 1.2": (
        ["--duration", "26h", "--gap-factor", "1.2"], 72,
        [("01T01:00", "start", "02T03:00"), ("02T01:00", "running", None), ("03T01:00", "gap", None),
         ("04T01:00", "start", "05T03:00")],
    ),
    "16 h, gap_factor 1.2": (
        ["--duration", "16h", "--gap-factor", "1.2"], 48,
        [("01T01:00", "start", "01T17:00"), ("02T01:00", "gap", None), ("03T01:00", "start", "03T17:00"),
         ("04T01:00", "gap", None)],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("options", "hours", "events"), CADENCES.values(), ids=CADENCES)
def test_the_cadences_of_a_daily_schedule(simulate, options, hours, events):
    played = simulate.json(*DAILY, "--days", "4", *options)
    assert brief(played) == events
    assert played["cadence_seconds"] == hours * HOUR
    assert (played["version"], played["schedule"], played["timezone"]) == (1, "0 1 * * *", "UTC")
    outcomes = {event["outcome"] for event in played["events"] if event["action"] == "start"}
    assert outcomes == {"timeout" if "--timeout" in options else "success"}


def test_a_run_that_fits_starts_each_time_and_nothing_is_recommended(simulate):
    played = simulate.json(*DAILY, "--duration", "16h")
    assert [event["action"] for event in played["events"]] == ["start"] * 7
    assert (played["cadence_seconds"], played["recommendations"]) == (24 * HOUR, [])


def test_next_eligible_is_when_the_guards_would_allow_a_start(simulate):
    first, second, *_ = simulate.json(*DAILY, "--duration", "26h")["events"]
    assert first["next_eligible_at"] == second["next_eligible_at"] == "2024-01-02T09:00:00Z"


def test_several_durations_are_played_in_turn(simulate):
    played = simulate.json(*DAILY, "--duration", "26h", "--duration", "10h", "--days", "5")
    assert brief(played) == [
        ("01T01:00", "start", "02T03:00"), ("02T01:00", "running", None), ("03T01:00", "start", "03T11:00"),
        ("04T01:00", "start", "05T03:00"), ("05T01:00", "running", None),
    ]  # fmt: skip
    assert played["cadence_seconds"] == 36 * HOUR
    (job,) = played["jobs"]
    assert (job["shortest_seconds"], job["longest_seconds"]) == (24 * HOUR, 48 * HOUR)


def test_every_and_its_minute_of_jitter(simulate):
    played = simulate.json(*DAILY, "--duration", "2h", "--every", "48h", "--days", "3")
    assert [event["reason"] for event in played["events"]] == [None, "not_due", None]
    assert played["events"][1]["next_eligible_at"] == "2024-01-03T00:59:00Z"


@pytest.mark.parametrize(
    ("schedule", "options", "seconds"),
    [
        ("*/5 * * * *", ["--duration", "26h"], 32 * HOUR),
        ("0 * * * *", ["--duration", "26h", "--every", "30h"], 32 * HOUR),
        ("0 1 29 2 *", ["--duration", "26h"], 1461 * 24 * HOUR),
        ("0 1 * * 1-5", ["--duration", "26h"], 7 * 24 * HOUR / 3),
        ("0 1 */2 * *", ["--duration", "1h"], None),
        ("0 1 * * *", ["--duration", "26h", "--days", "1"], 48 * HOUR),
        ("0 1 * * *", ["--duration", "90d", "--timeout", "3650d"], 91 * 24 * HOUR),
    ],
)
def test_the_cadence_is_that_of_the_long_run(simulate, schedule, options, seconds):
    found = simulate.json("--schedule", schedule, "--start", "2024-01-01", "--timezone", "UTC", *options)
    cadence = found["cadence_seconds"]
    if seconds is None:
        # Four years have 731 odd days of a month and five others less than twice as many days.
        days = [datetime(2024, 1, 1) + timedelta(days=day) for day in range(1461)]
        seconds = 1461 * 24 * HOUR / sum(day.day % 2 for day in days)
    assert cadence == pytest.approx(seconds, rel=1e-12)


def recommended(played):
    return {each["kind"]: each["cadence_seconds"] / HOUR for each in played["recommendations"]}


def test_each_recommendation_gives_the_cadence_that_it_says_when_it_is_simulated(simulate):
    played = simulate.json(*DAILY, "--duration", "26h", "--gap-factor", "1.2")
    found = recommended(played)
    assert list(found.values()) == sorted(found.values())
    assert found == {"parallel": 48, "gap": 48, "hourly": 58, "schedule": 60, "every": 72}
    base = ("--duration", "26h", "--gap-factor", "1.2", "--start", "2024-01-01", "--timezone", "UTC")
    for each in played["recommendations"]:
        if each["kind"] in ("hourly", "schedule", "every"):
            options = {"schedule": "0 1 * * *"} | dict(re.findall(r'(schedule|every) = "([^"]+)"', each["text"]))
            arguments = [word for option, value in options.items() for word in (f"--{option}", value)]
            assert simulate.json(*base, *arguments)["cadence_seconds"] == each["cadence_seconds"], each
    halves = simulate.json(*DAILY, "--duration", "13h", "--gap-factor", "1.2")
    assert halves["cadence_seconds"] == found["parallel"] * HOUR


def test_what_is_not_better_is_not_recommended(simulate):
    played = simulate.json(*DAILY, "--duration", "26h")
    # Two groups of 13 hours each do not fit into one day one after the other.
    assert recommended(played) == {"parallel": 24, "hourly": 32, "schedule": 36, "every": 48}
    assert recommended(simulate.json(*DAILY, "--duration", "20h"))["split"] == 24


def test_every_second_day_as_a_rule_is_not_given_up_for_a_short_run(simulate):
    """26 hours come to 48 by themselves; with `every` they still do after a run of two."""
    lengths = ("--duration", "26h", "--duration", "2h", "--days", "6")
    assert [event["reason"] for event in simulate.json(*DAILY, *lengths)["events"]] == [
        None, "running", None, None, "running", None,
    ]  # fmt: skip
    (text,) = [
        each["text"] for each in simulate.json(*DAILY, "--duration", "26h")["recommendations"]
        if each["kind"] == "every"
    ]  # fmt: skip
    assert text.startswith('every = "48h": what it comes to now becomes the rule')
    assert [event["reason"] for event in simulate.json(*DAILY, *lengths, "--every", "48h")["events"]] == [
        None, "running", None, "not_due", None, "running",
    ]  # fmt: skip
    hourly = simulate.json("--schedule", "0 * * * *", "--duration", "18h", "--timezone", "UTC")
    (text,) = [each["text"] for each in hourly["recommendations"] if each["kind"] == "every"]
    assert text == 'every = "24h": what it comes to now becomes the rule, also after a run that was short'


def test_every_second_day_of_a_month_is_no_rhythm(simulate):
    line = ("--schedule", "0 1 */2 * *", "--duration", "26h", "--start", "2024-01-30", "--timezone", "UTC")
    played = simulate.json(*line, "--days", "5")
    assert brief(played) == [
        ("31T01:00", "start", "01T03:00"), ("01T01:00", "running", None), ("03T01:00", "start", "04T03:00"),
    ]  # fmt: skip
    assert played["cadence_seconds"] > 48 * HOUR
    assert recommended(played)["every"] == 48
    (text,) = [each["text"] for each in played["recommendations"] if each["kind"] == "every"]
    assert 'every = "48h"' in text


@pytest.mark.parametrize(
    ("schedule", "zone", "year"), [("0 1 * * *", "Europe/London", 2026), ("30 2 * * *", "America/New_York", 2026)]
)
def test_a_year_with_both_changes_of_the_clocks(simulate, schedule, zone, year):
    options = ("--schedule", schedule, "--duration", "26h", "--start", f"{year}-01-01", "--timezone", zone)
    played = simulate.json(*options, "--days", "365")
    marked = {event["scheduled_at"]: event for event in played["events"] if event["daylight_saving"]}
    changes = {
        "Europe/London": {"2026-03-29T01:00:00Z": "missing", "2026-10-25T00:00:00Z": "twice"},
        # The clocks go back from 02:00 to 01:00, so 02:30 comes once.
        "America/New_York": {"2026-03-08T07:00:00Z": "missing"},
    }[zone]
    assert {at: event["daylight_saving"] for at, event in marked.items()} == changes
    assert all("daylight saving" in event["note"] for event in marked.values())
    # Once a day, whatever the clocks do; every second day starts, by the local clock.
    local = [
        datetime.fromisoformat(event["scheduled_at"]).astimezone(ZoneInfo(zone)).date() for event in played["events"]
    ]
    assert local == [datetime(year, 1, 1).date() + timedelta(days=day) for day in range(365)]
    assert [event["action"] for event in played["events"]] == ["start", "skip"] * 182 + ["start"]
    assert played["cadence_seconds"] == 48 * HOUR


def test_every_day_means_each_day_of_both_changes_of_the_clocks(simulate):
    for day in ("2026-03-27", "2026-10-23"):
        options = ("--schedule", "0 1 * * *", "--duration", "1h", "--every", "24h", "--timezone", "Europe/London")
        done = (*options, "--start", day, "--days", "5")
        assert [event["action"] for event in simulate.json(*done)["events"]] == ["start"] * 5, day
        # Also the run that ends when clocks show again what they showed at its beginning has a bar.
        drawn = simulate(*done).stdout
        assert len(re.findall(r"^\w{3} 2026-\d\d-\d\d  [.#]*#[.#]*$", drawn, re.MULTILINE)) == 5


def test_new_york_repeats_half_past_one(simulate):
    options = ("--schedule", "30 1 * * *", "--duration", "1h", "--start", "2026-11-01", "--days", "1")
    fixed = simulate.json(*options, "--timezone", "America/New_York")
    assert [(event["scheduled_at"], event["daylight_saving"]) for event in fixed["events"]] == [
        ("2026-11-01T05:30:00Z", "twice")
    ]
    # What has a star in front of its minute or hour follows the clock.
    wild = simulate.json("--schedule", "*/30 1 * * *", *options[2:], "--timezone", "America/New_York")
    assert [event["scheduled_at"][11:16] for event in wild["events"]] == ["05:00", "05:30", "06:00", "06:30"]
    assert {event["daylight_saving"] for event in wild["events"]} == {"twice"}


def test_a_line_with_a_star_leaves_the_missing_hour_out(simulate):
    options = ("--duration", "1h", "--start", "2026-03-28", "--days", "3", "--timezone", "Europe/London")
    played = simulate.json("--schedule", "*/30 1 * * *", *options)
    assert [event["scheduled_at"] for event in played["events"]] == [
        "2026-03-28T01:00:00Z", "2026-03-28T01:30:00Z", "2026-03-30T00:00:00Z", "2026-03-30T00:30:00Z",
    ]  # fmt: skip
    assert played["events"][2]["note"].startswith("01:00 to 01:30 do not exist on 2026-03-29")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--schedule", "0 1 * * *"], 2, "give --duration 26h, or a batch"),
        (["--duration", "26h"], 2, "give --schedule '0 1 * * *', or a batch"),
        ([*DAILY, "--duration", "0s"], 2, "--duration: found '0s', expected a duration longer than nothing"),
        ([*DAILY, "--duration", "26"], 2, "--duration: found '26', expected a duration such as"),
        (["--schedule", "0 1 * *", "--duration", "26h"], 2, "--schedule: found '0 1 * *', expected five cron fields"),
        ([*DAILY, "--duration", "26h", "--days", "0"], 2, "'--days'"),
        (["--schedule", "* * * * *", "--duration", "26h", "--days", "4000"], 2, "more than 100,000 cron times"),
        ([*DAILY, "--duration", "26h", "--timezone", "Mars/Base"], 2, "--timezone: found 'Mars/Base'"),
        ([*DAILY, "--duration", "26h", "--gap-factor", "nan"], 2, "--gap-factor: found nan, expected a number"),
        ([*DAILY, "--duration", "26h", "--start", "soon"], 2, "--start soon: expected a day"),
        ([*DAILY, "--duration", "26h", "--start", "9999-12-31"], 2, "expected a year from 1970"),
        (["daily", "--duration", "26h"], 78, "no configuration file"),
    ],
)
def test_what_cannot_be_played_is_said_in_one_line(simulate, arguments, code, said):
    done = simulate(*arguments, code=code)
    assert done.stdout == ""
    assert said in done.stderr
    assert "Traceback" not in done.stderr


GROUPS = batch([("31", "true", 'group = "search"'), ("61", "true", 'group = "upload"')], 'schedule = "0 1 * * *"') + (
    '[batch.daily.group.upload]\nschedule = "0 13 * * *"\nmin_gap = "0s"\n'
)


def test_a_configured_batch_with_a_group_of_its_own(batchctl):
    batchctl.configure(GROUPS)
    arguments = ("daily", "--start", "2024-01-01", "--days", "1", "--duration", "upload=2h")
    clash = batchctl.json("simulate", *arguments, "--duration", "14h")
    assert [(event["job"], event["reason"]) for event in clash["events"]] == [
        ("daily", None), ("daily/upload", "running"),
    ]  # fmt: skip
    assert {job["job"]: job["cadence_seconds"] for job in clash["jobs"]} == {"daily": 24 * HOUR, "daily/upload": None}
    # Upload at 15:00 ends before the whole batch has its gap.
    assert recommended(clash) == {"schedule": 24}
    assert clash["recommendations"][0]["text"] == 'schedule = "0 15 * * *" for daily/upload'
    fits = batchctl.json("simulate", *arguments, "--duration", "10h")
    assert [event["action"] for event in fits["events"]] == ["start", "start"]
    # The completion of the group counts for the whole batch.
    longer = [word.replace("upload=2h", "upload=7h") for word in arguments]
    late = batchctl.json("simulate", *longer, "--duration", "10h", "--days", "2")
    assert [(event["job"], event["reason"]) for event in late["events"]] == [
        ("daily", None), ("daily/upload", None), ("daily", "gap"), ("daily/upload", None),
    ]  # fmt: skip
    tight = batchctl.json("simulate", *arguments, "--duration", "10h", "--days", "2", "--min-gap", "11h")
    assert [event["reason"] for event in tight["events"]] == [None, "gap", None, "gap"]


def test_options_stand_in_for_the_configuration(batchctl):
    batchctl.configure(
        batch([("31", "true")], 'schedule = "0 1 * * *"\ngap_factor = 1.2\nevery = "96h"\nhours = "0-6"')
    )
    arguments = ("--start", "2024-01-01", "--duration", "26h")
    assert batchctl.json("simulate", *arguments)["cadence_seconds"] == 96 * HOUR
    assert batchctl.json("simulate", *arguments, "--every", "")["cadence_seconds"] == 72 * HOUR
    both = batchctl.json("simulate", *arguments, "--every", "", "--gap-factor", "0")
    assert both["cadence_seconds"] == 48 * HOUR
    outside = batchctl.json("simulate", "daily", *arguments, "--schedule", "0 8 * * *")
    assert {event["reason"] for event in outside["events"]} == {"outside_hours"}
    assert outside["cadence_seconds"] is None
    assert "schedule" in recommended(outside)


@pytest.mark.each_server
def test_the_last_real_durations_are_played(batchctl):
    batchctl.configure(GROUPS + 'hours = ""\n')
    done = batchctl("simulate", "daily", code=2)
    assert "daily has no complete run of its own yet" in done.stderr
    assert "--duration 6h" in done.stderr
    assert "give --duration" in done.stderr
    batchctl("run-batch", "daily")
    # A group that never ran alone is played by its steps in runs of the whole batch.
    with psycopg.connect(batchctl.url) as connection:
        connection.execute("UPDATE batchctl.run SET duration = interval '2 hours'")
        connection.execute("UPDATE batchctl.step_run SET started_at = finished_at - interval '1 hour'")
    played = batchctl.json("simulate", "daily", "--start", "2024-01-01", "--days", "1")
    assert [(event["job"], event["ends_at"]) for event in played["events"]] == [
        ("daily", "2024-01-01T03:00:00Z"), ("daily/upload", "2024-01-01T14:00:00Z"),
    ]  # fmt: skip
    batchctl("run-batch", "daily", "--force-gap", "--group", "upload")
    batchctl("run-batch", "daily", "--force-gap", "--step", "31")
    with psycopg.connect(batchctl.url) as connection:
        changed = connection.execute(
            "UPDATE batchctl.run SET duration = CASE job WHEN 'daily' THEN interval '20 hours' ELSE '90 minutes' END"
        )
        assert changed.rowcount == 3
        connection.execute(
            "UPDATE batchctl.step_run SET started_at = finished_at - CASE step WHEN '31' THEN interval '15 hours' "
            "ELSE '5 hours' END"
        )
    played = batchctl.json("simulate", "daily", "--start", "2024-01-01", "--days", "2")
    assert [(event["job"], event["reason"], event["ends_at"]) for event in played["events"]] == [
        ("daily", None, "2024-01-01T21:00:00Z"), ("daily/upload", "running", None),
        ("daily", "gap", None), ("daily/upload", None, "2024-01-02T14:30:00Z"),
    ]  # fmt: skip
    # Of a split, each group takes what its steps took.
    options = 'schedule = "0 1 * * *"\ngap_factor = 0.6'
    batchctl.configure(batch([("31", "true", 'group = "search"'), ("61", "true", 'group = "upload"')], options))
    with psycopg.connect(batchctl.url) as connection:
        connection.execute("UPDATE batchctl.run SET duration = '16 hours'")
        connection.execute(
            "UPDATE batchctl.step_run SET started_at = finished_at - CASE step WHEN '31' THEN interval '12 hours' "
            "ELSE '4 hours' END"
        )
    advice = batchctl.json("simulate", "daily", "--start", "2024-01-01")["recommendations"]
    assert {each["kind"]: each["text"] for each in advice}["split"] == (
        'two groups with schedules of their own: search at "0 1 * * *" (about 12h0m) and '
        'upload at "0 13 * * *" (about 4h0m)'
    )


@pytest.mark.each_server
def test_after_a_change_of_quantities_the_estimate_is_played(batchctl):
    steps = 'group = "search"\nquantity = {}', 'group = "upload"'
    configured = batch([("31", "true", steps[0]), ("61", "true", steps[1])], 'schedule = "0 1 * * *"\ngap_factor = 0.5')
    batchctl.configure(configured.format(100))
    batchctl("run-batch", "daily")
    with psycopg.connect(batchctl.url) as connection:
        connection.execute("UPDATE batchctl.run SET duration = '12 hours'")
        connection.execute("UPDATE batchctl.step_run SET started_at = finished_at - interval '6 hours'")
    arguments = ("simulate", "daily", "--start", "2024-01-01", "--days", "1")
    assert batchctl.json(*arguments)["events"][0]["ends_at"] == "2024-01-01T13:00:00Z", "as it was"
    batchctl.configure(configured.format(200))
    assert batchctl.json("status")["jobs"][0]["estimate_seconds"] == 18 * HOUR
    played = batchctl.json(*arguments)
    assert played["events"][0]["ends_at"] == "2024-01-01T19:00:00Z"
    # The gap is half of the same estimate, and a half of the batch takes what its steps will take.
    assert played["events"][0]["next_eligible_at"] == "2024-01-02T04:00:00Z"
    (split,) = [each["text"] for each in played["recommendations"] if each["kind"] == "split"]
    assert split.endswith('search at "0 1 * * *" (about 12h0m) and upload at "0 13 * * *" (about 6h0m)')


def test_no_database_is_asked_when_durations_are_given(batchctl):
    batchctl.configure(GROUPS)
    batchctl.environment["BATCHCTL_DATABASE_URL"] = "postgresql://nobody@127.0.0.1:1/none"
    assert batchctl.json("simulate", "--duration", "2h")["cadence_seconds"] == 24 * HOUR
    assert "cannot be reached" in batchctl("simulate", code=69).stderr, "the control"


def on_a_terminal(directory, *arguments, columns=80):
    """Run the command on a pseudo-terminal and return what it draws."""
    master, slave = pty.openpty()
    environment = {"PATH": "/usr/bin:/bin", "COLUMNS": str(columns), "TERM": "dumb"}
    with subprocess.Popen([str(PROGRAM), "simulate", *arguments], cwd=directory, stdout=slave, stderr=slave,
                          stdin=subprocess.DEVNULL, env=environment) as process:  # fmt: skip
        os.close(slave)
        drawn = b""
        while True:
            try:
                drawn += (read := os.read(master, 65536))
            except OSError:
                break
            if not read:
                break
    os.close(master)
    assert process.returncode == 0, drawn
    return re.sub(r"\x1b\[[0-9;]*m", "", drawn.decode()).replace("\r\n", "\n")


def test_a_terminal_of_80_columns_shows_table_time_line_cadence_and_advice(tmp_path):
    drawn = on_a_terminal(tmp_path, *DAILY, "--duration", "26h")
    assert all(len(line) <= 80 for line in drawn.splitlines())
    assert "2    2024-01-02 01:00  skipped: running  -                 2024-01-02 09:00" in drawn
    assert "Tue 2024-01-02  ##x###...." in drawn
    assert "It starts every 48h (2 days) in the long run, not every 24h as scheduled." in drawn
    assert 'every 32h  hourly    schedule = "0 * * * *"' in drawn


def test_without_a_terminal_the_same_is_written_line_by_line(simulate):
    printed = simulate(*DAILY, "--duration", "26h").stdout
    assert "2    2024-01-02 01:00  skipped: running  -                 2024-01-02 09:00\n" in printed
    assert printed.isascii()


def test_a_long_series_of_equal_skips_is_shown_by_its_ends(simulate):
    options = ("--schedule", "*/5 * * * *", "--duration", "26h", "--start", "2024-01-01", "--timezone", "UTC")
    printed = simulate(*options).stdout
    assert "     309 more          skipped: running\n" in printed
    assert len(printed.splitlines()) < 70
    assert len(simulate.json(*options)["events"]) == 7 * 288


def test_neither_the_driver_nor_a_terminal_library_is_loaded(tmp_path):
    code = (
        "import sys\nfrom batchctl.cli.app import main\ntry:\n    main()\n"
        "except SystemExit:\n    print(sorted({'psycopg', 'rich', 'psutil', 'filelock'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [str(PROGRAM.with_name("python")), "-c", code, "simulate", *DAILY, "--duration", "26h", "--json"],
        cwd=tmp_path, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "[]"


def test_today_is_where_it_begins(simulate):
    played = simulate.json("--schedule", "0 1 * * *", "--duration", "1h", "--timezone", "UTC", "--days", "1")
    (event,) = played["events"]
    begun = datetime.fromisoformat(event["scheduled_at"])
    assert abs(begun - datetime.now(UTC)) < timedelta(days=1, minutes=5)
