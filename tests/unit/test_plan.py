"""Batch and options become accounts and steps in order."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchctl.batch.plan import fill, make_plan
from batchctl.config_file import decode
from batchctl.errors import UsageError

STEPS = [
    {"id": "31", "group": "search", "command": ["x"], "quantity": 300},
    {"id": "32", "group": "search", "command": ["x"]},
    {"id": "61", "group": "upload", "command": ["x"]},
    {"id": "62", "command": ["x"]},
]


def daily(**more):
    data = {"database": {"embedded": True}, "state_dir": "s", "batch": {"daily": {"step": STEPS, **more}}}
    return decode(data, Path("/x/batchctl.toml"), {}).batches["daily"]


def test_accounts_each_do_all_steps_in_the_order_of_the_file():
    plan = make_plan("daily", daily(accounts=["a", "b"]), steps=())
    assert [(step.account, step.step) for step in plan.steps] == [
        (account, step) for account in "ab" for step in ("31", "32", "61", "62")
    ]
    assert [len(stage) for stage in plan.accounts[0].stages] == [1, 1, 1, 1]
    assert (plan.job, plan.groups) == ("daily", ("search", "upload"))
    assert (plan.chosen_accounts, plan.chosen_steps) == (None, None)
    assert plan.jobs == ("daily", "daily/search", "daily/upload")
    assert [step.quantity for step in plan.accounts[0].stages[0]] == [300]


def test_a_parallel_group_is_one_stage():
    plan = make_plan("daily", daily(group={"search": {"parallel": True}}), steps=())
    assert [[step.step for step in stage] for stage in plan.accounts[0].stages] == [["31", "32"], ["61"], ["62"]]


def test_a_group_is_a_job_of_its_own():
    plan = make_plan("daily", daily(), group="upload", steps=())
    assert (plan.job, plan.groups, plan.chosen_steps) == ("daily/upload", ("upload",), None)


def test_steps_and_accounts_narrow_a_run():
    plan = make_plan("daily", daily(accounts=["a", "b"]), accounts=("b",), steps=("61", "31"))
    assert [(step.account, step.step) for step in plan.steps] == [("b", "31"), ("b", "61")]
    assert (plan.chosen_accounts, plan.chosen_steps) == (("b",), ("31", "61"))


@pytest.mark.parametrize(
    "options",
    [{"accounts": ("x",)}, {"group": "x"}, {"steps": ("99",)}, {"group": "upload", "steps": ("31",)}],
)
def test_what_the_batch_does_not_have_is_wrong_usage(options):
    with pytest.raises(UsageError):
        make_plan("daily", daily(), **options)


def test_exactly_the_known_tokens_are_replaced():
    step = make_plan("daily", daily(accounts=["a{step}"]), steps=("31",)).steps[0]
    text = "{batch} {account} {step} {group} {quantity} {run_id} {other} {{step}} {} ${step}"
    assert fill(text, batch="daily", run_id="r", step=step) == "daily a{step} 31 search 300 r {other} {31} {} $31"
