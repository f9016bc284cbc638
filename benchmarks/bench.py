"""Beside Celery's own backends, in one run and in interleaved rounds.

    make bench
    python -m benchmarks.bench --list
    python -m benchmarks.bench --questions chord,throughput --rounds 8
    python -m benchmarks.bench --preset final --json bench.json
    python -m benchmarks.bench --report bench.json --into docs/performance.md

Every peer has a database, a queue, a worker of two prefork processes and a producer of its own.
Needs RabbitMQ, Redis and PostgreSQL: PGBARRIER_BENCH_RABBITMQ, PGBARRIER_BENCH_REDIS,
PGBARRIER_BENCH_POSTGRES; the last may be `embedded`, a cluster of its own that counts statements.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks import report
from benchmarks.machine import describe, load
from benchmarks.peers import PEERS, Lab
from benchmarks.plan import PRESETS, Plan
from benchmarks.questions import QUESTIONS
from benchmarks.records import Book
from benchmarks.servers import find_servers


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.bench", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--questions", help="which, separated by commas (see --list)")
    parser.add_argument("--peers", default="redis,pgbarrier,database,django,ignored",
                        help=f"which, separated by commas: {', '.join(PEERS)}")  # fmt: skip
    parser.add_argument("--rounds", type=int, help="rounds in which peers take turns")
    parser.add_argument("--quick", action="store_true", help="small: to see that it works")
    parser.add_argument("--preset", choices=sorted(PRESETS), help="all that matters, bounded")
    parser.add_argument("--json", type=Path, help="write all samples to this file")
    parser.add_argument("--report", type=Path, help="print the markdown of such a file; no run")
    parser.add_argument("--into", type=Path, help="put it between the markers of this page")
    parser.add_argument("--list", action="store_true", help="print the questions; no run")
    return parser.parse_args(arguments)


def plan_of(options: argparse.Namespace) -> Plan:
    """What to ask, and how long."""
    plan = PRESETS[options.preset]() if options.preset else Plan(questions=tuple(QUESTIONS))
    if options.questions:
        plan.questions = tuple(options.questions.split(","))
    unknown = set(plan.questions) - set(QUESTIONS)
    if unknown:
        sys.exit(f"no question {', '.join(sorted(unknown))}: there are {', '.join(QUESTIONS)}")
    plan.rounds = options.rounds or plan.rounds
    plan.quick = options.quick
    return plan


def ask(lab: Lab, plan: Plan, book: Book, name: str) -> None:
    """Ask one question; a failure is taken down and does not stop the others."""
    module = QUESTIONS[name]
    book.question, book.titles[name] = name, module.TITLE
    if time.monotonic() - lab.begun > plan.minutes * 60:
        book.failures.append((name, f"left out: {plan.minutes:g} minutes are over"))
        return
    begun, busy = time.monotonic(), load()
    lab.deadline = begun + plan.seconds(name)
    if busy > 30:
        book.note(f"the machine was {busy:.0f} % busy before this question began")
    try:
        module.run(lab, plan, book)
    except Exception as error:
        traceback.print_exc()
        book.failures.append((name, f"{type(error).__name__}: {error}"))
    if lab.cut:
        book.note(f"{lab.cut} turns were left out: the question's time was over")
        lab.cut = 0
    book.seconds[name] = time.monotonic() - begun
    report.print_question(book, name)


def run(options: argparse.Namespace) -> Book:
    """Ask all questions of the plan."""
    plan = plan_of(options)
    book = Book(options={"questions": ",".join(plan.questions), "peers": options.peers,
                         "rounds": plan.rounds, "quick": plan.quick})  # fmt: skip
    with ExitStack() as stack:
        servers = find_servers(stack, os.environ)
        book.machine = describe(servers.postgres, servers.redis)
        for name, value in book.machine.items():
            print(f"{name:12} {value}")
        lab = stack.enter_context(
            Lab(servers.postgres, servers.rabbitmq, servers.redis, options.peers.split(","))
        )
        for name in plan.questions:
            ask(lab, plan, book, name)
            if options.json:
                options.json.write_text(json.dumps(book.encode(), indent=1))
    return book


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; 1 where a question failed."""
    options = parse(arguments)
    if options.list:
        for name, module in QUESTIONS.items():
            print(f"{name:12} {module.TITLE}")
        return 0
    if options.report:
        book = Book.decode(json.loads(options.report.read_text()))
        if options.into:
            report.insert(options.into, book)
        else:
            print(report.markdown(book))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # clear up, whoever ends it
    book = run(options)
    report.print_goals(book)
    for question, failure in book.failures:
        print(f"FAILED {question}: {failure}", file=sys.stderr)
    return 1 if book.failures else 0


if __name__ == "__main__":
    sys.exit(main())
