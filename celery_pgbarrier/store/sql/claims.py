"""Who runs a task: claims, their release, the runs of plain tasks.

A statement without a plan of its own is planned each time, which costs more than running it.  So
the usual case of a claim has a short statement, and a long one decides what that refused.
"""

from __future__ import annotations

from celery_pgbarrier.store.sql.fragments import NEEDED

_CLAIMED = """
    state = 'running', token = CAST(:token AS uuid), worker = CAST(:worker AS uuid), pid = :pid,
    thread = :thread, rerun = true, started_at = clock_timestamp(), due_at = NULL,
    call = CAST(:call AS uuid), seq = :seq, message = COALESCE(t.message, EXCLUDED.message),
    name = COALESCE(t.name, EXCLUDED.name), queue = COALESCE(t.queue, EXCLUDED.queue),
    attempt = CASE WHEN t.state = 'done' THEN 1
                   WHEN t.token = CAST(:token AS uuid) THEN t.attempt ELSE t.attempt + 1 END,
    crashes = CASE WHEN t.state = 'done' THEN 0 ELSE t.crashes END,
    published_at = CASE WHEN t.copies = :copy THEN t.published_at END,
    barrier_id = CASE WHEN t.state = 'done' THEN NULL ELSE t.barrier_id END,
    expires_at = NULL,
    result = CASE WHEN t.state = 'done' OR CAST(:status AS text) IS NOT NULL
                  THEN CAST(:result AS bytea) ELSE t.result END,
    status = COALESCE(CAST(:status AS text),
                      CASE WHEN t.state = 'done' THEN 'PENDING' ELSE t.status END)
"""

#: Who may have the row: its current stamp when queued, an expected row by whoever brings its
#: message, its own grant again (the answer was lost), a finished row by a new call only.
_CLAIMABLE = (
    """
       (t.state = 'queued' AND t.call = CAST(:call AS uuid) AND t.seq = :seq)
    OR (t.state = 'expected' AND NOT CAST(:recorded AS boolean)
        AND (t.call IS DISTINCT FROM CAST(:call AS uuid) OR t.seq <= :seq))
    OR (t.state = 'running' AND (t.token = CAST(:token AS uuid)
        OR (t.worker = CAST(:worker AS uuid) AND t.pid = :pid AND t.thread = :thread
            AND t.call = CAST(:call AS uuid) AND t.seq = :seq)))
    OR (t.state IN ('done', 'untracked') AND NOT CAST(:recorded AS boolean)
        AND t.call IS DISTINCT FROM CAST(:call AS uuid)
        AND t.origin IS DISTINCT FROM CAST(:call AS uuid)
        AND NOT """
    + NEEDED
    + ")\n"
)

#: A first grant may be lost in a crash of the server: the row is queued again, or was made by the
#: claim and is gone, and both are recognised.  Any other grant is flushed.
_GRANTED = """
SELECT attempt, crashes, barrier_id,
       set_config('synchronous_commit', CASE WHEN attempt = 1 AND fresh THEN 'off'
                  ELSE current_setting('synchronous_commit') END, true)
  FROM granted
"""

#: Grant a task that has no row yet, storing its own message so that it can be put back.  Nothing is
#: granted where there is a row: see CLAIM_NEW.
CLAIM_FIRST_BODY = """
INSERT INTO {s}pgbarrier_task
       (id, call, seq, state, status, attempt, token, worker, pid, thread, name, queue, message,
        result, started_at)
SELECT :id, CAST(:call AS uuid), :seq, 'running', COALESCE(CAST(:status AS text), 'PENDING'), 1,
       CAST(:token AS uuid), w.id, :pid, :thread, CAST(:name AS text), CAST(:queue AS text),
       CAST(:message AS bytea), CAST(:result AS bytea), clock_timestamp()
  FROM {s}pgbarrier_worker w WHERE w.id = CAST(:worker AS uuid) AND w.state <> 'dead'
ON CONFLICT (id) DO NOTHING
RETURNING attempt, crashes, barrier_id, set_config('synchronous_commit', 'off', true)
"""

#: Grant a recorded task whose current message this is; any other case: see CLAIM_RECORDED.
CLAIM_QUEUED_BODY = """
UPDATE {s}pgbarrier_task AS t
   SET state = 'running', token = CAST(:token AS uuid), worker = w.id, pid = :pid,
       thread = :thread, rerun = true, started_at = clock_timestamp(), due_at = NULL,
       attempt = t.attempt + 1, expires_at = NULL,
       published_at = CASE WHEN t.copies = :copy THEN t.published_at END,
       status = COALESCE(CAST(:status AS text), t.status),
       result = COALESCE(CAST(:result AS bytea), t.result)
  FROM {s}pgbarrier_worker w
 WHERE t.id = :id AND t.state = 'queued' AND t.call = CAST(:call AS uuid) AND t.seq = :seq
   AND w.id = CAST(:worker AS uuid) AND w.state <> 'dead'
RETURNING t.attempt, t.crashes, t.barrier_id,
          set_config('synchronous_commit', CASE WHEN t.attempt = 1 THEN 'off'
                     ELSE current_setting('synchronous_commit') END, true)
"""

#: Grant a recorded task to this process.
CLAIM_RECORDED = (
    "WITH granted AS (UPDATE {s}pgbarrier_task AS t SET "
    + _CLAIMED.replace("EXCLUDED.", "t.")
    + """ WHERE t.id = :id
     AND EXISTS (SELECT 1 FROM {s}pgbarrier_worker w
                  WHERE w.id = CAST(:worker AS uuid) AND w.state <> 'dead')
     AND ("""
    + _CLAIMABLE
    + """)
    RETURNING t.attempt, t.crashes, t.barrier_id, true AS fresh)"""
    + _GRANTED
)

#: Grant a task that may have no row yet, storing its own message so that it can be put back.
CLAIM_NEW = (
    """
WITH granted AS (
    INSERT INTO {s}pgbarrier_task AS t
           (id, call, seq, state, status, attempt, token, worker, pid, thread, name, queue,
            message, result, started_at)
    SELECT :id, CAST(:call AS uuid), :seq, 'running',
           COALESCE(CAST(:status AS text), 'PENDING'), 1, CAST(:token AS uuid),
           CAST(:worker AS uuid), :pid, :thread, CAST(:name AS text), CAST(:queue AS text),
           CAST(:message AS bytea), CAST(:result AS bytea), clock_timestamp()
     WHERE EXISTS (SELECT 1 FROM {s}pgbarrier_worker w
                    WHERE w.id = CAST(:worker AS uuid) AND w.state <> 'dead')
    ON CONFLICT (id) DO UPDATE SET """
    + _CLAIMED
    + """
     WHERE """
    + _CLAIMABLE
    + """
    RETURNING t.attempt, t.crashes, t.barrier_id, t.xmax = 0 AS fresh
)"""
    + _GRANTED
)

#: Why a claim was not granted.
INSPECT = """
SELECT (SELECT count(*) FROM {s}pgbarrier_worker
         WHERE id = CAST(:worker AS uuid) AND state <> 'dead') AS registered,
       t.state, t.status, CAST(t.call AS text) AS call, t.seq,
       CAST(t.token AS text) AS token, CAST(t.worker AS text) AS worker, t.pid, t.crashes,
       t.rerun, t.barrier_id, t.message
  FROM (SELECT 1) AS one LEFT JOIN {s}pgbarrier_task t ON t.id = :id
"""

#: A plain task with a row begins: never published again from here on.  Its worker is made known.
PLAIN_STARTED = """
WITH holder AS (
    INSERT INTO {s}pgbarrier_worker AS w (id, name, state)
    VALUES (CAST(:worker AS uuid), :worker_name, 'running')
    ON CONFLICT (id) DO UPDATE SET state = 'running', beat_at = clock_timestamp(),
        suspect_at = NULL WHERE w.state = 'dead'
)
UPDATE {s}pgbarrier_task
   SET state = 'running', worker = CAST(:worker AS uuid), pid = :pid, thread = :thread,
       started_at = clock_timestamp(), due_at = NULL, rerun = :rerun, attempt = attempt + 1
 WHERE id = :id AND state IN ('queued', 'expected') AND token IS NULL
"""

#: A plain task's retry: the run ends; should its next message, which is not recorded, be lost, the
#: recorded one is published again.
PLAIN_RETRIED = """
UPDATE {s}pgbarrier_task
   SET state = 'queued', worker = NULL, publications = 0, copies = copies + 1,
       due_at = GREATEST(clock_timestamp(), CAST(:eta AS timestamptz))
                + make_interval(secs => :after)
 WHERE id = :id AND state = 'running' AND token IS NULL AND message IS NOT NULL
   AND worker = CAST(:worker AS uuid) AND pid = :pid AND thread = :thread
"""

#: A plain task that replaced itself: its id waits for another message.
PLAIN_REPLACED = """
UPDATE {s}pgbarrier_task
   SET state = 'expected', worker = NULL, message = NULL, seq = seq + 1
 WHERE id = :id AND state = 'running' AND token IS NULL
   AND worker = CAST(:worker AS uuid) AND pid = :pid AND thread = :thread
"""

#: Put a claimed (or, with no token, an unclaimed) task back, to be published by the caller.
RELEASE = """
UPDATE {s}pgbarrier_task
   SET state = 'queued', token = NULL, worker = NULL, crashes = crashes + :crash,
       due_at = clock_timestamp() + make_interval(secs => :grace), published_at = NULL,
       publications = 0, copies = copies + 1
 WHERE id = :id AND state = :state AND token IS NOT DISTINCT FROM CAST(:token AS uuid)
   AND (token IS NOT NULL OR worker IS NOT DISTINCT FROM CAST(:worker AS uuid))
   AND crashes + :crash < :max_crashes AND message IS NOT NULL
RETURNING crashes
"""

#: What a worker holds (at most its concurrency, for a healthy one).
CLAIMS_OF = """
SELECT id, CAST(token AS text) AS token, CAST(worker AS text) AS worker, pid, rerun, name,
       CAST(call AS text) AS call, seq
  FROM {s}pgbarrier_task WHERE worker = CAST(:worker AS uuid) ORDER BY started_at LIMIT :limit
"""

#: Claims whose worker is dead, stopped or unknown.  The holders are found one by one in the index:
#: what is read does not grow with what healthy workers hold.
CLAIMS_LOST = """
WITH RECURSIVE holders (id) AS (
    (SELECT worker FROM {s}pgbarrier_task WHERE worker IS NOT NULL ORDER BY worker LIMIT 1)
  UNION ALL
    SELECT (SELECT t.worker FROM {s}pgbarrier_task t WHERE t.worker > holders.id
             ORDER BY t.worker LIMIT 1)
      FROM holders WHERE holders.id IS NOT NULL
)
SELECT t.id, CAST(t.token AS text) AS token, CAST(t.worker AS text) AS worker, t.pid, t.rerun,
       t.name, CAST(t.call AS text) AS call, t.seq, COALESCE(w.state, 'dead') AS holder
  FROM holders LEFT JOIN {s}pgbarrier_worker w ON w.id = holders.id
       CROSS JOIN LATERAL (SELECT * FROM {s}pgbarrier_task held
                            WHERE held.worker = holders.id LIMIT :limit) AS t
 WHERE w.id IS NULL OR w.state IN ('dead', 'stopped')
 ORDER BY random() LIMIT :limit
"""
