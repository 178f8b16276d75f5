"""Runs a task again, or sends it a signal, with the lesson's own code:

python -m shared.lab.act LESSON ACTION < JSON

In a process of its own, so that the code is always the one that is on the disk. It prints when that
was, as time.time() has it.
"""

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import psycopg

from shared import load_queries, open_pool, run
from shared.outages import one_line


async def act(path: Path, action: str, arguments: dict[str, Any]) -> None:
    """Call the lesson's function. Raises SystemExit with its objection."""
    sys.path.insert(0, str(path))
    queries = load_queries(path)
    async with open_pool(path) as pool:
        print(time.time())  # what comes of it comes later
        try:
            if action == "signal":
                signals: Any = importlib.import_module("signals")
                async with pool.connection() as conn:
                    await signals.send_signal(conn, queries, **arguments)
            else:
                rerun: Any = importlib.import_module("rerun")
                await getattr(rerun, f"{action}_task")(pool, queries, **arguments)
        except (ValueError, psycopg.DataError) as error:
            raise SystemExit(one_line(error)) from None


if __name__ == "__main__":
    run(act(Path(sys.argv[1]), sys.argv[2], json.load(sys.stdin)))
