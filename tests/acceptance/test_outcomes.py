"""Every outcome, skip reason and exit code, each really produced by the installed command on a real database.

Each case below is a function that brings it about, and what a caller then sees. The last tests compare the cases with
what the program and docs/reference know: a new outcome, reason or code without a case is an error.
"""

from __future__ import annotations

import ast
import json
import os
import re
import signal
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import psycopg
import pytest
from support import NOWHERE, ROLLUP, batch, gone, wait_for

from batchctl.batch import guards
from batchctl.errors import ExitCode
from batchctl.guard.identity import identify
from batchctl.guard.lock import Holder, acquire, lock_path
from batchctl.state import sql

pytestmark = pytest.mark.any_user

JSON_MD = Path(__file__).resolve().parents[2] / "docs" / "reference" / "json.md"
NO_DATABASE = {"BATCHCTL_DATABASE_URL": NOWHERE}
ENDLESS = "echo $$ >step.pid; exec sleep 300"
UNTIL_TOLD = "touch started; while ! test -e go; do sleep 0.05; done"


@dataclass(frozen=True)
class Seen:
    """What a caller sees: the exit code as a shell has it, and what the JSON document says, if there is one."""

    code: int
    outcome: str | None = None
    reason: str | None = None
    steps: tuple[str, ...] = ()


def skipped(reason, code=ExitCode.SKIPPED):
    return Seen(code, "skipped", reason)


RUN_BATCH, AGGREGATE = {}, {}


def case(cases, seen):
    """Enter a function into a table, with what is seen after it."""

    def enter(function):
        assert function.__name__ not in cases
        cases[function.__name__] = (function, seen)
        return function

    return enter


# run-batch


def steps(*lines, options=""):
    return batch([(str(number), line) for number, line in enumerate(lines, 31)], options)


def ended(process):
    stdout, stderr = process.communicate(timeout=60)
    assert "Traceback" not in stderr, stderr
    document = json.loads(stdout) if stdout else {"outcome": None, "reason": None, "steps": []}
    return Seen(
        128 - process.returncode if process.returncode < 0 else process.returncode,
        document["outcome"],
        document["reason"],
        tuple(step["outcome"] for step in document["steps"]),
    )


def run(batchctl, *arguments):
    return ended(batchctl.start("run-batch", "--json", *arguments))


def run_steps(batchctl, *lines, options=""):
    batchctl.configure(steps(*lines, options=options))
    return run(batchctl)


@contextmanager
def run_in_progress(batchctl):
    process = batchctl.start("run-batch")
    wait_for((batchctl.directory / "started").exists)
    yield
    (batchctl.directory / "go").touch()
    assert ended(process).code == 0


@contextmanager
def killed_run(batchctl):
    """Kill batchctl, so that its step is left alone; end that too at the end."""
    batchctl.configure(steps(ENDLESS))
    process = batchctl.start("run-batch", "--json")
    pid = batchctl.pid()
    with psycopg.connect(batchctl.url) as connection:
        wait_for(lambda: connection.execute("SELECT FROM batchctl.step_run").fetchone() is not None)
    process.kill()
    try:
        yield ended(process)
    finally:
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: gone(pid))


@case(RUN_BATCH, Seen(0, "success", None, ("success", "success")))
def every_step_succeeds(batchctl):
    return run_steps(batchctl, "true", "true")


@case(RUN_BATCH, Seen(3, "partial", None, ("failed", "failed", "success")))
def some_steps_fail(batchctl):
    return run_steps(batchctl, "exit 7", "kill -9 $$", "true")


@case(RUN_BATCH, Seen(3, "partial", None, ("timeout", "success")))
def a_step_reaches_its_timeout(batchctl):
    return run_steps(batchctl, "exec sleep 60", "true", options='step_timeout = "1s"\ngrace = "1s"')


@case(RUN_BATCH, Seen(1, "failed", None, ("failed", "failed")))
def no_step_succeeds(batchctl):
    return run_steps(batchctl, "exit 1", "exit 2")


@case(RUN_BATCH, Seen(1, "failed", 'on_failure = "stop"', ("success", "failed", "not_run")))
def the_first_failure_ends_the_run(batchctl):
    return run_steps(batchctl, "true", "exit 1", "true", options='on_failure = "stop"')


@case(
    RUN_BATCH,
    Seen(124, "timeout", "the whole run reached its timeout of 2s", ("success", "timeout", "not_run")),
)
def the_run_reaches_its_deadline(batchctl):
    return run_steps(batchctl, "true", "exec sleep 60", "true", options='timeout = "2s"\ngrace = "1s"')


def signalled(batchctl, number):
    batchctl.configure(steps(ENDLESS, "true"))
    process = batchctl.start("run-batch", "--json")
    pid = batchctl.pid()
    process.send_signal(number)
    seen = ended(process)
    assert gone(pid)
    return replace(seen, reason=None)


STOPPED = Seen(ExitCode.SIGNAL, "stopped", None, ("stopped", "not_run"))


@case(RUN_BATCH, replace(STOPPED, code=143))
def a_sigterm_ends_the_run(batchctl):
    return signalled(batchctl, signal.SIGTERM)


@case(RUN_BATCH, replace(STOPPED, code=130))
def a_sigint_ends_the_run(batchctl):
    return signalled(batchctl, signal.SIGINT)


@case(RUN_BATCH, replace(STOPPED, code=129))
def a_sighup_ends_the_run(batchctl):
    return signalled(batchctl, signal.SIGHUP)


@case(RUN_BATCH, Seen(137, "crashed", None, ("crashed",)))
def batchctl_is_killed(batchctl):
    """A run cannot say itself that it crashed: the next start finds out, and history and state table say so."""
    with killed_run(batchctl) as seen:
        pass
    batchctl.configure(steps("true"))
    assert run(batchctl).outcome == "success"
    crashed = batchctl.json("history")["entries"][-1]
    with psycopg.connect(batchctl.url) as connection:
        rows = connection.execute("SELECT outcome FROM batchctl.step_run WHERE run_id = %s", [crashed["run_id"]])
        return replace(seen, outcome=crashed["outcome"], steps=tuple(row[0] for row in rows))


@case(RUN_BATCH, skipped("running"))
def the_batch_runs_already(batchctl):
    batchctl.configure(steps(UNTIL_TOLD))
    with run_in_progress(batchctl):
        return run(batchctl)


@case(RUN_BATCH, skipped("orphans"))
def an_earlier_run_left_a_process(batchctl):
    with killed_run(batchctl):
        return run(batchctl)


@case(RUN_BATCH, skipped("running_elsewhere"))
def another_host_runs_the_batch(batchctl):
    batchctl.configure(steps(UNTIL_TOLD))
    elsewhere = replace(batchctl, directory=batchctl.directory / "elsewhere")
    elsewhere.directory.mkdir()
    elsewhere.configure(steps(UNTIL_TOLD))
    with run_in_progress(elsewhere):
        return run(batchctl)


@case(RUN_BATCH, skipped("gap"))
def the_last_run_completed_just_now(batchctl):
    batchctl.configure(steps("true"))
    assert run(batchctl).code == 0
    return run(batchctl)


@case(RUN_BATCH, skipped("not_due"))
def the_last_run_started_just_now(batchctl):
    batchctl.configure(steps("true", options='min_gap = "0s"\nevery = "30h"'))
    assert run(batchctl).code == 0
    return run(batchctl)


def another_hour():
    # Twelve hours away, so that an hour that ends just now changes nothing.
    return (datetime.now(UTC).hour + 12) % 24


@case(RUN_BATCH, skipped("outside_hours"))
def it_is_another_hour(batchctl):
    return run_steps(batchctl, "true", options=f'hours = "{another_hour()}"')


@case(RUN_BATCH, skipped("paused"))
def the_batch_is_paused(batchctl):
    batchctl.configure(steps("true"))
    batchctl("pause", "daily")
    return run(batchctl)


@case(RUN_BATCH, skipped("disabled"))
def the_batch_is_disabled(batchctl):
    return run_steps(batchctl, "true", options="enabled = false")


@case(RUN_BATCH, skipped("disabled", code=9))
def a_skip_has_the_code_that_is_wanted(batchctl):
    batchctl.configure(steps("true", options="enabled = false"))
    return run(batchctl, "--skip-exit-code", "9")


@case(RUN_BATCH, Seen(2))
def a_batch_is_not_configured(batchctl):
    batchctl.configure(steps("true"))
    return run(batchctl, "nightly")


@case(RUN_BATCH, Seen(69))
def the_database_is_down(batchctl):
    batchctl.environment = NO_DATABASE
    return run_steps(batchctl, "true")


def broken(batchctl):
    """Put a library that cannot be loaded in front of the real one."""
    directory = batchctl.directory / "broken"
    directory.mkdir()
    (directory / "cronsim.py").write_text('raise RuntimeError("broken")\n')
    return {"PYTHONPATH": str(directory)}


@case(RUN_BATCH, Seen(70))
def something_happens_that_nobody_expected(batchctl):
    batchctl.environment = broken(batchctl)
    return run_steps(batchctl, "true")


@case(RUN_BATCH, Seen(78))
def a_key_is_not_known(batchctl):
    return run_steps(batchctl, "true", options="no_such_key = 1")


# aggregate, one grain of one rollup


def source(batchctl, *values, rollup=ROLLUP):
    """Make a migrated rollup over rows of these values."""
    batchctl.configure(rollup)
    with psycopg.connect(batchctl.url) as connection:
        connection.execute("CREATE TABLE fact_events (occurred_at timestamptz DEFAULT '2025-11-13', value integer)")
        for value in values:
            connection.execute("INSERT INTO fact_events (value) VALUES (%s)", [value])
    batchctl("migrate")


def aggregate(batchctl, *arguments):
    process = batchctl.start("aggregate", "--grain", "1m", "--json", *arguments)
    stdout, stderr = process.communicate(timeout=60)
    assert "Traceback" not in stderr, stderr
    if not stdout:
        return Seen(process.returncode)
    (grain,) = json.loads(stdout)["rollups"]
    # The reason of a failure is an error in words.
    reason = None if grain["outcome"] == "failed" else grain["reason"]
    return Seen(process.returncode, grain["outcome"], reason)


@case(AGGREGATE, Seen(0, "success"))
def there_are_new_events(batchctl):
    source(batchctl, 1)
    return aggregate(batchctl)


@case(AGGREGATE, Seen(0, "empty"))
def there_is_nothing_new(batchctl):
    source(batchctl)
    return aggregate(batchctl)


@case(AGGREGATE, Seen(1, "failed"))
def a_bucket_cannot_be_computed(batchctl):
    source(batchctl, 0, rollup=f'{ROLLUP}ratio = "max(1 / value)"\n')
    return aggregate(batchctl)


@case(AGGREGATE, Seen(78, "failed"))
def the_rollup_is_not_migrated(batchctl):
    batchctl.configure(ROLLUP)
    return aggregate(batchctl)


@case(AGGREGATE, skipped("running"))
def the_grain_is_aggregated_already(batchctl):
    source(batchctl)
    path = lock_path(batchctl.directory / "state", "rollup.trend.1m")
    with acquire(path, Holder("here", *identify(os.getpid()), datetime.now(UTC))):
        return aggregate(batchctl)


@case(AGGREGATE, skipped("running_elsewhere"))
def the_grain_is_aggregated_elsewhere(batchctl):
    source(batchctl, 1)
    with psycopg.connect(batchctl.url) as connection:
        connection.execute("SELECT FROM batchctl.state WHERE job = 'trend/1m' FOR UPDATE")
        return aggregate(batchctl)


@case(AGGREGATE, skipped("disabled"))
def the_rollup_is_disabled(batchctl):
    batchctl.configure(ROLLUP.replace("time =", "enabled = false\ntime ="))
    return aggregate(batchctl)


@case(AGGREGATE, skipped("outside_hours"))
def it_is_another_hour_for_the_rollup(batchctl):
    batchctl.configure(ROLLUP.replace("time =", f'hours = "{another_hour()}"\ntime ='))
    return aggregate(batchctl)


@case(AGGREGATE, skipped("paused"))
def the_rollup_is_paused(batchctl):
    source(batchctl, 1)
    batchctl("pause", "trend")
    return aggregate(batchctl)


@case(AGGREGATE, skipped("paused", code=0))
def a_skip_of_aggregate_has_the_code_that_is_wanted(batchctl):
    source(batchctl, 1)
    batchctl("pause", "trend")
    return aggregate(batchctl, "--skip-exit-code", "0")


@case(AGGREGATE, Seen(2))
def a_rollup_is_not_configured(batchctl):
    batchctl.configure(ROLLUP)
    return aggregate(batchctl, "--rollup", "other")


@case(AGGREGATE, Seen(69))
def the_database_of_the_rollup_is_down(batchctl):
    batchctl.configure(ROLLUP)
    batchctl.environment = NO_DATABASE
    return aggregate(batchctl)


@case(AGGREGATE, Seen(70))
def aggregate_meets_what_nobody_expected(batchctl):
    batchctl.configure(ROLLUP)
    batchctl.environment = broken(batchctl)
    return aggregate(batchctl)


@case(AGGREGATE, Seen(78))
def a_key_of_a_rollup_is_not_known(batchctl):
    batchctl.configure(f"{ROLLUP}[rollup.trend.no_such_table]\n")
    return aggregate(batchctl)


@pytest.mark.parametrize("name", [*RUN_BATCH, *AGGREGATE])
def test_what_is_seen_when(batchctl, name):
    produce, expected = {**RUN_BATCH, **AGGREGATE}[name]
    assert produce(batchctl) == expected


# The cases are complete


def known(heading, key, *, of=None):
    """Return the values that a row of json.md names: all of them, or those after `of a skip:` up to the semicolon."""
    section = re.split(rf"^#+ {re.escape(heading)}$", JSON_MD.read_text(), maxsplit=1, flags=re.MULTILINE)[1]
    text = re.search(rf"^\| `{key}` \| (.*) \|$", section, re.MULTILINE)[1]
    if of is not None:
        text = re.search(rf"{of}: ([^;]*)", text)[1]
    return set(re.findall(r"`(\w+)`", text)) - {"null"}


def outcomes(cases):
    return {seen.outcome for _, seen in cases.values()} - {None}


def reasons(cases):
    return {seen.reason for _, seen in cases.values() if seen.outcome == "skipped"}


def codes(cases):
    """Return the exit codes of the cases, without those that --skip-exit-code chose."""
    return {min(seen.code, ExitCode.SIGNAL) for name, (_, seen) in cases.items() if "is_wanted" not in name}


def allowed(table):
    """Return the outcomes that a table of the schema takes."""
    (text,) = [
        migration.text for migration in sql.migrations() if f"CREATE TABLE {{schema}}.{table} (" in migration.text
    ]
    made = text.partition(f"CREATE TABLE {{schema}}.{table} (")[2].partition(");")[0]
    return set(re.findall(r"'(\w+)'", re.search(r"outcome IN \((.*)\)", made)[1]))


def skip_reasons_in_the_code():
    """Return the first argument of every Skip that batch/guards.py makes, directly or for a run in progress."""
    calls = [node for node in ast.walk(ast.parse(Path(guards.__file__).read_text())) if isinstance(node, ast.Call)]
    names = {"Skip", "_in_progress"}
    first = [call.args[0] for call in calls if getattr(call.func, "id", getattr(call.func, "attr", "")) in names]
    # A refusal's reason is a field: gap or not_due.
    return {each.value for each in first if isinstance(each, ast.Constant)} - {guards.INTERRUPTED.reason}


def test_every_exit_code_is_produced():
    assert codes(RUN_BATCH) == set(ExitCode)
    # No policy makes a partial success of aggregate, and it has a budget instead of a deadline; a signal ends it.
    assert codes(AGGREGATE) == set(ExitCode) - {ExitCode.PARTIAL, ExitCode.DEADLINE, ExitCode.SIGNAL}


def test_every_outcome_of_a_run_is_produced():
    assert outcomes(RUN_BATCH) == known("entries", "outcome") == allowed("run") | {"skipped"}
    assert known("run-batch", "outcome") == outcomes(RUN_BATCH) - {"crashed"}


def test_every_outcome_of_a_step_is_produced():
    produced = {outcome for _, seen in RUN_BATCH.values() for outcome in seen.steps}
    assert produced == known("steps", "outcome") | {"crashed"} == allowed("step_run") | {"not_run"}


def test_every_skip_reason_is_produced():
    assert reasons(RUN_BATCH) == known("run-batch", "reason", of="of a skip")
    assert skip_reasons_in_the_code() == reasons(RUN_BATCH) - {"gap", "not_due"}
    assert reasons(AGGREGATE) == known("rollups", "reason", of="of a skip")


def test_every_outcome_of_aggregate_is_produced():
    assert outcomes(AGGREGATE) == known("rollups", "outcome")


def test_a_missing_case_would_be_noticed():
    without = {name: entry for name, entry in RUN_BATCH.items() if entry[1].reason != "paused"}
    assert len(without) < len(RUN_BATCH)
    assert reasons(without) != known("run-batch", "reason", of="of a skip")
    assert codes({name: entry for name, entry in RUN_BATCH.items() if entry[1].code != ExitCode.BUG}) != set(ExitCode)
