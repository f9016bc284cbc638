"""What the demo shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from examples.demo.counting import COUNTED, Figures
from examples.demo.proof import Check

LARGEST = 10


def progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("members done"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("[red]{task.fields[kills]} killed[/]"),
        TextColumn("[red]{task.fields[wipes]} wiped[/]"),
        TimeElapsedColumn(),
        console=console,
        expand=True,
    )


def report_table(report: Figures) -> Table:
    columns = ("files", *COUNTED)
    table = Table(title="The standard library", caption=f"its {LARGEST} largest packages")
    table.add_column("package")
    for column in columns:
        table.add_column(column, justify="right")
    packages = sorted(report["packages"].items(), key=lambda item: -item[1]["lines"])
    for name, figures in packages[:LARGEST]:
        table.add_row(name, *(f"{figures[column]:,}" for column in columns))
    table.add_section()
    table.add_row("all", *(f"{report[column]:,}" for column in columns), style="bold")
    return table


def proof_table(checks: Sequence[Check]) -> Table:
    table = Table(title="Claims")
    for column in ("", "claim", "expected", "found"):
        table.add_column(column)
    for check in checks:
        mark = "[green]✓[/]" if check.holds else "[bold red]✗[/]"
        table.add_row(mark, check.claim, _short(check.expected), _short(check.found))
    return table


def summary(members: dict[str, int], seconds: float) -> str:
    return (
        f"{members['attempts']:,} runs for {members['ids']:,} members, of which "
        f"{members['crashes']:,} ended with their process; {seconds:.0f} s from start to report."
    )


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return f"figures of {len(value)}"
    return f"{value:,}" if isinstance(value, int) else str(value)
