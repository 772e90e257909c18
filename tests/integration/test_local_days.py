"""The grain 1d: days as people in a time zone count them, whatever daylight saving does to midnight."""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from batchctl.clock import SystemClock
from batchctl.config import Rollup
from batchctl.errors import ConfigurationError
from batchctl.rollup.ddl import migrate
from batchctl.rollup.definition import read_definition
from batchctl.rollup.drop import drop
from batchctl.rollup.queue import rebuild
from batchctl.rollup.refresh import tick
from batchctl.state.database import Database
from batchctl.state.migrate import upgrade

pytestmark = pytest.mark.any_user

CLOCK = SystemClock()
LOG = logging.getLogger("days")
CHANGES = [
    pytest.param("Europe/London", "2025-03-29", id="London-23-hours"),
    pytest.param("Europe/London", "2025-10-25", id="London-25-hours"),
    pytest.param("America/New_York", "2025-11-01", id="New-York-25-hours"),
    pytest.param("America/Havana", "2024-11-02", id="Havana-midnight-twice"),
    pytest.param("America/Havana", "2025-03-08", id="Havana-no-midnight"),
    pytest.param("America/Sao_Paulo", "2018-11-03", id="Sao-Paulo-no-midnight"),
    pytest.param("America/Sao_Paulo", "2018-02-17", id="Sao-Paulo-midnight-twice"),
    pytest.param("Pacific/Apia", "2011-12-29", id="Apia-a-day-left-out"),
    pytest.param("Australia/Lord_Howe", "2025-04-05", id="Lord-Howe-half-an-hour"),
    pytest.param("Asia/Kathmandu", "2025-06-01", id="Kathmandu-quarters"),
    pytest.param("Asia/Seoul", "1988-05-07", id="Seoul-1988"),
]


def define(zone):
    keys = {"source": "fact_events", "time": "occurred_at", "measures": {"events": "count(*)", "latest": "max(value)"}}
    rollup = Rollup(grains=("5m", "15m", "1h", "1d"), schedule={}, offset={}, **keys)
    return read_definition("trend", rollup, Path("batchctl.toml"), zone)


def first_instants(zone, start, days):
    """Return the first minute of each local day, by looking at every minute."""
    found = {}
    for minute in range(days * 1440):
        instant = start + timedelta(minutes=minute)
        found.setdefault(instant.astimezone(ZoneInfo(zone)).date(), instant)
    return found


def aggregate(session, definition):
    return [tick(session, definition, grain.name, CLOCK, LOG) for grain in definition.grains]


@pytest.fixture
def events(database_url):
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {connection.info.dbname} SET search_path = public")
        connection.execute("CREATE TABLE fact_events (occurred_at timestamptz, value bigint)")
        connection.execute("CREATE INDEX ON fact_events (occurred_at)")
    with Database(conninfo_to_dict(database_url), "batchctl", CLOCK).connect() as session:
        upgrade(session)
        yield session


@pytest.mark.parametrize(("zone", "around"), CHANGES)
def test_a_day_is_local_and_whole_across_every_change_of_the_clocks(events, zone, around):
    definition = define(zone)
    migrate(events, [definition], CLOCK)
    start = datetime.fromisoformat(around).replace(tzinfo=UTC) - timedelta(days=2)
    events.connection.execute(
        "INSERT INTO fact_events SELECT %s + i * interval '7 minutes', i FROM generate_series(0, 1234) AS i", [start]
    )
    assert [result.outcome for result in aggregate(events, definition)] == ["success"] * 4
    days = events.connection.execute(
        "SELECT (occurred_at AT TIME ZONE %s)::date AS day, count(*) AS events, max(value) AS latest FROM fact_events "
        "GROUP BY 1 ORDER BY 1",
        [zone],
    ).fetchall()
    begins = first_instants(zone, start - timedelta(days=2), 12)
    kept = events.connection.execute("SELECT bucket, events, latest FROM agg_1d ORDER BY 1").fetchall()
    assert [tuple(row) for row in kept] == [(begins[row.day], row.events, row.latest) for row in days]
    # A change of one event reaches its day and no other; nothing else is left to do.
    events.connection.execute("DELETE FROM fact_events WHERE value = 700")
    assert [result.buckets for result in aggregate(events, definition)] == [1] * 4
    assert events.connection.execute("SELECT sum(events) AS sum FROM agg_1d").fetchone().sum == 1234
    assert [result.outcome for result in aggregate(events, definition)] == ["empty"] * 4


def test_the_day_that_is_not_over_is_open_by_the_local_clock(events):
    zones = ("Pacific/Kiritimati", "Pacific/Niue")
    for zone in zones:
        # 14 hours before UTC, and 11 behind: at any moment their days end at different times.
        definition = define(zone)
        migrate(events, [definition], CLOCK)
        events.connection.execute(
            "INSERT INTO fact_events SELECT now() - i * interval '1 hour' FROM generate_series(1, 60) AS i"
        )
        aggregate(events, definition)
        newest = events.connection.execute("SELECT max(bucket) AS newest FROM agg_1d").fetchone().newest
        today = datetime.now(ZoneInfo(zone)).date()
        assert newest.astimezone(ZoneInfo(zone)).date() == today - timedelta(days=1)
        events.connection.execute("DELETE FROM fact_events")
        drop(events, "trend", CLOCK)


def test_a_rebuild_of_an_instant_is_that_of_its_local_day(events):
    zone = ZoneInfo("America/New_York")
    definition = define(zone.key)
    migrate(events, [definition], CLOCK)
    events.connection.execute(
        "INSERT INTO fact_events "
        "SELECT timestamptz '2025-11-01Z' + i * interval '1 hour' FROM generate_series(0, 95) AS i"
    )
    aggregate(events, definition)
    events.connection.execute("UPDATE agg_1d SET events = 0")
    noon = datetime(2025, 11, 2, 12, tzinfo=zone)
    assert rebuild(events, definition, "1d", noon, noon + timedelta(minutes=1)) == 1
    tick(events, definition, "1d", CLOCK, LOG)
    mended = events.connection.execute("SELECT bucket, events FROM agg_1d WHERE events > 0").fetchall()
    assert [tuple(row) for row in mended] == [(datetime(2025, 11, 2, tzinfo=zone), 25)]


def test_a_zone_that_the_server_does_not_know_is_a_configuration_error(events):
    with pytest.raises(ConfigurationError, match="time zone"):
        migrate(events, [define("Mars/Olympus")], CLOCK)
