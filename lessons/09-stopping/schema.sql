-- One table is the queue.

CREATE TYPE task_status AS ENUM ('QUEUED', 'RUNNING', 'COMPLETED', 'FAILED');

CREATE TABLE tasks (
    id BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    inserted_at TIMESTAMPTZ NOT NULL DEFAULT now(),
    queue TEXT NOT NULL,
    task_name TEXT NOT NULL,
    input JSONB NOT NULL,
    output JSONB,
    status task_status NOT NULL DEFAULT 'QUEUED',
    finished_at TIMESTAMPTZ,
    retry_count INT NOT NULL DEFAULT 0,
    max_retries INT NOT NULL DEFAULT 0,
    timeout INTERVAL,
    schedule_timeout_at TIMESTAMPTZ,
    priority INT NOT NULL DEFAULT 1,
    worker_id UUID,
    attempt INT NOT NULL DEFAULT 0,
    is_durable BOOLEAN NOT NULL DEFAULT false
);

-- The claim reads this index. It is partial: a finished task has no entry in it, once VACUUM
-- has been by, so a million finished tasks cost the claim nothing.
CREATE INDEX tasks_queued ON tasks (queue, is_durable, priority DESC, id)
WHERE status = 'QUEUED';

-- For searches among the running tasks, by their worker.
CREATE INDEX tasks_running ON tasks (worker_id, id)
WHERE status = 'RUNNING';

-- For those who look for tasks that nobody claimed in time.
CREATE INDEX tasks_expiring ON tasks (schedule_timeout_at)
WHERE status = 'QUEUED' AND attempt = 0 AND schedule_timeout_at IS NOT NULL;

-- Who is alive. A worker is inactive if its row is missing or its heartbeat is old.
CREATE TABLE workers (
    id UUID PRIMARY KEY,
    display_name TEXT NOT NULL,
    last_heartbeat_at TIMESTAMPTZ NOT NULL DEFAULT now()
);

CREATE TYPE durable_event_kind AS ENUM ('TASK_STARTED');

-- The event log: what a task has done so far, in order, whatever the attempt.
CREATE TABLE durable_events (
    task_id BIGINT NOT NULL REFERENCES tasks ON DELETE CASCADE,
    event_id BIGINT NOT NULL CHECK (event_id > 0),
    kind durable_event_kind NOT NULL,
    inserted_at TIMESTAMPTZ NOT NULL DEFAULT now(),
    key TEXT NOT NULL,
    -- Deferrable, so that one DELETE can remove finished tasks with their children and logs.
    child_task_id BIGINT NOT NULL UNIQUE REFERENCES tasks DEFERRABLE INITIALLY DEFERRED,
    PRIMARY KEY (task_id, event_id)
);

-- The demo's payment service: who was charged, once for each key, however often it is asked.
CREATE TABLE payments (
    idempotency_key BIGINT PRIMARY KEY,
    order_id TEXT NOT NULL,
    amount NUMERIC NOT NULL,
    inserted_at TIMESTAMPTZ NOT NULL DEFAULT now()
);
