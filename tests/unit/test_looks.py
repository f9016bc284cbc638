"""Looks at results: when, and together with whom."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from celery_pgbarrier.errors import DatabaseUnavailable
from celery_pgbarrier.store.looks import FIRST_PAUSE, Looks, moment, pause
from tests.support.waiting import wait_until


def soon() -> int:
    """A moment in a tenth of a second."""
    return moment(time.monotonic(), 0.1)


def test_pauses_grow_with_the_wait_up_to_the_interval() -> None:
    pauses = [pause(age, 0.0, 0.5) for age in (0, 0.008, 0.04, 0.2, 2, 4, 100)]
    assert pauses == [FIRST_PAUSE, FIRST_PAUSE, 0.005, 0.025, 0.25, 0.5, 0.5]


def test_slow_looks_are_rare() -> None:
    assert pause(0.0, took=0.05, interval=0.5) == pytest.approx(0.2)
    assert pause(0.0, took=5.0, interval=0.5) == 0.5


@pytest.mark.parametrize("wait", [0.002, 0.003, 0.004, 0.0061, 0.1, 0.49, 0.5])
def test_moments_come_within_the_wait_and_after_half_of_the_grid(wait: float) -> None:
    for step in range(500):
        now = 1000 + step * 0.00137
        after = moment(now, wait) * FIRST_PAUSE - now
        assert -1e-6 < after <= wait + 1e-6


def test_moments_of_a_wide_grid_are_moments_of_all_narrower_ones() -> None:
    assert moment(7.0, 0.5) % 128 == 0
    assert moment(7.0, 0.13) % 64 == 0


def looker(
    looks: Looks, fetch: Any, task_id: str, at: int, found: dict[str, Any]
) -> threading.Thread:
    def look() -> None:
        try:
            found[task_id] = [row.id for row in looks.look(fetch, [task_id], at)]
        except (DatabaseUnavailable, KeyboardInterrupt) as error:
            found[task_id] = error

    thread = threading.Thread(target=look)
    thread.start()
    return thread


def test_threads_that_look_at_one_moment_ask_once() -> None:
    asked: list[Sequence[str]] = []

    def fetch(ids: Sequence[str]) -> list[Any]:
        asked.append(sorted(ids))
        return [SimpleNamespace(id=task_id) for task_id in ids if task_id != "none"]

    looks, at, found = Looks(), soon(), dict[str, Any]()
    for thread in [looker(looks, fetch, name, at, found) for name in ("a", "b", "none")]:
        thread.join(10)
    assert asked == [["a", "b", "none"]]
    assert found == {"a": ["a"], "b": ["b"], "none": []}


@pytest.mark.parametrize(
    ("raised", "others"),
    [(DatabaseUnavailable("away"), DatabaseUnavailable), (KeyboardInterrupt(), list)],
)
def test_what_ends_a_look_reaches_the_others_only_where_it_concerns_them(
    raised: BaseException, others: type
) -> None:
    def fetch(ids: Sequence[str]) -> list[Any]:
        raise raised

    looks, at, found = Looks(), soon(), dict[str, Any]()
    leader = looker(looks, fetch, "first", at, found)
    wait_until(lambda: at in looks._rounds, 5, "the first one looks")
    second = looker(looks, fetch, "second", at, found)
    for thread in (leader, second):
        thread.join(10)
    assert found["first"] is raised
    assert isinstance(found["second"], others)
