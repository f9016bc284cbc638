"""Waiting for a state, never for a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(
    predicate: Callable[[], T],
    deadline: float = 30.0,
    message: str | Callable[[], str] = "the awaited state",
    interval: float = 0.05,
) -> T:
    """Call ``predicate`` until it returns something true, and return that.

    Raises:
        AssertionError: it did not within ``deadline`` seconds; ``message`` says what was awaited,
            a callable one is asked at the end, so that it can describe the state then.
    """
    pause = threading.Event()
    end = time.monotonic() + deadline
    while True:
        if value := predicate():
            return value
        if time.monotonic() > end:
            text = message() if callable(message) else message
            raise AssertionError(f"not reached in {deadline:g} s: {text}")
        pause.wait(interval)
