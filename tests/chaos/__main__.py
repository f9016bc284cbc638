"""``python -m tests.chaos``: the campaign, or the part of it that is asked for."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.chaos import report
from tests.chaos.checker import Result
from tests.chaos.kinds import KINDS
from tests.chaos.pool import runs
from tests.chaos.scenarios import SCENARIOS, Scenario


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", default="1", help="chooses what is done when (default: 1)")
    parser.add_argument(
        "--scenario", action="append", help="a scenario's name or a part of it; may be repeated"
    )
    parser.add_argument("--backend", choices=[*KINDS, "all"], default="ours")
    parser.add_argument("--chords", type=int, default=30, help="chords a scenario (default: 30)")
    parser.add_argument("--jobs", type=int, default=2, help="scenarios at a time (default: 2)")
    parser.add_argument("--report", type=Path, help="a folder for the report and all logs")
    parser.add_argument("--list", action="store_true", help="tell the scenarios and end")
    return parser.parse_args(argv)


def chosen(names: Sequence[str] | None) -> list[Scenario]:
    """The scenarios that were asked for, by a name or a part of names."""
    wanted = [name for name in names or [] if name]
    found = [s for s in SCENARIOS.values() if not wanted or any(_meant(s, n) for n in wanted)]
    if not found:
        sys.exit(f"no such scenario: {', '.join(wanted)}; --list tells them")
    return found


def _meant(scenario: Scenario, name: str) -> bool:
    return scenario.name == name if name in SCENARIOS else name in scenario.name


def campaign(options: argparse.Namespace, folder: Path) -> list[Result]:
    """Run what was asked for, several at a time; every result is saved as it comes."""
    results: list[Result] = []
    for name in KINDS if options.backend == "all" else [options.backend]:
        scenarios = [s for s in chosen(options.scenario) if KINDS[name].ours or not s.ours]
        for result in runs(
            name, scenarios, options.seed, options.chords, options.jobs, folder / name
        ):
            results.append(result)
            report.save(sorted(results, key=_place), folder)
            print(report.line(result), flush=True)
            if name == "ours" and not result.clean:
                print("\n".join(f"       {detail}" for detail in result.details), flush=True)
    return sorted(results, key=_place)


def _place(result: Result) -> tuple[int, int]:
    return list(KINDS).index(result.backend), list(SCENARIOS).index(result.scenario)


def main() -> int:
    """The exit status tells whether our backend kept every promise."""
    options = arguments()
    if options.list:
        print("\n".join(f"{s.name:45} {s.does}" for s in SCENARIOS.values()))
        return 0
    folder = options.report or Path(tempfile.mkdtemp(prefix="pgbarrier-chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    results = campaign(options, folder)
    print(f"\n{report.table(results)}\nseed {options.seed}; logs and report.json in {folder}")
    return int(any(not r.clean for r in results if r.backend == "ours"))


if __name__ == "__main__":
    sys.exit(main())
