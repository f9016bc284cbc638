"""What came out of a run of one file: an outcome and a reason for each test."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

PASSED = ("passed", "flaky", "xpassed")
TO_RERUN = ("failed", "not reached")
#: "flaky" is a test that failed, and passed when it was run again, once, by itself.
OUTCOMES = (
    "passed", "flaky", "xpassed", "failed", "not reached", "xfailed", "skipped", "left out",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One file of one version's suite, on one broker and one backend."""

    version: str
    broker: str
    backend: str
    file: str

    def __str__(self) -> str:
        return f"Celery {self.version}, {self.broker} broker, {self.backend}, {self.file}"


@dataclass(frozen=True)
class Verdict:
    """One test: its outcome (one of ``OUTCOMES``), and why it is not a plain pass."""

    outcome: str
    reason: str = ""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether the test held."""
        return self.outcome in PASSED


@dataclass
class Outcome:
    """All tests of a job by name (the file's name and the test's in it)."""

    job: Job
    tests: dict[str, Verdict] = field(default_factory=dict)
    seconds: float = 0.0
    date: str = ""

    def counts(self) -> dict[str, int]:
        """Return how many tests had each outcome."""
        return dict(Counter(test.outcome for test in self.tests.values()))

    def summary(self) -> str:
        """Return the counts in words."""
        counts = self.counts()
        return ", ".join(f"{counts[o]} {o}" for o in OUTCOMES if counts.get(o)) or "no tests"

    def to_rerun(self) -> list[str]:
        """Return the tests that failed, and those before which the run ended."""
        return [name for name, test in self.tests.items() if test.outcome in TO_RERUN]

    def after_rerun(self, again: Outcome) -> None:
        """Take the second chance of failed tests into account."""
        for name, test in again.tests.items():
            first = self.tests.get(name)
            if first is None or first.outcome == "not reached":
                self.tests[name] = test
            elif first.outcome == "failed" and test.passed:
                self.tests[name] = Verdict("flaky", first.reason, test.seconds)


def read_report(path: Path) -> dict[str, Verdict]:
    """Read what the plugin reported; a test that was started and did not end has failed."""
    tests: dict[str, Verdict] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        entry = json.loads(line)
        if entry["kind"] == "expected":
            tests[entry["test"]] = Verdict("not reached", "the run ended before it")
        elif entry["kind"] == "started":
            tests[entry["test"]] = Verdict("failed", "it hung, or ended the run")
        else:
            tests[entry["test"]] = Verdict(entry["outcome"], entry["reason"], entry["seconds"])
    return tests


def keep(outcome: Outcome, folder: Path) -> None:
    """Keep an outcome in a folder, in place of an earlier one of the same job."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(asdict(outcome), indent=1, sort_keys=True)
    _path(folder, outcome.job).write_text(text + "\n")


def kept(folder: Path, job: Job) -> Outcome | None:
    """Return the outcome of a job that a folder keeps."""
    path = _path(folder, job)
    if not path.exists():
        return None
    values = json.loads(path.read_text())
    tests = {name: Verdict(**test) for name, test in values["tests"].items()}
    return Outcome(job, tests, values["seconds"], values["date"])


def _path(folder: Path, job: Job) -> Path:
    return folder / f"{job.version}-{job.broker}-{job.backend}-{job.file}.json"
