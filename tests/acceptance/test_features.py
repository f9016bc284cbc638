"""What only real worker processes can show: time limits, lost processes, remote control, ETAs.

All in one prefork worker, whose canvases are in flight at the same time.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from celery import chain, chord, group
from celery.exceptions import ChordError

from tests.acceptance.scene import Scene
from tests.support.brokers import Broker
from tests.support.tasks import add, identity, noted_error, notes, sleepy, stubborn, xsum
from tests.support.waiting import wait_until

pytestmark = pytest.mark.slow

DEADLINE = 60.0


@pytest.fixture
def crew(make_scene: Callable[..., Scene], database_url: str, redis_broker: Broker) -> Scene:
    """A scene with a prefork worker of three processes."""
    scene = make_scene(database_url, redis_broker)
    scene.worker(concurrency=3)
    return scene


def over(scene: Scene) -> None:
    """Wait until nothing is open."""
    wait_until(lambda: not scene.open(), DEADLINE, scene.report)


def failure(result: Any) -> BaseException:
    wait_until(lambda: result.state == "FAILURE", DEADLINE, lambda: f"{result.state} is FAILURE")
    error = result.result
    assert isinstance(error, BaseException)
    return error


def test_time_limits_of_members_and_bodies(crew: Scene, tmp_path: Path) -> None:
    """A soft limit raises in the task, which may go on; a hard one ends its process."""
    gate, errors = str(tmp_path / "never"), tmp_path / "errors"
    hard = sleepy.s(1, gate).set(time_limit=1)
    in_header = chord(
        [hard.set(link_error=[noted_error.s(f"{errors}-hard")]), add.s(1, 1)],
        xsum.s().set(link_error=[noted_error.s(f"{errors}-header")]),
    ).delay()
    in_body = chord(
        [add.s(1, 1)],
        sleepy.s(gate).set(time_limit=1, link_error=[noted_error.s(f"{errors}-body")]),
    ).delay()
    soft = chord([stubborn.s(7).set(soft_time_limit=1), add.s(1, 1)], xsum.s()).delay()

    assert isinstance(failure(in_header), ChordError)
    assert "TimeLimitExceeded" in str(in_header.result)
    assert "TimeLimitExceeded" in repr(failure(in_body))
    assert soft.get(timeout=DEADLINE) == 9
    over(crew)
    wait_until(lambda: notes(f"{errors}-body"), message="the body's errback is called")
    limited = in_header.parent.results[0]
    assert notes(f"{errors}-hard") == [limited.id]
    assert notes(f"{errors}-header") == [in_header.id]
    assert notes(f"{errors}-body") == [in_body.id]
    crashes = crew.query("SELECT sum(crashes) FROM pgbarrier_task")[0][0]
    assert crashes == 0, "a time limit is the task's own failure, no crash"


def test_countdowns_are_waited_for(crew: Scene) -> None:
    header = [add.s(1, 1).set(countdown=1), add.s(2, 2)]
    result = chord(header, xsum.s().set(countdown=1)).delay()
    assert result.get(timeout=DEADLINE) == 6
    waits = crew.query("""
        SELECT extract(epoch FROM min(h.at) FILTER (WHERE h.became = 'running')
                                - min(h.at) FILTER (WHERE h.was IS NULL)) AS seconds
          FROM task_history h GROUP BY h.id ORDER BY seconds
    """)
    undelayed, *delayed = [float(row.seconds) for row in waits]
    assert undelayed < 1.0
    assert all(seconds > 0.9 for seconds in delayed), waits


def test_members_and_bodies_are_revoked_by_remote_control(crew: Scene, tmp_path: Path) -> None:
    """By id, by stamped header, by group, and terminated while they run."""
    gate, started = str(tmp_path / "never"), str(tmp_path / "started")
    errors = tmp_path / "errors"

    def body(name: str) -> Any:
        return xsum.s().set(link_error=[noted_error.s(f"{errors}-{name}")])

    running = chord([sleepy.s(1, gate, started), add.s(1, 1)], body("running")).delay()
    running_body = chord([add.s(1, 1)], sleepy.s(gate, started)).delay()
    stamped = sleepy.s(3, gate, started)
    stamped.stamp(lot="bad")
    by_header = chord([stamped, add.s(1, 1)], body("header")).delay()
    wait_until(lambda: len(notes(started)) == 3, DEADLINE, "three tasks run")
    later = {"countdown": 2}
    by_id = chord([add.s(1, 1).set(**later), add.s(1, 1)], body("id")).delay()
    by_group = chord([add.s(n, n).set(**later) for n in range(3)], body("group")).delay()

    control = crew.app.control
    control.revoke(by_id.parent.results[0].id)
    by_group.parent.revoke()
    control.revoke(running.parent.results[0].id, terminate=True)
    running_body.revoke(terminate=True)
    control.revoke_by_stamped_headers({"lot": ["bad"]}, terminate=True)

    for name, result in {
        "running": running, "header": by_header, "id": by_id, "group": by_group,
    }.items():  # fmt: skip
        assert isinstance(failure(result), ChordError), name
        assert "TaskRevokedError" in str(result.result), name
        wait_until(lambda name=name: notes(f"{errors}-{name}"), 20, f"errback of {name}")
    wait_until(lambda: running_body.state == "REVOKED", DEADLINE, "the body is revoked")
    over(crew)
    for name, result in {"running": running, "header": by_header, "id": by_id}.items():
        assert notes(f"{errors}-{name}") == [result.id]
    assert len(notes(started)) == 3, "nothing ran a second time"
    assert {child.state for child in by_group.parent.results} == {"REVOKED"}


def test_a_group_is_forgotten_while_its_chord_runs(crew: Scene, tmp_path: Path) -> None:
    """The chord keeps the values that it needs."""
    gate = tmp_path / "gate"
    canvas = chain(
        group(add.s(1, 1), sleepy.s(2, str(gate))), identity.s(), group(identity.s(), identity.s())
    )
    result = canvas.delay()
    header = result.parent.parent
    wait_until(lambda: header.results[0].ready(), DEADLINE, "the first member is done")
    header.results[0].forget()
    gate.touch()
    assert result.get(timeout=DEADLINE) == [[2, 2], [2, 2]]
