"""The table of a campaign, as Markdown; of several by ``python -m tests.chaos.report FILE...``."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from tests.chaos.checker import Result
from tests.chaos.kinds import BOUND, KINDS
from tests.chaos.scenarios import SCENARIOS

COLUMNS = (
    "scenario", "chords", "hits", "lost", "doubled", "wrong", "effects twice",
    "run again after success", "left behind", "put back p50", "max", "goes on p50", "max",
)  # fmt: skip


def line(result: Result) -> str:
    """One result, for the one who waits."""
    verdict = "ok  " if result.clean else "FAIL" if result.backend == "ours" else "    "
    return f"{verdict} {result.seconds:5.1f} s  {' | '.join(_cells(result))}"


def table(results: Sequence[Result]) -> str:
    """The Markdown tables of all backends, one after the other."""
    parts = [_section(name, [r for r in results if r.backend == name]) for name in KINDS]
    return "\n".join(filter(None, parts))


def _section(name: str, results: Sequence[Result]) -> str:
    if not results:
        return ""
    lines = [f"### {KINDS[name].title}", "", _row(COLUMNS)]
    lines.append(_row("---" if n == 0 else "---:" for n in range(len(COLUMNS))))
    lines += [_row(_cells(result)) for result in results]
    lines.append(_row(f"**{cell}**" for cell in _cells(total(results))))
    seconds = sum(result.seconds for result in results)
    lines += ["", *_within(results), f"{seconds / 60:.0f} minutes in all.", ""]
    return "\n".join(lines)


def _within(results: Sequence[Result]) -> list[str]:
    """How often the bound was kept, mixtures apart: there may be no worker left to take over."""
    single = [result for result in results if not SCENARIOS[result.scenario].mixed]
    delays = [seconds for result in single for seconds in result.put_back]
    if not delays:
        return []
    within = sum(seconds <= BOUND for seconds in delays)
    return [
        f"Mixtures apart, {within} of {len(delays)} claims of processes that were hit were put "
        f"back within {BOUND:g} s (lease + 2 heartbeats + reap interval), p50 "
        f"{statistics.median(delays):.1f} s, max {max(delays):.1f} s.",
    ]


def total(results: Sequence[Result]) -> Result:
    """The sum of results."""
    whole = Result("all", results[0].backend, "")
    for result in results:
        for key, value in asdict(result).items():
            if isinstance(value, (int, float, list)):
                setattr(whole, key, getattr(whole, key) + value)
    return whole


def _cells(result: Result) -> list[str]:
    counts = (
        result.chords, result.hits, result.lost, result.doubled, result.wrong, result.effects,
        result.reruns, result.rows,
    )  # fmt: skip
    return [result.scenario, *map(str, counts), *_times(result.put_back), *_times(result.recovery)]


def _times(seconds: Sequence[float]) -> list[str]:
    """Median and maximum."""
    if not seconds:
        return ["-", "-"]
    return [f"{value:.1f} s" for value in (statistics.median(seconds), max(seconds))]


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def save(results: Sequence[Result], folder: Path) -> None:
    """Write ``report.md``, and ``report.json`` with every detail."""
    (folder / "report.md").write_text(table(results))
    (folder / "report.json").write_text(json.dumps([asdict(r) for r in results], indent=1))


def load(paths: Iterable[str]) -> list[Result]:
    """The results of saved reports, those of one scenario added up."""
    together: dict[tuple[str, str], list[Result]] = {}
    for path in paths:
        for values in json.loads(Path(path).read_text()):
            result = Result(**values)
            together.setdefault((result.backend, result.scenario), []).append(result)
    return [replace(total(some), scenario=name) for (_, name), some in together.items()]


if __name__ == "__main__":
    order = list(SCENARIOS)
    print(table(sorted(load(sys.argv[1:]), key=lambda result: order.index(result.scenario))))
