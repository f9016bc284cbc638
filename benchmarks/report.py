"""The tables of a run, for a terminal and for docs/performance.md."""

from __future__ import annotations

from pathlib import Path

from benchmarks import sizing
from benchmarks.goals import judged
from benchmarks.peers import PEERS
from benchmarks.records import Book, as_markdown, as_text, table

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


def print_question(book: Book, question: str) -> None:
    """Print what a question has found."""
    print(f"\n== {question}: {book.titles[question]} ({book.seconds.get(question, 0):.0f} s)\n")
    rows = table(book, question)
    if len(rows) > 1:
        print(as_text(rows))
    for about, text in book.notes:
        if about == question:
            print(f"  {text}")
    for about, text in book.failures:
        if about == question:
            print(f"  FAILED: {text}")
    print(flush=True)


def print_goals(book: Book) -> None:
    """Print which goals were met."""
    rows = judged(book)
    if len(rows) > 1:
        print(f"\n== goals\n\n{as_text(rows)}\n", flush=True)


def insert(page: Path, book: Book) -> None:
    """Put a run's section between the markers of a page.

    Raises:
        ValueError: the page has no markers.
    """
    text = page.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{page} has no lines {BEGIN} and {END}")
    page.write_text(f"{before}{begin}\n\n{markdown(book)}\n\n{end}{after}")


def markdown(book: Book) -> str:
    """A run as a section of a page."""
    lines = [f"- {name}: {value}" for name, value in book.machine.items()]
    lines.append(f"- run with: {', '.join(f'{k} {v}' for k, v in book.options.items())}")
    used = dict.fromkeys(m.peer for m in book.measures if m.peer in PEERS)
    lines.append("- " + "; ".join(f"{peer}: {PEERS[peer]}" for peer in used))
    lines.append(
        "- a figure is the median over all rounds (or the percentile named), then the lowest and "
        "the highest round, then the ratio to Redis (in SQL, to the limit)"
    )
    lines += ["", "### Goals", "", as_markdown(judged(book))]
    if sizes := sizing.table(book):
        lines += ["", "### What a server must bear", "", as_markdown(sizes)]
    for question, title in book.titles.items():
        lines += ["", f"### {title}", ""]
        rows = table(book, question)
        if len(rows) > 1:
            lines += [as_markdown(rows), ""]
        lines += [f"- {text}" for about, text in book.notes if about == question]
        lines += [f"- failed: {text}" for about, text in book.failures if about == question]
    return "\n".join(lines)
