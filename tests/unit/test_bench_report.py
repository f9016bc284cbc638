"""What the benchmarks make of their samples: percentiles, ratios, goals, the page."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import goals, report, sizing
from benchmarks.plan import PRESETS
from benchmarks.questions import QUESTIONS
from benchmarks.records import Book, quantile, table


@pytest.fixture
def book() -> Book:
    """A run of two rounds: ours takes half of Redis's time, and twice its memory."""
    found = Book(question="dispatch", titles={"dispatch": "Dispatch"}, seconds={"dispatch": 1.0})
    for factor in (1, 3):
        found.add("100: the call", "redis", "s", [2.0 * factor, 4.0 * factor])
        found.add("100: the call", "pgbarrier", "s", [1.0 * factor, 2.0 * factor])
    found.add("100: peak memory", "redis", "MB", 100)
    found.add("100: peak memory", "pgbarrier", "MB", 200)
    return found


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [([1.0], 0.95, 1.0), ([3.0, 1.0, 2.0], 0.5, 2.0), (list(range(1, 101)), 0.99, 99)],
)
def test_a_quantile_is_the_smallest_value_that_the_share_does_not_exceed(
    values: list[float], share: float, expected: float
) -> None:
    assert quantile(values, share) == expected


def test_a_table_has_medians_over_all_rounds_their_spread_and_the_ratio_to_redis(
    book: Book,
) -> None:
    head, call, memory = table(book, "dispatch")
    assert head == ["", "redis", "pgbarrier"]
    assert call[1:] == ["5.00 s (3.00 s … 9.00 s)", "2.50 s (1.50 s … 4.50 s) = 0.50 x"]
    assert memory[1:] == ["100 MB", "200 MB = 2.00 x"]


def test_goals_are_judged_by_the_ratio(book: Book) -> None:
    assert [row[2:] for row in goals.judged(book)[1:]] == [
        ["0.50 x redis", "yes"],
        ["2.00 x redis", "**no**"],
    ]


def test_every_goal_names_a_question() -> None:
    assert {goal.question for goal in goals.GOALS} <= set(QUESTIONS)


def test_every_preset_asks_questions_that_there_are() -> None:
    for preset in PRESETS.values():
        assert set(preset().questions) <= set(QUESTIONS)


def test_a_run_survives_its_file(book: Book) -> None:
    book.failures.append(("dispatch", "django: it is away"))
    assert report.markdown(Book.decode(book.encode())) == report.markdown(book)
    assert "- failed: django: it is away" in report.markdown(book)


def test_what_a_server_must_bear_is_the_counts_times_the_rate() -> None:
    book = Book(question="counts")
    for label, value in {
        "transactions": 2,
        "inserted": 1,
        "updated": 3,
        "deleted": 0,
        "WAL": 4000,
    }.items():
        book.add(f"1,000: {label}", "pgbarrier", "", value)
    row = next(row for row in sizing.table(book) if row[0] == "1,000")
    assert row == ["1,000", "2,000", "4,000", "4.00", "346", "-"]


def test_the_figures_of_a_page_are_replaced_and_the_rest_is_kept(
    book: Book, tmp_path: Path
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.insert(page, book)
    report.insert(page, book)
    text = page.read_text()
    assert text.startswith(f"before\n{report.BEGIN}\n\n")
    assert text.endswith(f"\n\n{report.END}\nafter\n")
    assert "old" not in text
    assert text.count("### Dispatch") == 1


def test_a_page_without_markers_is_left_alone(book: Book, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing here")
    with pytest.raises(ValueError, match="has no lines"):
        report.insert(page, book)
    assert page.read_text() == "nothing here"
