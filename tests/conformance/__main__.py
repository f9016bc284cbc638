"""``python -m tests.conformance``: run a selection of Celery's suite and print what differs."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from tests.conformance import outcomes, report, suites
from tests.conformance.outcomes import Job, Outcome
from tests.conformance.runs import BACKENDS, BROKERS, Runner
from tests.conformance.suites import CACHE, FILES, VERSIONS, Suite
from tests.support.services import find_services

KEPT = CACHE / "outcomes"
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"


def main(arguments: list[str] | None = None) -> int:
    """Run what is selected; 1 where a test passes on Redis and, unexplained, not on ours."""
    options = _parse(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # servers and databases are removed
    jobs = report.jobs_of(options.versions, options.brokers, options.backends, options.files)
    found = _found(jobs, options)
    found_tables = report.tables(found)
    print(report.section(found_tables))
    if options.write:
        _write(options.write, report.section(found_tables))
    unexplained = [
        f"Celery {table.version}, {table.broker} broker: {name}"
        for table in found_tables
        for name in report.unexplained(table)
    ]
    print(f"{len(unexplained)} unexplained differences", *unexplained, sep="\n  ")
    return 1 if unexplained or not found else 0


def _found(jobs: list[Job], options: argparse.Namespace) -> list[Outcome]:
    if options.kept:
        return _from_kept(jobs)
    if options.again:
        _run(_failed(jobs), options)
        return _from_kept(jobs)
    return _run(jobs, options)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    for name, default in (
        ("versions", VERSIONS),
        ("brokers", BROKERS),
        ("backends", BACKENDS),
        ("files", FILES),
    ):
        help_text = f"default: {' '.join(default)}"
        parser.add_argument(f"--{name}", type=str.split, default=list(default), help=help_text)
    parser.add_argument("--jobs", type=int, default=2, help="files to run at once (2)")
    parser.add_argument("--only", default="", help="a pytest -k expression; nothing is kept then")
    parser.add_argument(
        "--patience", type=int, default=1, help="multiplies the suite's own time limits (1)"
    )
    parser.add_argument("--again", action="store_true", help="run only what failed in kept runs")
    parser.add_argument("--kept", action="store_true", help="run nothing, print what was kept")
    parser.add_argument("--write", type=Path, help="a Markdown file to put the tables into")
    return parser.parse_args(arguments)


def _from_kept(jobs: list[Job]) -> list[Outcome]:
    return [outcome for job in jobs if (outcome := outcomes.kept(KEPT, job)) is not None]


def _failed(jobs: list[Job]) -> list[Job]:
    return [outcome.job for outcome in _from_kept(jobs) if outcome.to_rerun()]


def _run(jobs: list[Job], options: argparse.Namespace) -> list[Outcome]:
    prepared = {version: suites.prepare(version) for version in {job.version for job in jobs}}
    jobs = [job for job in jobs if prepared[job.version].has(job.file)]
    with ExitStack() as stack:
        services = find_services(stack)
        if services.rabbitmq is None:
            print("RabbitMQ was not reached: its runs are left out", file=sys.stderr)
            jobs = [job for job in jobs if job.broker != "rabbitmq"]
        packages = {
            version: _package(suite, Path(stack.enter_context(tempfile.TemporaryDirectory())))
            for version, suite in prepared.items()
        }
        runner = Runner(services, packages, options.only, options.patience)
        pool = stack.enter_context(ThreadPoolExecutor(options.jobs))
        runs = [pool.submit(_one, runner, prepared[job.version], job, options) for job in jobs]
        try:
            return [run.result() for run in runs]
        except BaseException:
            runner.stop()
            pool.shutdown(cancel_futures=True)
            raise


def _package(suite: Suite, target: Path) -> Path:
    suites.install_package(suite.python, target)
    return target


def _one(runner: Runner, suite: Suite, job: Job, options: argparse.Namespace) -> Outcome:
    kept = outcomes.kept(KEPT, job) if options.again else None
    outcome = runner.run(suite, job) if kept is None else runner.again(suite, kept)
    print(f"{job}: {outcome.summary()} in {outcome.seconds} s", file=sys.stderr, flush=True)
    for name in outcome.to_rerun():
        print(f"  failed: {name}: {outcome.tests[name].reason}", file=sys.stderr, flush=True)
    if not options.only:
        outcomes.keep(outcome, KEPT)
    return outcome


def _write(path: Path, tables: str) -> None:
    """Put the tables between the marks of a Markdown file."""
    before, _, rest = path.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\n\n{tables}\n{END}{after}")


if __name__ == "__main__":
    sys.exit(main())
