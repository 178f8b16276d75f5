"""worker_process.py that is killed when it wants to tell others what it has just committed."""

import os
import signal
import sys
from typing import Any

import worker_process
from shared import run


async def echo(input: Any) -> Any:
    return input


async def die(notifications: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    import notifications  # type: ignore[import-not-found, unused-ignore]

    class_: Any = notifications.Notifications
    class_.tell = die
    worker_process.FUNCTIONS[:] = [echo]
    run(worker_process.main())
