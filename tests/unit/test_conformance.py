"""The judge of Celery's suite is itself judged: no failure may get lost on its way to the table."""

from __future__ import annotations

import json
from pathlib import Path

from tests.conformance import outcomes, report
from tests.conformance.__main__ import BEGIN, END, _write
from tests.conformance.exceptions import LEFT_OUT
from tests.conformance.outcomes import Job, Outcome, Verdict


def outcome(backend: str, **tests: str) -> Outcome:
    job = Job("5.7.0", "redis", backend, "test_canvas")
    return Outcome(job, {name: Verdict(ended, "why") for name, ended in tests.items()})


def table(*found: Outcome) -> report.Table:
    (only,) = report.tables(found)
    return only


def test_a_test_without_an_end_failed(tmp_path: Path) -> None:
    lines = [
        {"kind": "expected", "test": "ended"},
        {"kind": "expected", "test": "hung"},
        {"kind": "expected", "test": "never begun"},
        {"kind": "started", "test": "ended"},
        {"kind": "finished", "test": "ended", "outcome": "passed", "reason": "", "seconds": 1.0},
        {"kind": "started", "test": "hung"},
    ]
    path = tmp_path / "report"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    found = outcomes.read_report(path)

    assert found["ended"].outcome == "passed"
    assert found["hung"].outcome == "failed"
    assert "hung" in found["hung"].reason
    assert found["never begun"].outcome == "not reached"


def test_a_second_chance_is_told_from_a_pass() -> None:
    first = outcome("pgbarrier", a="failed", b="failed", c="passed", d="not reached")
    assert first.to_rerun() == ["a", "b", "d"]

    first.after_rerun(outcome("pgbarrier", a="passed", b="failed", d="passed"))

    assert first.counts() == {"flaky": 1, "failed": 1, "passed": 2}


def test_what_passes_on_redis_only_is_named() -> None:
    found = table(
        outcome("redis", a="passed", b="passed", c="failed", d="skipped", e="flaky"),
        outcome("pgbarrier", a="failed", b="skipped", c="failed", d="failed", e="passed"),
    )
    assert report.unexplained(found) == ["a", "b"]
    assert "UNEXPLAINED: why" in report.markdown(found)


def test_what_is_left_out_for_a_reason_is_no_unexplained_difference() -> None:
    name = "test_canvas.py::test_chord::test_chord_on_error"
    found = table(outcome("redis", **{name: "passed"}), outcome("pgbarrier", **{name: "left out"}))
    assert report.unexplained(found) == []
    assert LEFT_OUT[0].reason in report.markdown(found)


def test_a_backend_that_was_not_run_is_no_difference() -> None:
    found = table(outcome("redis", a="passed"))
    assert report.unexplained(found) == []
    assert "not run" in report.markdown(found)


def test_outcomes_are_kept(tmp_path: Path) -> None:
    made = outcome("redis", a="passed", b="failed")
    outcomes.keep(made, tmp_path / "new")
    assert outcomes.kept(tmp_path / "new", made.job) == made
    assert outcomes.kept(tmp_path, made.job) is None


def test_tables_are_put_between_the_marks_of_a_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    _write(page, "new")
    assert page.read_text() == f"before\n{BEGIN}\n\nnew\n{END}\nafter\n"
