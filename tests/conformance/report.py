"""The table of a run, and what differs between the backends, as text and as Markdown."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import product

from tests.conformance.exceptions import explanation
from tests.conformance.outcomes import Job, Outcome, Verdict
from tests.conformance.runs import BACKENDS, OURS

TITLES = {
    "redis": "Celery's Redis backend",
    "database": "Celery's database backend",
    OURS: "celery-pgbarrier",
}
COLUMNS = ("passed", "failed", "skipped")
ABSENT = Verdict("not run")


@dataclass
class Table:
    """All files of one Celery version on one broker."""

    version: str
    broker: str
    files: dict[str, dict[str, Outcome]] = field(default_factory=dict)

    def tests(self) -> dict[str, dict[str, Verdict]]:
        """Return every test's outcome by backend."""
        found: dict[str, dict[str, Verdict]] = defaultdict(dict)
        for outcomes in self.files.values():
            for backend, outcome in outcomes.items():
                for name, test in outcome.tests.items():
                    found[name][backend] = test
        return dict(found)


def tables(outcomes: Iterable[Outcome]) -> list[Table]:
    """Sort outcomes into tables."""
    found: dict[tuple[str, str], Table] = {}
    for outcome in outcomes:
        job = outcome.job
        table = found.setdefault((job.version, job.broker), Table(job.version, job.broker))
        table.files.setdefault(job.file, {})[job.backend] = outcome
    return list(found.values())


def unexplained(table: Table) -> list[str]:
    """Return the tests that pass on Celery's Redis backend, not on ours, for no known reason."""
    return [
        name
        for name, tests in table.tests().items()
        if tests.get("redis", ABSENT).passed
        and not tests.get(OURS, ABSENT).passed
        and OURS in tests
        and explanation(name) is None
    ]


def markdown(table: Table) -> str:
    """Return a table and its differences as Markdown."""
    lines = [f"### Celery {table.version}, {_broker(table.broker)} broker", "", *_grid(table)]
    for title, names in _differences(table).items():
        lines += ["", f"{title}:", ""]
        lines += [f"- `{name}`{note}" for name, note in names.items()]
    return "\n".join(lines) + "\n"


def _broker(name: str) -> str:
    return {"redis": "Redis", "rabbitmq": "RabbitMQ"}[name]


def _grid(table: Table) -> list[str]:
    lines = [
        "| file | " + " | ".join(TITLES[backend] for backend in BACKENDS) + " |",
        "|---|" + "---|" * len(BACKENDS),
    ]
    for file, outcomes in table.files.items():
        cells = [_cell(outcomes.get(backend)) for backend in BACKENDS]
        lines.append(f"| {file} | " + " | ".join(cells) + " |")
    return lines


def _cell(outcome: Outcome | None) -> str:
    return "not run" if outcome is None else outcome.summary()


def _differences(table: Table) -> dict[str, dict[str, str]]:
    """Return the names of all tests that differ, under what they have in common."""
    groups: dict[str, dict[str, str]] = defaultdict(dict)
    for name, tests in table.tests().items():
        for title, note in _remarks(name, tests):
            groups[title][name] = f": {note}" if note else ""
    return dict(groups)


def _remarks(name: str, tests: Mapping[str, Verdict]) -> Iterable[tuple[str, str]]:
    redis, ours = tests.get("redis", ABSENT), tests.get(OURS, ABSENT)
    database = tests.get("database", ABSENT)
    if "not reached" in (redis.outcome, ours.outcome):
        return
    if redis.passed and not ours.passed and OURS in tests:
        yield "Pass on Celery's Redis backend and not on ours", _why(name, ours)
    elif ours.passed and not redis.passed and "redis" in tests:
        yield "Pass on ours and not on Celery's Redis backend", _brief(redis)
    elif ours.outcome == "failed":
        why = explanation(name) or ours.reason
        yield "Fail on ours, and do not pass on Celery's Redis backend", f"{redis.outcome}; {why}"
    if database.outcome == "failed" and redis.passed:
        yield "Pass on Celery's Redis backend and fail on Celery's database backend", ""
    if database.passed and not redis.passed:
        yield "Pass on Celery's database backend and not on its Redis backend", _brief(redis)
    for backend in tests:
        if tests[backend].outcome == "flaky":
            yield "Failed, and passed when run again", f"on {TITLES[backend]}"


def _why(name: str, test: Verdict) -> str:
    reason = explanation(name)
    return f"{test.outcome}: {reason or 'UNEXPLAINED: ' + test.reason}"


def _brief(test: Verdict) -> str:
    return f"{test.outcome} there" + (f" ({test.reason})" if test.reason else "")


def section(found: Iterable[Table]) -> str:
    """Return all tables as one piece of Markdown."""
    return "\n".join(markdown(table) for table in found)


def jobs_of(
    versions: Iterable[str], brokers: Iterable[str], backends: Iterable[str], files: Iterable[str]
) -> list[Job]:
    """Return the jobs of a selection, file by file: the longest is the first."""
    return [
        Job(version, broker, backend, file)
        for file, version, broker, backend in product(files, versions, brokers, backends)
    ]
