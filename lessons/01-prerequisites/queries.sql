-- name: get_postgres_version()^
SELECT current_setting('server_version') AS version;

-- name: create_greeting(message)^
INSERT INTO greetings (message)
VALUES (:message)
RETURNING *;

-- name: get_greeting(id)^
SELECT *
FROM greetings
WHERE id = :id;

-- name: get_greetings(sender)
SELECT *
FROM greetings
WHERE message ->> 'from' = :sender
ORDER BY id;
