"""Count primes, a range at a time."""

from __future__ import annotations

from proj.celery import app


@app.task
def primes_between(low: int, high: int) -> int:
    """How many primes there are in ``range(low, high)``, the slow way."""
    return sum(
        all(number % divisor for divisor in range(2, int(number**0.5) + 1))
        for number in range(max(low, 2), high)
    )


@app.task
def total(counts: list[int]) -> int:
    return sum(counts)
