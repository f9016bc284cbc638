"""Conditions that several statements share."""

from __future__ import annotations

#: Of a barrier ``b``: a task that reads its results by reference has not ended, or may be put back.
READ = """EXISTS (SELECT 1 FROM {s}pgbarrier_task r WHERE r.reads = b.id AND (r.state <> 'done'
                   OR EXISTS (SELECT 1 FROM {s}pgbarrier_poison p WHERE p.id = r.id)))"""

#: Of a task ``t``: its chord needs its row, because it is open or its results are still read.
NEEDED = (
    """EXISTS (SELECT 1 FROM {s}pgbarrier_barrier b WHERE b.id = t.barrier_id
                   AND (b.state IN ('waiting', 'ready') OR """
    + READ
    + "))"
)
