"""What every lesson needs and no lesson teaches."""

from shared.database import (
    Connection,
    Pool,
    Queries,
    database_url,
    load_queries,
    open_connection,
    open_pool,
)
from shared.embedded import EmbeddedPostgres
from shared.errors import error_parts, error_text
from shared.jsonb import UnreadableJson
from shared.outages import is_away, keep_trying, surviving_outage
from shared.runtime import run, stop_signals

__all__ = [
    "Connection",
    "EmbeddedPostgres",
    "Pool",
    "Queries",
    "UnreadableJson",
    "database_url",
    "error_parts",
    "error_text",
    "is_away",
    "keep_trying",
    "load_queries",
    "open_connection",
    "open_pool",
    "run",
    "stop_signals",
    "surviving_outage",
]
