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
    finished_at TIMESTAMPTZ
);

-- The claim reads this index. It is partial: a finished task has no entry in it, once VACUUM
-- has been by, so a million finished tasks cost the claim nothing.
CREATE INDEX tasks_queued ON tasks (queue, id)
WHERE status = 'QUEUED';
