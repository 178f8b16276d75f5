"""One process each: a worker of this course, or of another engine, that does what is queued."""
