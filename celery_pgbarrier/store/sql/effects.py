"""Steps of ``self.transaction()``: their markers, written with the user's own rows."""

from __future__ import annotations

#: Whether an attempt still has its task: its claim holds, or a crash of the server took the claim
#: back, which was not flushed, and nobody has claimed the task since.
_CLAIM = """
SELECT t.id FROM {s}pgbarrier_task t
 WHERE t.id = :id AND (
       (t.state = 'running' AND t.token = CAST(:token AS uuid))
    OR (t.state = 'queued' AND t.token IS NULL AND t.attempt < CAST(:attempt AS integer)
        AND t.call = CAST(:call AS uuid) AND t.seq = CAST(:seq AS integer)))
"""
#: The same of a task whose row was made by its claim.
_ROW_TAKEN_BACK = """
SELECT CAST(:id AS text) AS id
 WHERE NOT CAST(:recorded AS boolean) AND CAST(:attempt AS integer) = 1
   AND NOT EXISTS (SELECT 1 FROM {s}pgbarrier_task WHERE id = :id)
"""
_MARKER = """
    e.task_id = :id AND e.call = CAST(:call AS uuid)
    AND e.replaced = CAST(:replaced AS integer) AND e.step = CAST(:step AS text)
"""

#: Whether the step is done, with its value, and whether the attempt still has its task: as its row
#: says, or because there is none.
EFFECT_FIND = f"""
SELECT EXISTS ({_CLAIM}) AS claimed, EXISTS ({_ROW_TAKEN_BACK}) AS absent,
       e.task_id IS NOT NULL AS done, e.value, CAST(e.token AS text) AS token
  FROM (SELECT 1) AS one LEFT JOIN {{s}}pgbarrier_effect e ON {_MARKER}
"""

#: Leave the marker of a step if the attempt still has its task.  The last statement before COMMIT:
#: it locks the task's row, so that nobody takes the task over in between.  A process that is
#: paused here would keep the lock: the server then ends its session.
EFFECT_RECORD = f"""
WITH claim AS ({_CLAIM} FOR SHARE
), holds AS (
    SELECT id FROM claim UNION ALL {_ROW_TAKEN_BACK}
), marker AS (
    INSERT INTO {{s}}pgbarrier_effect (task_id, call, replaced, step, token, value)
    SELECT CAST(:id AS text), CAST(:call AS uuid), CAST(:replaced AS integer),
           CAST(:step AS text), CAST(:token AS uuid), CAST(:value AS bytea) FROM holds
    ON CONFLICT DO NOTHING RETURNING step
)
SELECT (SELECT count(*) FROM holds) AS claimed, (SELECT count(*) FROM marker) AS recorded,
       set_config('idle_in_transaction_session_timeout', CAST(:pause AS text), true)
"""

#: Wait until a transaction that holds the task's row has ended.
EFFECT_SETTLING = "SELECT id FROM {s}pgbarrier_task WHERE id = :id FOR NO KEY UPDATE"

#: A task that is put back by hand is a new call of the same run: what it has done stays done.
EFFECTS_CARRY = """
UPDATE {s}pgbarrier_effect SET call = CAST(:call AS uuid)
 WHERE task_id = :id AND call = CAST(:held AS uuid)
"""

#: Markers that nothing asks for any more: older than rows are kept, of no task or an earlier call.
PURGE_EFFECTS = """
DELETE FROM {s}pgbarrier_effect WHERE ctid = ANY(ARRAY(
    SELECT e.ctid FROM {s}pgbarrier_effect e
     WHERE e.created_at < (SELECT clock_timestamp()) - make_interval(secs => CAST(:keep AS float8))
       AND NOT EXISTS (SELECT 1 FROM {s}pgbarrier_task t
                        WHERE t.id = e.task_id AND t.call = e.call)
     ORDER BY e.created_at LIMIT :limit FOR UPDATE SKIP LOCKED))
"""
