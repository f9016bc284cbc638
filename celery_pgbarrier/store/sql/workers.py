"""Workers and their leases; the turns of the reaper."""

from __future__ import annotations

#: Renew a lease; a worker that was swept away inserts itself again.
WORKER_BEAT = """
INSERT INTO {s}pgbarrier_worker (id, name, state)
SELECT CAST(:id AS uuid), :name, :state
  FROM (SELECT set_config('synchronous_commit', 'off', true)) AS unflushed
ON CONFLICT (id) DO UPDATE SET beat_at = clock_timestamp(), suspect_at = NULL,
    state = EXCLUDED.state
"""

#: A clean end: what is still claimed is released at once, without counting a crash.
WORKER_STOPPED = """
UPDATE {s}pgbarrier_worker SET state = 'stopped', beat_at = clock_timestamp()
 WHERE id = CAST(:id AS uuid)
"""

#: First look: silent for almost a lease.
WORKERS_SUSPECT = """
UPDATE {s}pgbarrier_worker SET suspect_at = clock_timestamp()
 WHERE state IN ('running', 'stopping') AND suspect_at IS NULL
   AND beat_at < clock_timestamp() - make_interval(secs => :silence)
"""

#: Second look: the lease is over, and still silent two heartbeats after the first look.
WORKERS_DEAD = """
UPDATE {s}pgbarrier_worker
   SET state = CASE WHEN state = 'stopping' THEN 'stopped' ELSE 'dead' END
 WHERE state IN ('running', 'stopping')
   AND suspect_at < clock_timestamp() - make_interval(secs => :patience)
   AND beat_at < clock_timestamp() - make_interval(secs => :lease)
"""

#: One pass an interval, whichever worker comes first.
REAPER_TURN = """
UPDATE {s}pgbarrier_reaper SET pass_at = clock_timestamp()
 WHERE id = 1 AND pass_at < clock_timestamp() - make_interval(secs => :interval)
"""
