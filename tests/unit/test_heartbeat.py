"""What goes on beside a run goes on, whatever fails in it: a lease that nobody watches would be outlived."""

from __future__ import annotations

import logging
import threading
from datetime import timedelta

import pytest

from batchctl.batch import heartbeat
from batchctl.batch.heartbeat import Heartbeat
from batchctl.batch.interruption import Interruption, Stop
from batchctl.clock import SystemClock


class Failing:
    """A recorder whose disk is full."""

    def heartbeat(self, _lease):
        raise OSError(28, "No space left on device")


@pytest.fixture(autouse=True)
def _quickly(monkeypatch):
    monkeypatch.setattr(heartbeat, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.01)


def beating(interruption, lease, look):
    clock = SystemClock()
    return Heartbeat(
        Failing(),
        interruption,
        lease=lease,
        since=clock.monotonic() - 60,
        grace=timedelta(0),
        clock=clock,
        log=logging.getLogger("test"),
        looks=(look,),
    )


def fail():
    raise OSError(5, "Input/output error")


def test_a_lease_that_is_over_ends_the_run_although_all_else_fails():
    interruption, told = Interruption(), threading.Event()
    interruption.told = lambda *_: told.set()
    with beating(interruption, timedelta(seconds=31), fail):
        assert told.wait(30)
    assert 'on_lost_database = "stop"' in interruption.reason


def test_without_a_lease_the_run_goes_on():
    interruption, seen, often = Interruption(), [], threading.Event()

    def look():
        seen.append(1)
        if len(seen) > 5:
            often.set()
        fail()

    with beating(interruption, None, look):
        assert often.wait(30)
    assert interruption.count == 0


@pytest.mark.parametrize(
    ("wishes", "count", "after_step"),
    [
        ([Stop.AFTER_STEP], 0, True),
        ([Stop.AFTER_STEP, Stop.STOP], 1, True),
        ([Stop.STOP, Stop.STOP, Stop.AFTER_STEP], 1, False),
        ([Stop.STOP, Stop.NOW], 3, False),
        ([Stop.NOW, Stop.NOW, Stop.STOP], 2, False),
    ],
)
def test_a_wish_that_asks_for_no_more_changes_nothing(wishes, count, after_step):
    interruption = Interruption()
    for wish in wishes:
        interruption.ask(wish)
    assert (interruption.count, interruption.after_step) == (count, after_step)
