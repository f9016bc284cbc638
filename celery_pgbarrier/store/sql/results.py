"""Results and groups as their readers see them."""

from __future__ import annotations

from celery_pgbarrier.store.sql.fragments import NEEDED

#: Results of finished or reporting tasks.
RESULTS = """
SELECT id, status, result FROM {s}pgbarrier_task
 WHERE id = ANY(CAST(:ids AS text[])) AND status <> 'PENDING'
"""

#: Forget a result; the row goes on recognising late copies, and a live chord keeps the value.
FORGET = (
    """
UPDATE {s}pgbarrier_task AS t
   SET status = 'PENDING',
       result = CASE WHEN """
    + NEEDED
    + """ THEN t.result END
 WHERE id = :id AND state IN ('done', 'untracked')
"""
)

GROUP_SAVE = """
INSERT INTO {s}pgbarrier_group (id, result, expires_at)
VALUES (:id, :result, clock_timestamp() + make_interval(secs => CAST(:expires AS float8)))
ON CONFLICT (id) DO UPDATE SET result = EXCLUDED.result, expires_at = EXCLUDED.expires_at
"""

GROUP_LOAD = "SELECT result FROM {s}pgbarrier_group WHERE id = :id"

GROUP_DELETE = "DELETE FROM {s}pgbarrier_group WHERE id = :id"
