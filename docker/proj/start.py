"""Start one chord and wait for its answer: ``python -m proj.start``."""

from __future__ import annotations

from celery import chord

from proj.tasks import primes_between, total

LIMIT, STEP = 2_000_000, 5_000


def main() -> None:
    header = [primes_between.s(low, low + STEP) for low in range(0, LIMIT, STEP)]
    result = chord(header, total.s()).delay()
    print(f"{len(header)} tasks started, body {result.id}", flush=True)
    print(f"primes below {LIMIT}: {result.get(timeout=600)}")  # 148933


if __name__ == "__main__":
    main()
