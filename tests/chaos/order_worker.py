"""A worker that processes orders: python order_worker.py LESSON_DIRECTORY QUEUE SETTINGS

SETTINGS is a JSON object: arguments of Worker in lower case, globals of the lesson's modules in
upper case.
"""

import asyncio
import json
import random
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

from shared import keep_trying, load_queries, open_pool, run
from worker_process import set_globals

SLOWEST_STEP = 0.3  # seconds; time for a fault to come between an effect and its record
LONGEST_SLEEP = 1.0


async def process_order(context: Any, input: Any) -> Any:
    """The durable task. It returns its attempt, and what its children have returned."""
    charge = await context.run_task("charge_payment", input)
    # From lesson 12 on it sleeps; what a sleep returns is a part of the output, too.
    naps = []
    if hasattr(context, "sleep"):
        naps = [await context.sleep(timedelta(seconds=random.uniform(0, LONGEST_SLEEP)))]
    # From lesson 14 on it waits for an approval.
    approvals = []
    if hasattr(context, "wait_for_signal"):
        approvals = [await context.wait_for_signal("approval")]
    email = await context.run_task("send_email", input)
    stock, label = await asyncio.gather(
        context.run_task("reserve_stock", input), context.run_task("print_label", input)
    )
    parcel = await context.run_task("ship", input, is_durable=True)
    return [context.attempt, charge, *naps, *approvals, email, stock, label, parcel]


async def ship(context: Any, input: Any) -> Any:
    """A durable step."""
    return [context.attempt, await context.run_task("hand_over", input)]


class Shop:
    """The plain steps. Each returns attempt and id of its task, as a signature."""

    def __init__(self, pool: Any, queries: Any, current_task: Any) -> None:
        self.pool = pool
        self.queries = queries
        self.current_task = current_task

    async def step(self, input: Any) -> Any:
        await asyncio.sleep(random.uniform(0, SLOWEST_STEP))
        task = self.current_task.get()
        return [task.attempt, task.id]

    async def charge_payment(self, input: Any) -> Any:
        key = self.current_task.get().id

        async def charge() -> Any:
            async with self.pool.connection() as conn:
                return await self.queries.create_payment(conn, idempotency_key=key, **input)

        # An error of the function's own statement would be the task's failure, and cost a retry.
        if not await keep_trying(charge):
            print(f"task {key}: charged before", flush=True)
        return await self.step(input)


async def main() -> None:
    path, queue, settings = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    sys.path.insert(0, str(path))
    import worker as lesson_worker  # type: ignore[import-not-found, unused-ignore]

    set_globals(path, settings)
    arguments = {name: value for name, value in settings.items() if not name.isupper()}
    queries = load_queries(path)
    async with open_pool(path) as pool:
        shop = Shop(pool, queries, lesson_worker.current_task)
        worker = lesson_worker.Worker(pool, queries, **arguments)
        worker.register("process_order", process_order)
        worker.register("ship", ship)
        worker.register("charge_payment", shop.charge_payment)
        for name in ["send_email", "reserve_stock", "print_label", "hand_over"]:
            worker.register(name, shop.step)
        # Not before it has begun: from then on a signal is for the worker, and no longer for `run`,
        # and it must survive whatever happens to the database.
        start = asyncio.create_task(worker.start(queue))
        await asyncio.sleep(0)
        print("ready", flush=True)
        await start


if __name__ == "__main__":
    run(main())
