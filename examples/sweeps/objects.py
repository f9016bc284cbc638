"""Managed objects that expire, in batches of a bounded size: a Core table with UUID keys.

Run this file (``BACKEND`` names another server; no worker is needed):

    python -m examples.sweeps.objects
"""

import os
import uuid
from datetime import timedelta

import sqlalchemy as sa
from celery import Celery

from celery_pgbarrier.sweeps import Expire

app = Celery(
    "objects",
    backend=os.environ.get("BACKEND", "pgbarrier://postgres@localhost:5432/postgres"),
)
# At most 2,000 rows a run.  PGBARRIER_SWEEP_OBJECTS_BATCH_SIZE=500 overrides it for a while.
app.conf.pgbarrier_sweeps = {"objects": {"max_batches": 2}}

metadata = sa.MetaData()
managed_objects = sa.Table(
    "managed_objects",
    metadata,
    sa.Column("id", sa.Uuid, primary_key=True, default=uuid.uuid4),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("seen_at", sa.DateTime(timezone=True), nullable=False),
    sa.Column("expired_at", sa.DateTime(timezone=True)),
)

expire = Expire(
    "objects",
    managed_objects,
    where=lambda now: managed_objects.c.seen_at < now - timedelta(hours=24),
    values={"status": "stale_expired", "expired_at": sa.func.now()},
    terminal={"status": ["completed", "failed", "stale_expired"]},
    order_by=managed_objects.c.seen_at,
)
expire.register(app)
app.conf.beat_schedule = expire.beat_entry(60.0)


def fill(engine: sa.Engine) -> None:
    """Make 4,500 objects that nobody saw for two days, 500 of them completed, and 100 fresh."""
    metadata.drop_all(engine)
    metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(
            sa.text("""
                INSERT INTO managed_objects (id, status, seen_at)
                SELECT gen_random_uuid(), CASE WHEN n <= 500 THEN 'completed' ELSE 'active' END,
                       now() - CASE WHEN n <= 4500 THEN interval '48 hours' ELSE interval '0' END
                  FROM generate_series(1, 4600) AS n
            """)
        )


if __name__ == "__main__":
    engine = app.backend.database.engine()
    fill(engine)
    print("would expire:", expire.dry_run().left)
    while True:
        counts = expire.run()
        print(f"run: {counts.rows} rows in {counts.batches} batches, {counts.left} left")
        if not counts.left:
            break
    query = sa.text("SELECT status, count(*) FROM managed_objects GROUP BY status ORDER BY status")
    with engine.connect() as connection:
        print("objects:", dict(map(tuple, connection.execute(query))))
    metadata.drop_all(engine)
