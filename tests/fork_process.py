"""A fork that is killed before one of its queries: python fork_process.py LESSON TASK_ID QUERY"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from shared import load_queries, open_pool, run


class Deadly:
    """Queries of which one is the end."""

    def __init__(self, queries: Any, deadly: str) -> None:
        self.queries = queries
        self.deadly = deadly

    def __getattr__(self, name: str) -> Any:
        if name == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return getattr(self.queries, name)


async def main() -> None:
    path, id, query = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    sys.path.insert(0, str(path))
    from rerun import fork_task  # type: ignore[import-not-found, unused-ignore]

    async with open_pool(path) as pool:
        await fork_task(pool, Deadly(load_queries(path), query), id, from_event=2)


if __name__ == "__main__":
    run(main())
