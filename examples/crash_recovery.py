"""A member that kills its process the first time it runs; its chord completes all the same.

Start a worker, then run this file (``BROKER`` and ``BACKEND`` name other servers):

    celery -A examples.crash_recovery worker --loglevel INFO --concurrency 2
    python -m examples.crash_recovery
"""

import os
import tempfile

from celery import Celery, chord

app = Celery(
    "crash_recovery",
    broker=os.environ.get("BROKER", "redis://localhost:6379/0"),
    backend=os.environ.get("BACKEND", "pgbarrier://postgres@localhost:5432/postgres"),
    task_cls="celery_pgbarrier:BarrierTask",
)


@app.task(name="crash_recovery.square")
def square(number: int, marker: str) -> int:
    if number == 7 and not os.path.exists(marker):
        with open(marker, "w"):
            pass
        os._exit(1)  # as the kernel does when memory is short
    return number * number


@app.task(name="crash_recovery.total")
def total(numbers: list[int]) -> int:
    return sum(numbers)


if __name__ == "__main__":
    marker = os.path.join(tempfile.mkdtemp(), "crashed")
    result = chord(square.s(number, marker) for number in range(10))(total.s())
    print("sum of squares:", result.get(timeout=60))
    print("a process died on the way:", os.path.exists(marker))
