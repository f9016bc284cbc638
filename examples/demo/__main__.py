"""A chord over the standard library, while its workers are killed and its broker forgets.

Run it from the root of the repository: ``python -m examples.demo``
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from celery_pgbarrier.embedded import EmbeddedBroker, EmbeddedPostgres
from examples.demo import counting, proof, screen
from examples.demo.chaos import Chaos
from examples.demo.crew import Crew
from examples.demo.ledger import Ledger

POLL_SECONDS = 0.1


def main() -> int:
    options = parse_options()
    console = Console()
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, _leave)
    try:
        with stage(options, console) as demo:
            return demo.run()
    except KeyboardInterrupt:
        console.print("Interrupted: everything is stopped and removed.")
        return 128 + signal.SIGINT


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.add_argument("--files", type=int, help="only so many files, chosen by the seed")
    parser.add_argument("--kills", type=int, default=6, help="how many SIGKILLs (default: 6)")
    parser.add_argument("--seed", type=int, help="decides what is killed, and when")
    parser.add_argument("--timeout", type=float, default=180, help="seconds to wait for the body")
    parser.add_argument("--logs", type=Path, help="keep the logs of workers and beat there")
    options = parser.parse_args()
    if options.seed is None:
        options.seed = random.randrange(1_000_000)
    return options


@contextlib.contextmanager
def stage(options: argparse.Namespace, console: Console) -> Iterator[Demo]:
    """Servers and processes for one demo; however it is left, none of them stays."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pgbarrier-demo-")))
        logs = (options.logs or folder).absolute()
        logs.mkdir(parents=True, exist_ok=True)
        postgres = stack.enter_context(EmbeddedPostgres())
        broker = stack.enter_context(EmbeddedBroker())
        # The application reads these: in the workers, and in this process when it is imported.
        os.environ["DEMO_BROKER_URL"] = broker.url()
        os.environ["DEMO_BACKEND_URL"] = postgres.backend_url()
        os.environ["DEMO_DATABASE_URL"] = postgres.url()
        rng = random.Random(options.seed)
        # A worker that is killed leaves its temporary files: let them go with ours.
        crew = Crew(logs, {**os.environ, "TMPDIR": str(folder)}, rng)
        stack.callback(crew.close)
        # Called first, so that an impatient second Ctrl-C does not cut the cleaning short.
        stack.callback(_ignore_signals)
        yield Demo(options, console, rng, broker, Ledger(postgres.url()), crew)


@dataclass(frozen=True)
class Demo:
    options: argparse.Namespace
    console: Console
    rng: random.Random
    broker: EmbeddedBroker
    ledger: Ledger
    crew: Crew

    def run(self) -> int:
        started = time.monotonic()
        files = self.choose_files()
        chaos = Chaos(len(files), self.options.kills, self.crew, self.broker, self.rng)
        self.crew.start()
        result = submit(files)
        barrier = result.parent.id
        if not self.attend(barrier, result, chaos):
            self.console.print("[bold red]The body did not run in time.[/] The tasks' states:")
            self.console.print("\n".join(self.ledger.states()))
            return 1
        seconds = time.monotonic() - started
        report = result.get(timeout=10)
        self.console.print("Counting again, in a plain loop ...")
        expected = counting.merge_figures(map(counting.count_file, files))
        checks = [
            *proof.same_figures(report, expected),
            *proof.once_each(self.ledger, barrier, result.id, len(files)),
            proof.Check("failures struck before the end", chaos.planned, len(chaos.done)),
        ]
        self.console.print(screen.report_table(report), screen.proof_table(checks))
        self.console.print(screen.summary(self.ledger.members(barrier), seconds))
        return 0 if all(check.holds for check in checks) else 1

    def choose_files(self) -> list[str]:
        files = counting.source_files()
        if self.options.files is not None:
            files = sorted(self.rng.sample(files, min(self.options.files, len(files))))
        self.console.print(f"{len(files):,} files, seed {self.options.seed}")
        return files

    def attend(self, barrier: str, result: Any, chaos: Chaos) -> bool:
        """Show the progress and let things go wrong until the body has run; False if it did not."""
        deadline = time.monotonic() + self.options.timeout
        with screen.progress_bar(self.console) as progress:
            bar = progress.add_task("", total=chaos.total, kills=0, wipes=0)
            while not result.ready() and time.monotonic() < deadline:
                done = self.ledger.members_done(barrier)
                if struck := chaos.strike(done):
                    self.console.print(f"  {done:5,} done: [red]{struck}[/]", highlight=False)
                progress.update(bar, completed=done, kills=chaos.kills, wipes=chaos.wipes)
                time.sleep(POLL_SECONDS)
            progress.update(bar, completed=self.ledger.members_done(barrier))
        return bool(result.ready())


def submit(files: list[str]) -> Any:
    from celery import chord

    from examples.demo.tasks import count, merge

    return chord([count.s(path) for path in files])(merge.s())


def _leave(signum: int, frame: object) -> None:
    sys.exit(128 + signum)


def _ignore_signals() -> None:
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)


if __name__ == "__main__":
    sys.exit(main())
