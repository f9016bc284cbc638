"""A first chord.

Start a worker, then run this file (``BROKER`` and ``BACKEND`` name other servers):

    celery -A examples.first_chord worker --loglevel INFO
    python -m examples.first_chord
"""

import os

from celery import Celery, chord

app = Celery(
    "first_chord",
    broker=os.environ.get("BROKER", "redis://localhost:6379/0"),
    backend=os.environ.get("BACKEND", "pgbarrier://postgres@localhost:5432/postgres"),
    task_cls="celery_pgbarrier:BarrierTask",
)


@app.task(name="first_chord.add")
def add(x: int, y: int) -> int:
    return x + y


@app.task(name="first_chord.total")
def total(numbers: list[int]) -> int:
    return sum(numbers)


if __name__ == "__main__":
    result = chord(add.s(i, i) for i in range(100))(total.s())
    print("the chord is recorded:", result.parent.id)
    print("its body returned", result.get(timeout=60))
