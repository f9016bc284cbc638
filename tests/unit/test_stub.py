"""The stub that stands for a body in its members' messages."""

from __future__ import annotations

import json
from typing import Any

import pytest
from celery import Celery, chain, chord, group
from celery.canvas import maybe_signature

from celery_pgbarrier import stub

app = Celery("stubs", set_as_current=False)
LARGE = "x" * 100_000


@app.task(name="stubs.body")
def body(*args: Any) -> None:
    """Never run."""


def signature(**options: Any) -> Any:
    return body.s(LARGE, keyword=LARGE).set(**options)


def bodies() -> list[Any]:
    outer = signature(task_id="outer", group_id="outer-group", link_error=[signature()])
    nested = signature(task_id="nested", group_id="g", chord=outer)
    return [
        signature(
            task_id="one", group_id="g", priority=3, headers={"large": LARGE}, link=[body.s()]
        ),
        nested,
        chain(signature(), signature(), app=app).set(task_id="of a chain"),
        group([signature(), signature()], app=app).set(task_id="of a group"),
        chord([signature()], signature(), app=app).set(task_id="of a chord"),
        body.si(LARGE).set(task_id="immutable"),
        body.map([LARGE, LARGE]).set(task_id="of a map"),
    ]


@pytest.mark.parametrize("whole", bodies(), ids=lambda whole: whole.options["task_id"])
def test_a_stub_is_small_and_a_signature_with_the_bodys_ids(whole: Any) -> None:
    made = json.loads(json.dumps(stub.of_body(whole)))
    assert len(json.dumps(made)) < 600
    again = maybe_signature(made, app=app).clone()
    for key in ("task_id", "group_id"):
        assert again.options.get(key) == whole.options.get(key)
    assert (again.task, again.immutable) == (whole.task, whole.immutable)
    assert not again.args
    assert "link" not in again.options


def test_a_body_that_is_a_member_keeps_the_stub_of_the_outer_body() -> None:
    made = stub.of_body(bodies()[1])
    assert made["options"]["chord"]["options"]["task_id"] == "outer"
    assert "link_error" not in made["options"]["chord"]["options"]


def test_steps_of_every_shape_carry_stubs_and_stay_as_they_were() -> None:
    """A chain's later steps are members too; only what they embed is made small."""
    outer = signature(task_id="outer", group_id="g")
    member = body.s(1).set(chord=outer, group_id="g", task_id="member")
    steps = [
        member,
        group([member, chain(body.s(2), member, app=app)], app=app),
        chord([body.s(3).set(chord=outer)], member, app=app),
    ]
    embed = {"chord": None, "chain": json.loads(json.dumps(steps)), "callbacks": None}
    before = json.dumps(embed)
    made = stub.in_embed(embed)
    assert json.dumps(embed) == before
    text = json.dumps(made)
    assert LARGE not in text
    assert text.count('"outer"') == before.count('"outer"')
    assert made["chain"][0]["args"] == [1]
    for step in made["chain"]:
        assert maybe_signature(step, app=app).clone()["task"] == step["task"]
