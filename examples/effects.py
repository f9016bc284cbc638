"""A payment that is made once, though its process dies right after it.

Start a worker, then run this file (``BROKER`` and ``BACKEND`` name other servers):

    celery -A examples.effects worker --loglevel INFO --concurrency 2
    python -m examples.effects
"""

import os
import signal

from celery import Celery
from sqlalchemy import create_engine, text

from celery_pgbarrier import Transaction

BACKEND = os.environ.get("BACKEND", "pgbarrier://postgres@localhost:5432/postgres")

app = Celery(
    "effects",
    broker=os.environ.get("BROKER", "redis://localhost:6379/0"),
    backend=BACKEND,
    task_cls="celery_pgbarrier:BarrierTask",
)

TABLE = "CREATE TABLE IF NOT EXISTS example_payment (order_id int, amount int)"


@app.task(name="effects.receipt")
def receipt(order_id: int) -> None:
    print("receipt of order", order_id)


def book(tx: Transaction, order_id: int, amount: int) -> int:
    tx.session.execute(
        text("INSERT INTO example_payment VALUES (:order, :amount)"),
        {"order": order_id, "amount": amount},
    )
    receipt.delay(order_id)  # goes out with the commit
    return os.getpid()


@app.task(name="effects.pay", bind=True)
def pay(self, order_id: int, amount: int) -> dict[str, int]:
    paid_by = self.once("payment", book, order_id, amount)
    if paid_by == os.getpid():
        os.kill(os.getpid(), signal.SIGKILL)  # the payment is committed; the task has not ended
    return {"paid by": paid_by, "ended by": os.getpid()}


if __name__ == "__main__":
    url = BACKEND.replace("pgbarrier+", "").replace("pgbarrier://", "postgresql+psycopg2://")
    with create_engine(url).connect() as connection:
        connection.execute(text(TABLE))
        connection.commit()
        order = connection.execute(text("SELECT count(*) FROM example_payment")).scalar()
        connection.commit()
        processes = pay.delay(order, 100).get(timeout=60)
        counts = text("SELECT count(*) FROM example_payment WHERE order_id = :order")
        payments = connection.execute(counts, {"order": order}).scalar()
    print("processes that ran it:", len(set(processes.values())))
    print("payments:", payments)
