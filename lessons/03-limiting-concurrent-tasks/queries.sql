-- name: create_task(queue, task_name, input)^
-- Enqueue one task.
INSERT INTO tasks (queue, task_name, input)
VALUES (:queue, :task_name, :input)
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

-- name: poll_tasks(queue, task_names, limit)
-- Claim the oldest queued tasks that have one of these names. SKIP LOCKED passes over rows that
-- another worker is claiming at this moment: two workers never wait for each other, and never get
-- the same task. NO KEY is the lock that an UPDATE takes, and keeps no one from referring to the
-- row.
WITH picked AS (
    SELECT id
    FROM tasks
    WHERE queue = :queue
      AND task_name = ANY (:task_names)
      AND status = 'QUEUED'
    ORDER BY id
    LIMIT :limit
    FOR NO KEY UPDATE SKIP LOCKED
)
UPDATE tasks
SET status = 'RUNNING'
FROM picked
WHERE tasks.id = picked.id
RETURNING tasks.*;

-- name: complete_task(id, output)!
UPDATE tasks
SET status = 'COMPLETED',
    output = :output,
    finished_at = now()
WHERE id = :id
  AND status = 'RUNNING';

-- name: fail_task(id, output)!
UPDATE tasks
SET status = 'FAILED',
    output = :output,
    finished_at = now()
WHERE id = :id
  AND status = 'RUNNING';
