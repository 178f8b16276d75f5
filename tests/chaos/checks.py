"""What must be true when all orders are processed: each query returns rows that are wrong.

What a lesson does not have yet is not there in its rows as JSON either. A log is the events of its
current branch.
"""

# What the function got from a step or a sleep, or from a wait for a signal.
RESULT = "coalesce(child.output -> 'payload', child.output)"
LOG = "(SELECT * FROM durable_events AS e WHERE to_jsonb(e) ->> 'abandoned_in' IS NULL)"

CHECKS = {
    "a task that has not COMPLETED": """
        SELECT *
        FROM tasks
        WHERE status <> 'COMPLETED'
    """,
    "an order that is there twice": """
        SELECT input, array_agg(id) AS ids
        FROM tasks
        WHERE task_name = 'process_order'
        GROUP BY input
        HAVING count(*) > 1
    """,
    "a fault that cost a task a retry": """
        SELECT *
        FROM tasks
        WHERE retry_count <> 0
    """,
    "an attempt that was never claimed": """
        SELECT *
        FROM tasks
        WHERE task_name NOT IN ('sleep', 'approval')
          AND attempt < 1 + retry_count + coalesce((to_jsonb(tasks) ->> 'lost_count')::INT, 0)
    """,
    "an event without child": """
        SELECT *
        FROM durable_events
        WHERE child_task_id NOT IN (SELECT id FROM tasks)
    """,
    "a child without event": """
        SELECT *
        FROM tasks
        WHERE task_name <> 'process_order'
          AND id NOT IN (SELECT child_task_id FROM durable_events)
    """,
    "a log with a gap": f"""
        SELECT task_id, array_agg(event_id ORDER BY event_id) AS event_ids
        FROM {LOG} AS log
        GROUP BY task_id
        HAVING min(event_id) <> 1 OR max(event_id) <> count(*)
    """,
    "a log that lacks a step, or has one too many": f"""
        SELECT parent.id, parent.task_name,
               array_agg(child.task_name ORDER BY event_id) AS steps
        FROM tasks AS parent
        LEFT JOIN {LOG} AS event ON event.task_id = parent.id
        LEFT JOIN tasks AS child ON child.id = event.child_task_id
        WHERE parent.is_durable
        GROUP BY parent.id
        HAVING array_agg(child.task_name ORDER BY event_id) <> CASE parent.task_name
            WHEN 'ship' THEN '{{hand_over}}'::TEXT[]
            ELSE '{{charge_payment}}'::TEXT[]
                || CASE WHEN to_jsonb(parent) ? 'wake_at' THEN '{{sleep}}'::TEXT[] END
                || CASE WHEN to_regclass('signals') IS NOT NULL THEN '{{approval}}'::TEXT[] END
                || '{{send_email,reserve_stock,print_label,ship}}'::TEXT[]
        END
    """,
    "a step whose output is that of another task, or of an attempt that had lost it": """
        SELECT *
        FROM tasks
        WHERE NOT is_durable
          AND task_name NOT IN ('sleep', 'approval')
          AND output <> jsonb_build_array(attempt, id)
    """,
    "a durable task whose output is not that of its last attempt and its children": f"""
        SELECT parent.id, parent.attempt, parent.output,
               jsonb_agg({RESULT} ORDER BY event_id) AS outputs
        FROM tasks AS parent
        JOIN {LOG} AS event ON event.task_id = parent.id
        JOIN tasks AS child ON child.id = event.child_task_id
        GROUP BY parent.id
        HAVING parent.output <> jsonb_build_array(parent.attempt)
            || jsonb_agg({RESULT} ORDER BY event_id)
    """,
    "a sleep that was too short, or was run by a worker": """
        SELECT *
        FROM tasks
        WHERE task_name = 'sleep'
          AND (attempt > 0 OR finished_at < (to_jsonb(tasks) ->> 'wake_at')::TIMESTAMPTZ)
    """,
    "a charge without payment, or a payment without charge": """
        SELECT id, input, payments.*
        FROM (SELECT * FROM tasks WHERE task_name = 'charge_payment') AS charges
        FULL JOIN payments ON idempotency_key = id AND order_id = input ->> 'order_id'
        WHERE id IS NULL OR idempotency_key IS NULL
    """,
}

BRANCH_CHECKS = {
    "a branch that is not there, or one too many": """
        SELECT tasks.id, tasks.branch_id, array_agg(left_branch.branch_id) AS left_branches
        FROM tasks
        LEFT JOIN task_branches AS left_branch ON left_branch.task_id = tasks.id
        GROUP BY tasks.id
        HAVING count(left_branch) <> tasks.branch_id - 1
    """,
    "a branch whose output is not that of its steps": f"""
        SELECT task_id, branch.branch_id, branch.status, branch.output,
               jsonb_agg({RESULT} ORDER BY event_id) AS outputs
        FROM task_branches AS branch
        JOIN durable_events AS event USING (task_id)
        JOIN tasks AS child ON child.id = event.child_task_id
        WHERE event.branch_id <= branch.branch_id
          AND (abandoned_in IS NULL OR abandoned_in > branch.branch_id)
        GROUP BY task_id, branch.branch_id
        HAVING branch.status <> 'COMPLETED'
            OR branch.output - 0 <> jsonb_agg({RESULT} ORDER BY event_id)
    """,
}

FIGURES = """
    SELECT count(*) FILTER (WHERE task_name = 'process_order') AS orders,
           (SELECT count(*) FROM payments) AS charges,
           count(*) AS tasks,
           sum((to_jsonb(tasks) ->> 'lost_count')::INT) AS lost_count,
           sum((to_jsonb(tasks) ->> 'branch_id')::INT - 1) AS forks,
           sum(attempt) AS attempts
    FROM tasks
"""
