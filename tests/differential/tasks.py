"""The tasks of random canvases: what they return shows what they were given, and by whom."""

from __future__ import annotations

from collections import Counter, defaultdict
from types import SimpleNamespace
from typing import Any

import celery
from celery import shared_task

#: What tasks, links and errbacks told, by the run of the canvas that they belong to.
told: defaultdict[int, Counter[str]] = defaultdict(Counter)


def tell(label: list[Any], *words: object) -> str:
    """Leave a line; return the label's name."""
    run, name = label
    told[run][" ".join(map(str, [name, *words]))] += 1
    return str(name)


def work(self: celery.Task, *args: Any, label: list[Any], does: str, by: Any = None) -> list[Any]:
    """Do what is asked; the result holds the label and all that was given."""
    retries = self.request.retries
    name = tell(label, "runs, retries:", retries)
    if does == "fail":
        raise ValueError(name)
    if does == "give up":
        raise self.retry(countdown=0, max_retries=1, exc=ValueError(name))
    if does == "retry" and not retries:
        raise self.retry(countdown=0)
    if does == "replaced":
        raise self.replace(self.app.signature(by))
    return [name, *args]


def link(value: Any = None, *, label: list[Any]) -> None:
    """Tell what it gets; a group links it to its first task, without that one's result."""
    tell(label, "gets", value)


def errback1(task_id: str, label: list[Any]) -> None:
    tell(label, "is sent")


def errback3(request: Any, exc: BaseException, traceback: Any, label: list[Any]) -> None:
    tell(label, "is called with", type(exc).__name__)


def _made(prefix: str, **options: Any) -> SimpleNamespace:
    made = {
        function.__name__: shared_task(
            function,
            name=f"{prefix}.{function.__name__}",
            bind=function is work,
            **options,
        )
        for function in (work, link, errback1, errback3)
    }
    return SimpleNamespace(**made)


claimed = _made("differential")
plain = _made("differential.plain", base=celery.Task)
