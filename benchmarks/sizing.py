"""What a server must bear at a rate of members, by what a run has counted."""

from __future__ import annotations

from benchmarks.records import Book

#: Members per second that the table shows.
RATES = (10, 100, 1000, 5000)
DAY = 86400


def per_member(book: Book) -> dict[str, float]:
    """The counts of a member of a chord by their last word; empty where they were not taken."""
    found: dict[str, float] = {}
    for measure in book.measures:
        if measure.peer != "pgbarrier":
            continue
        name = measure.label.rpartition(": ")[2]
        if measure.question == "counts" or (
            measure.question == "bloat" and "members" in measure.label
        ):
            found[name] = measure.value
    return found


def table(book: Book) -> list[list[str]]:
    """Transactions, WAL and kept bytes at some rates, the head first; empty without counts."""
    one = per_member(book)
    if "transactions" not in one or "WAL" not in one:
        return []
    kept = one.get("tables", 0.0) + one.get("indexes", 0.0)
    rows = [["members/s", "transactions/s", "rows written/s", "WAL MB/s", "WAL GB/day",
             "GB kept a day of result_expires"]]  # fmt: skip
    for rate in RATES:
        written = one["inserted"] + one["updated"] + one["deleted"]
        rows.append([
            f"{rate:,}", f"{rate * one['transactions']:,.0f}", f"{rate * written:,.0f}",
            f"{rate * one['WAL'] / 1e6:,.2f}", f"{rate * one['WAL'] * DAY / 1e9:,.0f}",
            f"{rate * kept * DAY / 1e9:,.1f}" if kept else "-",
        ])  # fmt: skip
    return rows
