-- name: create_task(queue, task_name, input, max_retries, timeout, schedule_timeout, priority, is_durable)^
-- Enqueue one task. The time of its schedule timeout is made by Postgres, whose clock will judge it.
INSERT INTO tasks (
    queue, task_name, input, max_retries, timeout, schedule_timeout_at, priority, is_durable
)
VALUES (
    :queue, :task_name, :input, :max_retries, :timeout,
    now() + CAST(:schedule_timeout AS INTERVAL), :priority, :is_durable
)
RETURNING *;

-- name: get_task(id)^
SELECT *
FROM tasks
WHERE id = :id;

-- name: get_tasks(queue)
SELECT *
FROM tasks
WHERE queue = :queue
ORDER BY id;

-- name: poll_tasks(queue, is_durable, limit, worker_id)
-- Claim the most urgent queued tasks, oldest first. SKIP LOCKED passes over rows that another
-- worker is claiming at this moment, so two workers never wait for each other and never get the
-- same task. RETURNING promises no order, hence the last SELECT.
WITH picked AS (
    SELECT id
    FROM tasks
    WHERE queue = :queue
      AND is_durable = :is_durable
      AND status = 'QUEUED'
      AND (attempt > 0 OR schedule_timeout_at IS NULL OR schedule_timeout_at > now())
    ORDER BY priority DESC, id
    LIMIT :limit
    FOR UPDATE SKIP LOCKED
), claimed AS (
    UPDATE tasks
    SET status = 'RUNNING',
        worker_id = :worker_id,
        attempt = attempt + 1
    FROM picked
    WHERE tasks.id = picked.id
    RETURNING tasks.*
)
SELECT *
FROM claimed
ORDER BY priority DESC, id;

-- name: complete_task(id, worker_id, attempt, output)!
UPDATE tasks
SET status = 'COMPLETED',
    output = :output,
    finished_at = now()
WHERE id = :id
  AND worker_id = :worker_id
  AND attempt = :attempt
  AND status = 'RUNNING';

-- name: fail_task(id, worker_id, attempt, output)!
UPDATE tasks
SET status = 'FAILED',
    output = :output,
    finished_at = now()
WHERE id = :id
  AND worker_id = :worker_id
  AND attempt = :attempt
  AND status = 'RUNNING';

-- name: requeue_failed_task(id, worker_id, attempt, output)!
-- A failure with retries left.
UPDATE tasks
SET status = 'QUEUED',
    output = :output,
    worker_id = NULL,
    retry_count = retry_count + 1
WHERE id = :id
  AND worker_id = :worker_id
  AND attempt = :attempt
  AND status = 'RUNNING';

-- name: requeue_own_tasks(worker_id, ids, attempts)
-- Put back what this worker owns and does not run: all but the (id, attempt) given.
WITH unknown AS (
    SELECT id
    FROM tasks
    WHERE worker_id = :worker_id
      AND status = 'RUNNING'
      AND (id, attempt) NOT IN (
          SELECT *
          FROM unnest(CAST(:ids AS BIGINT[]), CAST(:attempts AS INT[]))
      )
    ORDER BY id
    FOR UPDATE SKIP LOCKED
)
UPDATE tasks
SET status = 'QUEUED',
    worker_id = NULL
FROM unknown
WHERE tasks.id = unknown.id
RETURNING tasks.*;

-- name: heartbeat(id, display_name, max_silence)^
-- Say that this worker is alive. Tells whether it had been out of touch: silent for longer than
-- max_silence, or new, or taken for inactive by the others, who delete its row.
WITH previous AS (
    SELECT last_heartbeat_at
    FROM workers
    WHERE id = :id
)
INSERT INTO workers (id, display_name)
VALUES (:id, :display_name)
ON CONFLICT (id) DO UPDATE
SET last_heartbeat_at = now()
RETURNING NOT EXISTS (
    SELECT
    FROM previous
    WHERE last_heartbeat_at > now() - make_interval(secs => :max_silence)
) AS was_out_of_touch, last_heartbeat_at;

-- name: requeue_lost_tasks(active_since, max_lost_workers)
-- Take the running tasks of inactive workers away from them. The active workers are listed once:
-- a row that one of them claims before we lock it is checked against that list again.
WITH lost AS (
    SELECT id, lost_count + 1 >= :max_lost_workers AS is_given_up
    FROM tasks
    WHERE status = 'RUNNING'
      AND (worker_id = ANY (ARRAY(
          SELECT id
          FROM workers
          WHERE last_heartbeat_at > :active_since
      ))) IS NOT TRUE
    ORDER BY id
    FOR UPDATE SKIP LOCKED
)
UPDATE tasks
SET status = CASE WHEN is_given_up THEN 'FAILED' ELSE 'QUEUED' END::task_status,
    output = CASE WHEN is_given_up THEN jsonb_build_object(
        'error', 'its worker became inactive ' || lost_count + 1 || ' times'
    ) ELSE output END,
    finished_at = CASE WHEN is_given_up THEN now() END,
    worker_id = NULL,
    lost_count = lost_count + 1
FROM lost
WHERE tasks.id = lost.id
RETURNING tasks.*;

-- name: delete_inactive_workers(active_since)!
WITH inactive AS (
    SELECT id
    FROM workers
    WHERE last_heartbeat_at <= :active_since
    FOR UPDATE SKIP LOCKED
)
DELETE FROM workers
USING inactive
WHERE workers.id = inactive.id;

-- name: delete_worker(id)!
DELETE FROM workers
WHERE id = :id;

-- name: expire_tasks()
-- Fail the tasks that nobody claimed in time.
WITH expired AS (
    SELECT id
    FROM tasks
    WHERE status = 'QUEUED'
      AND attempt = 0
      AND schedule_timeout_at <= now()
    ORDER BY id
    FOR UPDATE SKIP LOCKED
)
UPDATE tasks
SET status = 'FAILED',
    output = jsonb_build_object(
        'error', 'schedule timeout: nobody claimed it before ' || schedule_timeout_at
    ),
    finished_at = now()
FROM expired
WHERE tasks.id = expired.id
RETURNING tasks.*;

-- name: lock_task(id, worker_id, attempt)^
-- Hold the task's row until the end of the transaction, if this attempt still owns it.
SELECT id
FROM tasks
WHERE id = :id
  AND worker_id = :worker_id
  AND attempt = :attempt
  AND status = 'RUNNING'
FOR UPDATE;

-- name: get_event(task_id, event_id)^
SELECT *
FROM durable_events
WHERE task_id = :task_id
  AND event_id = :event_id;

-- name: get_events(task_id)
SELECT *
FROM durable_events
WHERE task_id = :task_id
ORDER BY event_id;

-- name: append_event(task_id, event_id, kind, key, child_task_id)^
INSERT INTO durable_events (task_id, event_id, kind, key, child_task_id)
VALUES (:task_id, :event_id, :kind, :key, :child_task_id)
RETURNING *;

-- name: start_child(task_id, worker_id, attempt, event_id, kind, key, task_name, input, max_retries, timeout, is_durable)^
-- lock_task, create_task and append_event in one statement, which is a transaction of its own.
WITH parent AS (
    SELECT id, queue, priority
    FROM tasks
    WHERE id = :task_id
      AND worker_id = :worker_id
      AND attempt = :attempt
      AND status = 'RUNNING'
    FOR UPDATE
), child AS (
    INSERT INTO tasks (queue, task_name, input, max_retries, timeout, priority, is_durable)
    SELECT queue, :task_name, :input, :max_retries, :timeout, priority, :is_durable
    FROM parent
    RETURNING *
), event AS (
    INSERT INTO durable_events (task_id, event_id, kind, key, child_task_id)
    SELECT :task_id, :event_id, :kind, :key, id
    FROM child
)
SELECT *
FROM child;

-- name: delete_events(task_id)!
DELETE FROM durable_events
WHERE task_id = :task_id;

-- name: get_finished_tasks(ids)
SELECT id, attempt, status, output
FROM tasks
WHERE id = ANY (:ids)
  AND status IN ('COMPLETED', 'FAILED');

-- name: lock_task_for_reset(id)^
SELECT *
FROM tasks
WHERE id = :id
FOR UPDATE;

-- name: lock_failed_child(id)^
-- The child whose failure ended the task: the one that its output names.
SELECT child.*
FROM tasks AS parent
JOIN durable_events AS event ON event.task_id = parent.id
JOIN tasks AS child ON child.id = event.child_task_id
WHERE parent.id = :id
  AND parent.output ->> 'child_task_id' = CAST(child.id AS TEXT)
  AND child.status = 'FAILED'
FOR UPDATE OF child;

-- name: reset_task(id)!
-- Queue a finished task again, with all its retries. `attempt` goes on: it is the fencing token.
UPDATE tasks
SET status = 'QUEUED',
    output = NULL,
    finished_at = NULL,
    schedule_timeout_at = NULL,
    worker_id = NULL,
    retry_count = 0,
    lost_count = 0
WHERE id = :id;

-- name: get_open_order(queue)^
-- The demo: an order that an earlier run has left unfinished.
SELECT *
FROM tasks
WHERE queue = :queue
  AND task_name = 'process_order'
  AND status IN ('QUEUED', 'RUNNING')
ORDER BY id
LIMIT 1;

-- name: create_payment(idempotency_key, amount, order_id)^
-- Charge, unless this key has been charged already; then there is no row.
INSERT INTO payments (idempotency_key, amount, order_id)
VALUES (:idempotency_key, :amount, :order_id)
ON CONFLICT (idempotency_key) DO NOTHING
RETURNING *;

-- name: get_payments(order_id)
SELECT *
FROM payments
WHERE order_id = :order_id
ORDER BY idempotency_key;
