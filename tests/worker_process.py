"""A worker in a process of its own: python worker_process.py LESSON_DIRECTORY QUEUE SETTINGS

SETTINGS is a JSON object: `concurrency` and other arguments of Worker in lower case, globals of the
lesson's modules in upper case.
"""

import asyncio
import inspect
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from shared import load_queries, open_pool, run


def note(path: str, word: str) -> None:
    """Leave a line in a file for the test: who did what."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(f"{os.getpid()} {word}\n")


async def sleep(input: Any) -> Any:
    """input: seconds to sleep, and a file to note the start and the end in."""
    note(input["file"], "starts")
    await asyncio.sleep(input["seconds"])
    note(input["file"], "ends")
    return os.getpid()


async def stubborn(input: Any) -> Any:
    """Ignores every cancellation."""
    note(input["file"], "starts")
    deadline = time.monotonic() + input["seconds"]
    while time.monotonic() < deadline:
        try:
            await asyncio.sleep(deadline - time.monotonic())
        except asyncio.CancelledError:
            note(input["file"], "ignores")
    return os.getpid()


FUNCTIONS = [sleep, stubborn]


def set_globals(lesson: Path, settings: dict[str, Any]) -> None:
    """Set constants in whichever of the lesson's modules, all of them loaded, has them."""
    for module in list(sys.modules.values()):
        if Path(getattr(module, "__file__", None) or "").parent == lesson:
            for name, value in settings.items():
                if name.isupper() and hasattr(module, name):
                    setattr(module, name, value)


async def main() -> None:
    path, queue, settings = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    sys.path.insert(0, str(path))
    import worker as lesson_worker  # type: ignore[import-not-found, unused-ignore]

    set_globals(path, settings)
    arguments = {name: value for name, value in settings.items() if not name.isupper()}
    async with open_pool(path) as pool:
        worker = lesson_worker.Worker(pool, load_queries(path), **arguments)
        for function in FUNCTIONS:
            assert inspect.iscoroutinefunction(function)
            worker.register(function.__name__, function)
        await worker.start(queue)


if __name__ == "__main__":
    run(main())
