"""A pytest plugin for Celery's integration suite: another backend, other skips, a report.

It stands alone, for the environments that the suite runs in.  ``PGBARRIER_CONFORMANCE`` names a
JSON file with its orders:

- ``report``: where to write one JSON line a test, as soon as it is known;
- ``task_cls``: the app's task class, or null;
- ``lift``: whether the suite's skips for backends other than Redis are lifted;
- ``patience``: what the suite's own time limits are multiplied by;
- ``left_out``: regular expressions of test ids, with the reason why they are left out.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import redis

ORDERS = json.loads(Path(os.environ["PGBARRIER_CONFORMANCE"]).read_text())
#: Files with tests that use the suite's worker without asking for it, as one before them has.
WORKER_NEEDED = ("test_canvas.py", "test_tasks.py")
WORKER = "celery_session_worker"
UNKNOWN = {"outcome": "skipped", "reason": "", "seconds": 0.0}

_reports: dict[str, dict[str, Any]] = {}


def _let_redis_clients_wait() -> None:
    """Take the default time limit of newer Redis clients away.

    The tests of Celery 5.5 and 5.6 wait longer than that for a key. Celery's clients set their own.
    """
    make = redis.Redis.__init__

    @wraps(make)
    def patient(self: Any, *arguments: Any, **options: Any) -> None:
        options.setdefault("socket_timeout", None)
        make(self, *arguments, **options)

    redis.Redis.__init__ = patient  # type: ignore[method-assign]


_let_redis_clients_wait()


class LikeRedis(str):
    """A backend URL for which the suite's question "is it Redis?" is answered with yes."""

    def startswith(self, prefix: Any, *span: Any) -> bool:
        """Tell whether the URL starts with the prefix, or the prefix is that of Redis."""
        prefixes = prefix if isinstance(prefix, tuple) else (prefix,)
        return any(each.startswith("redis") for each in prefixes) or super().startswith(
            prefix, *span
        )


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: Any, request: Any) -> Iterator[None]:
    """Change what the suite's own fixtures return."""
    value: Any = yield
    if fixturedef.argname == "celery_config" and ORDERS["lift"]:
        value["result_backend"] = LikeRedis(value["result_backend"])
    if fixturedef.argname == "celery_parameters" and ORDERS["task_cls"]:
        value["task_cls"] = ORDERS["task_cls"]
    return value


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what was ordered, and let the orders' time limit hold for all tests."""
    kept = []
    for item in items:
        # The suite's own limits are for machines that run nothing else.
        for node in item.listchain():
            node.own_markers = [mark for mark in node.own_markers if mark.name != "timeout"]
        if item.path.name in WORKER_NEEDED and WORKER not in item.fixturenames:
            item.fixturenames.append(WORKER)
        reason = _left_out(item.nodeid)
        if reason is None:
            kept.append(item)
        else:
            _write("finished", item.nodeid, outcome="left out", reason=reason, seconds=0.0)
    items[:] = kept
    for module in {item.module for item in items}:  # type: ignore[attr-defined]
        if hasattr(module, "TIMEOUT"):
            module.TIMEOUT *= ORDERS.get("patience", 1)
    if ORDERS["lift"]:
        _lift_key_value_skips(items)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Write which tests are going to be run: one that hangs has no outcome."""
    for item in session.items:
        _write("expected", item.nodeid)


def _left_out(nodeid: str) -> str | None:
    reasons = (reason for regex, reason in ORDERS["left_out"] if re.search(regex, nodeid))
    return next(reasons, None)


def _lift_key_value_skips(items: list[pytest.Item]) -> None:
    """Let "is it a key/value backend?", asked where results are joined, hold for ours too."""
    from celery_pgbarrier import BarrierBackend

    for module in {item.module for item in items}:  # type: ignore[attr-defined]
        stores = getattr(module, "BaseKeyValueStoreBackend", None)
        if isinstance(stores, type):
            module.BaseKeyValueStoreBackend = (stores, BarrierBackend)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Report a file that cannot be collected, or skips itself."""
    if report.skipped:
        reason = report.longrepr[2]  # type: ignore[index]
        _write("finished", report.nodeid, outcome="skipped", reason=reason, seconds=0.0)
    elif report.failed:
        reason = _last_line(report.longreprtext)
        _write("finished", report.nodeid, outcome="failed", reason=reason, seconds=0.0)


def pytest_runtest_logstart(nodeid: str) -> None:
    """Write which test is being run."""
    _write("started", nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Gather the phases of a test, and its subtests, into one outcome: the worst."""
    entry = _reports.setdefault(report.nodeid, dict(UNKNOWN))
    if not hasattr(report, "context"):  # a subtest, whose time is part of its test's
        entry["seconds"] += report.duration
    if entry["outcome"] == "failed":
        return
    if report.failed:
        entry.update(outcome="failed", reason=_last_line(report.longreprtext))
    elif report.skipped and hasattr(report, "wasxfail"):
        entry.update(outcome="xfailed", reason=report.wasxfail)
    elif report.skipped:
        entry.update(outcome="skipped", reason=str(report.longrepr[2]))  # type: ignore[index]
    elif report.when == "call" and entry["outcome"] == "skipped":
        unexpected = getattr(report, "wasxfail", None)
        entry.update(outcome="passed" if unexpected is None else "xpassed", reason=unexpected or "")


def pytest_runtest_logfinish(nodeid: str) -> None:
    """Write a test's outcome."""
    _write("finished", nodeid, **_reports.pop(nodeid, UNKNOWN))


def _last_line(text: str) -> str:
    """Return the line that says what went wrong: the last that pytest marks as an error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line[1:].strip() for line in lines if line.startswith("E ")]
    return (errors or lines or ["?"])[0][:300]


def _write(kind: str, nodeid: str, **what: Any) -> None:
    name = nodeid.removeprefix("t/integration/")
    with Path(ORDERS["report"]).open("a") as report:
        report.write(json.dumps({"kind": kind, "test": name, **what}) + "\n")
