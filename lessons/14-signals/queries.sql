-- name: create_task(queue, task_name, input, max_retries, timeout, schedule_timeout, priority, is_durable)^
-- Enqueue one task, and tell the workers of its queue. They are told when it is committed, or never.
-- The time of its schedule timeout is made by Postgres, whose clock will judge it.
WITH created AS (
    INSERT INTO tasks (
        queue, task_name, input, max_retries, timeout, schedule_timeout_at, priority, is_durable
    )
    VALUES (
        :queue, :task_name, :input, :max_retries, :timeout,
        now() + CAST(:schedule_timeout AS INTERVAL), :priority, :is_durable
    )
    RETURNING *
)
SELECT created.*
FROM created, pg_notify('tasks', md5(current_schema() || ' ' || queue)) AS told;

-- name: create_child(queue, task_name, input, max_retries, timeout, priority, is_durable)^
-- The same for a child, of which others are told later: this transaction must not notify.
INSERT INTO tasks (queue, task_name, input, max_retries, timeout, priority, is_durable)
VALUES (:queue, :task_name, :input, :max_retries, :timeout, :priority, :is_durable)
RETURNING *;

-- name: create_sleep(queue, input, seconds)^
-- A timer is a child task that no worker runs. What it will return is there from the start, so that
-- waking it only has to set its status.
INSERT INTO tasks (queue, task_name, input, output, status, wake_at)
VALUES (
    :queue, 'sleep', :input, 'null', 'SLEEPING', now() + make_interval(secs => :seconds)
)
RETURNING *;

-- name: create_wait(queue, name, input, seconds)^
-- A wait for a signal is a timer that something outside may end. Without seconds it has no limit.
INSERT INTO tasks (queue, task_name, input, output, status, wake_at)
VALUES (
    :queue, :name, :input, '{"timed_out": true}', 'SLEEPING',
    now() + make_interval(secs => :seconds)
)
RETURNING *;

-- name: lock_receiver(id)^
-- The same lock as an append to its log takes: the second of the two sees what the first wrote.
SELECT task_name, is_durable, status
FROM tasks
WHERE id = :id
FOR NO KEY UPDATE;

-- name: create_signal(task_id, name, payload, idempotency_key)^
-- Unless that key has been used for this task already; then there is no row.
INSERT INTO signals (task_id, name, payload, idempotency_key)
VALUES (:task_id, :name, :payload, :idempotency_key)
ON CONFLICT (task_id, idempotency_key) DO NOTHING
RETURNING id;

-- name: deliver_signal(task_id, name)^
-- Give the oldest signal that nobody has received to the oldest wait, if there are both. The caller
-- holds the task's row. We do not wait for a child that somebody else holds: that is `wake_tasks`,
-- because the wait has timed out.
WITH wait AS (
    SELECT child.id
    FROM durable_events AS event
    JOIN tasks AS child ON child.id = event.child_task_id
    WHERE event.task_id = :task_id
      AND event.kind = 'SIGNAL_AWAITED'
      AND child.task_name = :name
      AND child.status = 'SLEEPING'
    ORDER BY event.event_id
    LIMIT 1
    FOR NO KEY UPDATE OF child SKIP LOCKED
), oldest AS (
    SELECT id, payload
    FROM signals
    WHERE task_id = :task_id
      AND name = :name
      AND received_by IS NULL
    ORDER BY id
    LIMIT 1
), received AS (
    UPDATE signals
    SET received_by = wait.id
    FROM wait, oldest
    WHERE signals.id = oldest.id
)
UPDATE tasks
SET status = 'COMPLETED',
    output = jsonb_build_object('payload', oldest.payload),
    finished_at = now()
FROM wait, oldest
WHERE tasks.id = wait.id
RETURNING tasks.id;

-- name: get_task(id)^
SELECT *
FROM tasks
WHERE id = :id;

-- name: get_tasks(queue)
SELECT *
FROM tasks
WHERE queue = :queue
ORDER BY id;

-- name: poll_tasks(queue, is_durable, task_names, limit, worker_id, inactive_after)
-- Claim the most urgent queued tasks that have one of these names, oldest first. SKIP LOCKED passes
-- over rows that another worker is claiming at this moment: two workers never wait for each other,
-- and never get the same task. NO KEY is the lock that an UPDATE takes, and keeps no one from
-- referring to the row. RETURNING promises no order, hence the last SELECT. A worker that the
-- others take for inactive gets nothing: they would take it away again at once.
WITH picked AS (
    SELECT id
    FROM tasks
    WHERE queue = :queue
      AND is_durable = :is_durable
      AND task_name = ANY (:task_names)
      AND status = 'QUEUED'
      AND (attempt > 0 OR schedule_timeout_at IS NULL OR schedule_timeout_at > now())
      AND EXISTS (
          SELECT
          FROM workers
          WHERE workers.id = :worker_id
            AND last_heartbeat_at BETWEEN now() - make_interval(secs => :inactive_after)
                AND now() + make_interval(secs => :inactive_after)
      )
    ORDER BY priority DESC, id
    LIMIT :limit
    FOR NO KEY UPDATE SKIP LOCKED
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

-- name: requeue_own_tasks(worker_id, is_durable, ids, attempts)
-- Put back what this worker owns and does not run: all but the (id, attempt) given.
WITH unknown AS (
    SELECT id
    FROM tasks
    WHERE worker_id = :worker_id
      AND is_durable = :is_durable
      AND status = 'RUNNING'
      AND (id, attempt) NOT IN (
          SELECT *
          FROM unnest(CAST(:ids AS BIGINT[]), CAST(:attempts AS INT[]))
      )
    ORDER BY id
    FOR NO KEY UPDATE SKIP LOCKED
)
UPDATE tasks
SET status = 'QUEUED',
    worker_id = NULL
FROM unknown
WHERE tasks.id = unknown.id
RETURNING tasks.*;

-- name: heartbeat(id, display_name, max_silence)^
-- Say that this worker is alive, and learn whether it was in touch: silent for no longer than
-- max_silence, and neither new nor taken for dead by the others, who delete its row. If somebody
-- holds the row locked there is no beat, and no row in the answer.
WITH previous AS (
    SELECT id, last_heartbeat_at
    FROM workers
    WHERE id = :id
    FOR NO KEY UPDATE SKIP LOCKED
), renewed AS (
    UPDATE workers
    SET last_heartbeat_at = now()
    FROM previous
    WHERE workers.id = previous.id
    RETURNING workers.last_heartbeat_at,
        previous.last_heartbeat_at BETWEEN now() - make_interval(secs => :max_silence)
            AND now() AS was_in_touch
), registered AS (
    INSERT INTO workers (id, display_name)
    SELECT :id, :display_name
    WHERE NOT EXISTS (SELECT FROM workers WHERE id = :id)
    ON CONFLICT DO NOTHING
    RETURNING last_heartbeat_at, false AS was_in_touch
)
SELECT *
FROM renewed
UNION ALL
SELECT *
FROM registered;

-- name: requeue_lost_tasks(our_beat, inactive_after, max_lost_workers, limit)
-- Take the running tasks of inactive workers away from them: `attempt` refuses what they still
-- write. Rows that somebody else is writing at this moment are left for the next time. A heartbeat
-- from the future is of no worth either: the clock was set back, and no beat has come since.
WITH lost AS (
    SELECT id, lost_count + 1 >= :max_lost_workers AS is_given_up
    FROM tasks
    WHERE status = 'RUNNING'
      AND (worker_id = ANY (ARRAY(
          SELECT id
          FROM workers
          WHERE last_heartbeat_at
              BETWEEN least(now(), :our_beat) - make_interval(secs => :inactive_after)
              AND greatest(now(), :our_beat) + make_interval(secs => :inactive_after)
      ))) IS NOT TRUE
    ORDER BY id
    LIMIT :limit
    FOR NO KEY UPDATE SKIP LOCKED
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

-- name: delete_inactive_workers(our_beat, inactive_after)!
WITH inactive AS (
    SELECT id
    FROM workers
    WHERE last_heartbeat_at
        NOT BETWEEN least(now(), :our_beat) - make_interval(secs => :inactive_after)
        AND greatest(now(), :our_beat) + make_interval(secs => :inactive_after)
    FOR UPDATE SKIP LOCKED
)
DELETE FROM workers
USING inactive
WHERE workers.id = inactive.id;

-- name: delete_worker(id)!
DELETE FROM workers
WHERE id = :id;

-- name: expire_tasks(limit)
-- Fail the tasks that nobody claimed in time.
WITH expired AS (
    SELECT id
    FROM tasks
    WHERE status = 'QUEUED'
      AND attempt = 0
      AND schedule_timeout_at <= now()
    ORDER BY id
    LIMIT :limit
    FOR NO KEY UPDATE SKIP LOCKED
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

-- name: listen()!
-- There is one channel. A channel is database-wide, and the payload says whom it is for.
LISTEN tasks;

-- name: get_topic(queue)^
-- A queue as the payload of a notification: short, whatever its name, and of this schema only.
SELECT md5(current_schema() || ' ' || CAST(:queue AS TEXT)) AS topic;

-- name: notify(queues, ids, worker_id)!
-- Tell the workers of these queues that there are tasks to claim, and the workers of the parents of
-- these tasks that they have ended; if that has woken a parent, tell the workers of its queue.
SELECT pg_notify('tasks', topic)
FROM (
    SELECT md5(current_schema() || ' ' || queue) AS topic
    FROM unnest(CAST(:queues AS TEXT[])) AS queue
    UNION
    SELECT CAST(parent.worker_id AS TEXT)
    FROM durable_events AS event
    JOIN tasks AS parent ON parent.id = event.task_id
    WHERE event.child_task_id = ANY (CAST(:ids AS BIGINT[]))
      AND parent.status = 'RUNNING'
      AND parent.worker_id IS DISTINCT FROM :worker_id
    UNION
    SELECT md5(current_schema() || ' ' || parent.queue)
    FROM durable_events AS event
    JOIN tasks AS parent ON parent.id = event.task_id
    WHERE event.child_task_id = ANY (CAST(:ids AS BIGINT[]))
      AND parent.status = 'QUEUED'
) AS topics;

-- name: wake_tasks(limit)
-- With their parents' rows, which the trigger may have to write: so it waits for nobody.
WITH due AS (
    SELECT sleeper.id
    FROM tasks AS sleeper
    JOIN durable_events AS event ON event.child_task_id = sleeper.id
    JOIN tasks AS parent ON parent.id = event.task_id
    WHERE sleeper.status = 'SLEEPING'
      AND sleeper.wake_at <= now()
    ORDER BY sleeper.wake_at
    LIMIT :limit
    FOR NO KEY UPDATE OF sleeper, parent SKIP LOCKED
)
UPDATE tasks
SET status = 'COMPLETED',
    finished_at = now()
FROM due
WHERE tasks.id = due.id
RETURNING tasks.*;

-- name: lock_task(id, worker_id, attempt)^
-- Hold the task's row until the end of the transaction, if this attempt still owns it.
SELECT id
FROM tasks
WHERE id = :id
  AND worker_id = :worker_id
  AND attempt = :attempt
  AND status = 'RUNNING'
FOR NO KEY UPDATE;

-- name: lock_task_to_suspend(id, worker_id, attempt)^
-- FOR UPDATE, which whoever finishes a child waits for.
SELECT id
FROM tasks
WHERE id = :id
  AND worker_id = :worker_id
  AND attempt = :attempt
  AND status = 'RUNNING'
FOR UPDATE;

-- name: suspend_task(id, ids)!
-- Unless one of those that it waits for has finished.
UPDATE tasks
SET status = 'SUSPENDED',
    worker_id = NULL,
    output = NULL
WHERE id = :id
  AND NOT EXISTS (
      SELECT
      FROM tasks AS child
      WHERE child.id = ANY (:ids)
        AND child.status IN ('COMPLETED', 'FAILED')
  );

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

-- name: get_finished_tasks(ids)
SELECT *
FROM tasks
WHERE id = ANY (:ids)
  AND status IN ('COMPLETED', 'FAILED');

-- name: lock_parent(id)^
-- The task whose log has this one as a child, if there is one.
SELECT parent.id, parent.status
FROM durable_events AS event
JOIN tasks AS parent ON parent.id = event.task_id
WHERE event.child_task_id = :id
FOR NO KEY UPDATE OF parent;

-- name: lock_finished_task(id)^
SELECT *
FROM tasks
WHERE id = :id
FOR NO KEY UPDATE;

-- name: lock_failed_child(id)^
-- The child whose failure ended this task: the one that its output names. It was handled if the log
-- has events that are younger than that failure.
SELECT child.id, child.task_name, EXISTS (
    SELECT
    FROM durable_events AS later
    WHERE later.task_id = parent.id
      AND later.inserted_at > coalesce(child.finished_at, event.inserted_at)
) AS was_handled
FROM tasks AS parent
JOIN durable_events AS event ON event.task_id = parent.id
JOIN tasks AS child ON child.id = event.child_task_id
WHERE parent.id = :id
  AND parent.output ->> 'child_task_id' = CAST(child.id AS TEXT)
  AND child.status = 'FAILED'
FOR NO KEY UPDATE OF child;

-- name: reset_tasks(ids)!
-- Queue finished tasks again, with all their retries. `attempt` goes on: it is the fencing token.
-- A sleep, which nobody would claim, goes on until its time.
UPDATE tasks
SET status = CASE WHEN wake_at IS NULL THEN 'QUEUED' ELSE 'SLEEPING' END::task_status,
    output = NULL,
    finished_at = NULL,
    schedule_timeout_at = NULL,
    worker_id = NULL,
    retry_count = 0,
    lost_count = 0
WHERE id = ANY (:ids);

-- name: wait_again(ids)^
-- If one of these, just reset, is a wait for a signal, it waits on. Nobody would claim it either.
UPDATE tasks
SET status = 'SLEEPING',
    output = '{"timed_out": true}'
FROM durable_events AS event
WHERE event.child_task_id = tasks.id
  AND event.kind = 'SIGNAL_AWAITED'
  AND tasks.id = ANY (:ids)
RETURNING event.task_id, tasks.task_name AS name;

-- name: lock_children(ids)
-- A child that somebody else holds is about to end, or to run. We do not wait for whoever holds it,
-- since they may be waiting for us; we treat the child as RUNNING.
WITH children AS (
    SELECT child_task_id AS id
    FROM durable_events
    WHERE task_id = ANY (:ids)
), locked AS (
    SELECT id, status
    FROM tasks
    WHERE id IN (SELECT id FROM children)
    ORDER BY id
    FOR NO KEY UPDATE SKIP LOCKED
)
SELECT tasks.id, tasks.task_name, coalesce(locked.status, 'RUNNING') AS status
FROM children
JOIN tasks USING (id)
LEFT JOIN locked USING (id)
ORDER BY id;

-- name: abandon_tasks(ids)!
UPDATE tasks
SET status = 'FAILED',
    output = jsonb_build_object('error', 'abandoned: its parent does not ask for it any more'),
    finished_at = now()
WHERE id = ANY (:ids)
  AND status IN ('QUEUED', 'SLEEPING', 'SUSPENDED');

-- name: delete_events(task_id)!
DELETE FROM durable_events
WHERE task_id = :task_id;

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

-- name: count_tasks(queue)
-- The demo: how many tasks of a queue have which name and status.
SELECT task_name, status, count(*) AS tasks
FROM tasks
WHERE queue = :queue
GROUP BY task_name, status
ORDER BY task_name, status;

-- name: end_sleeps(queue)!
-- The demo: days pass.
UPDATE tasks
SET wake_at = now()
WHERE queue = :queue
  AND status = 'SLEEPING';

-- name: get_signals(queue)
-- The demo: what was sent to the tasks of a queue, and which event of the log has received it.
SELECT signals.*, durable_events.event_id AS received_by_event
FROM signals
JOIN tasks ON tasks.id = signals.task_id
LEFT JOIN durable_events ON durable_events.child_task_id = signals.received_by
WHERE tasks.queue = :queue
ORDER BY signals.id;
