-- Lesson 01: a table to see that everything works.

CREATE TABLE greetings (
    id BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    inserted_at TIMESTAMPTZ NOT NULL DEFAULT now(),
    message JSONB NOT NULL
);
