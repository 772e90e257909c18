"""A database that goes away in the middle of a run: the run goes on, and what happened is recorded once."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from support import Command, batch, wait_for

from batchctl.clock import SystemClock
from batchctl.state.embedded import EmbeddedServer


@pytest.mark.any_user
def test_a_run_outlives_its_database_and_is_recorded_once(own_server, tmp_path):
    batchctl = Command(tmp_path / "home", make_conninfo(**own_server.connection_parameters()))
    batchctl.directory.mkdir()
    steps = [("31", "touch first; while ! test -e down; do sleep 0.05; done"), ("32", "exit 3"), ("33", "true")]
    batchctl.configure(batch(steps))
    process = batchctl.start("run-batch", "--json")
    wait_for((batchctl.directory / "first").exists)
    wait_for(lambda: recorded(batchctl), what="the record of the first step")
    own_server.stop()
    (batchctl.directory / "down").touch()
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 3, stderr
    assert '"outcome": "partial"' in stdout
    # The completion waits in the journal and counts, also while nobody else knows of it.
    refused = batchctl.json("run-batch", code=75)
    assert refused["reason"] == "gap"
    assert refused["next_eligible_at"] is not None
    # Without the gap it is the database that is missing: nothing can be started without it.
    batchctl("run-batch", "--force-gap", code=69)

    own_server.start()
    assert batchctl.json("run-batch", code=75)["reason"] == "gap"
    for _ in range(2):
        entries = batchctl.json("history")["entries"]
        assert [(entry["kind"], entry["outcome"]) for entry in entries] == [
            ("skip", "skipped"),
            ("skip", "skipped"),
            ("run", "partial"),
        ]
    with psycopg.connect(batchctl.url) as connection:
        rows = connection.execute("SELECT step, outcome, exit_code FROM batchctl.step_run ORDER BY step").fetchall()
    assert rows == [("31", "success", 0), ("32", "failed", 3), ("33", "success", 0)]
    journal = next((batchctl.directory / "state" / "journal").iterdir())
    assert journal.read_text() == ""


@pytest.mark.any_user
def test_a_database_that_hangs_holds_up_neither_a_step_nor_a_skip(own_server, tmp_path):
    batchctl = Command(tmp_path / "home", make_conninfo(**own_server.connection_parameters()))
    batchctl.directory.mkdir()
    line = "touch first; while ! test -e frozen; do sleep 0.05; done; exec sleep 60"
    batchctl.configure(batch([("31", line, 'timeout = "6s"')], 'grace = "1s"'))
    process = batchctl.start("run-batch", "--json")
    wait_for((batchctl.directory / "first").exists)
    wait_for(lambda: recorded(batchctl), what="the record of the first step")
    # The postmaster and all it has started, as on a machine whose disk hangs.
    data = own_server._data.stat()
    frozen = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            cwd = (entry / "cwd").stat()
            if entry.name.isdigit() and (cwd.st_dev, cwd.st_ino) == (data.st_dev, data.st_ino):
                frozen.append(int(entry.name))
    try:
        for pid in frozen:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        (batchctl.directory / "frozen").touch()
        assert batchctl.json("run-batch", code=75)["reason"] == "running"
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == 1, stderr
        assert '"outcome": "timeout"' in stdout
    finally:
        for pid in frozen:
            # The first to go on, the postmaster, may have reaped one that had ended meanwhile.
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    entries = batchctl.json("history")["entries"]
    assert sorted((entry["outcome"], entry["reason"]) for entry in entries) == [
        ("failed", None),
        ("skipped", "running"),
    ]


def recorded(batchctl):
    with psycopg.connect(batchctl.url) as connection:
        return connection.execute("SELECT count(*) FROM batchctl.step_run").fetchone() == (1,)


@pytest.mark.any_user
def test_a_restart_of_the_database_is_not_noticed(own_server, tmp_path):
    batchctl = Command(tmp_path / "home", make_conninfo(**own_server.connection_parameters()))
    batchctl.directory.mkdir()
    steps = [("31", "touch first; while ! test -e again; do sleep 0.05; done"), ("32", "true")]
    batchctl.configure(batch(steps))
    process = batchctl.start("run-batch")
    wait_for((batchctl.directory / "first").exists)
    own_server.stop()
    own_server.start()
    (batchctl.directory / "again").touch()
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert batchctl.json("history")["entries"][0]["outcome"] == "success"


def test_the_embedded_server_is_started_again_when_it_was_killed(embedded_batchctl):
    embedded_batchctl.configure(batch([("31", "true")], 'min_gap = "0s"'))
    embedded_batchctl("run-batch")
    EmbeddedServer(embedded_batchctl.directory / "state" / "postgresql", SystemClock()).stop()
    embedded_batchctl("run-batch")
    assert [entry["outcome"] for entry in embedded_batchctl.json("history")["entries"]] == ["success", "success"]


@pytest.mark.any_user
@pytest.mark.each_server
def test_a_schema_that_does_not_fit_is_refused(batchctl):
    batchctl.configure(batch([("31", "true")]))
    batchctl("run-batch")
    with psycopg.connect(batchctl.url) as connection:
        connection.execute("INSERT INTO batchctl.migration (version, name) VALUES (999, 'from the future')")
    for command in (["run-batch"], ["status"], ["migrate"]):
        done = batchctl(*command, code=78)
        assert "has version 999" in done.stderr
        assert "migrate" in done.stderr
    with psycopg.connect(batchctl.url) as connection:
        connection.execute("DELETE FROM batchctl.migration WHERE name LIKE 'from%'")
        connection.execute("DELETE FROM batchctl.migration WHERE version > 1")
    done = batchctl("status", code=78)
    assert "run `batchctl migrate`" in done.stderr


@pytest.mark.any_user
@pytest.mark.each_server
def test_a_role_without_rights_is_told_so(batchctl):
    with psycopg.connect(batchctl.url, autocommit=True) as connection:
        connection.execute(
            "REVOKE ALL ON DATABASE current_database FROM PUBLIC".replace("current_database", connection.info.dbname)
        )
        connection.execute("CREATE SCHEMA prepared")
        connection.execute("DROP ROLE IF EXISTS restricted")
        connection.execute("CREATE ROLE restricted")
        connection.execute("GRANT ALL ON SCHEMA prepared TO restricted")
    try:
        batchctl.url += " options='-c role=restricted'"
        batchctl.configure(batch([("31", "true")]))
        done = batchctl("run-batch", code=78)
        assert "permission denied" in done.stderr
        # A schema that was made for the role is enough.
        batchctl.configure('schema = "prepared"\n' + batch([("31", "true")]))
        batchctl("run-batch")
    finally:
        with psycopg.connect(batchctl.url.partition(" options")[0], autocommit=True) as connection:
            connection.execute("DROP OWNED BY restricted CASCADE")
            connection.execute("DROP ROLE restricted")
