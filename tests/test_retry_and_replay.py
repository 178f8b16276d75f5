"""retry_task goes on where a durable task failed; replay_task runs it anew."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from psycopg.types.json import Jsonb

from durable_helpers import Lab
from helpers import (
    enqueue,
    execute,
    finished,
    get_task,
    set_globals,
    wait_for,
    wait_for_status,
    working,
)
from lesson_loader import LAST
from shared import Pool

# rerun.py is the same file in all of them.
pytestmark = [pytest.mark.since(7), pytest.mark.only(7, LAST)]


class ResetLab(Lab):
    functions: list[Any]  # of with_open_descendants
    slow: Any

    @property
    def way_out(self) -> str:
        """What a retry that is refused names."""
        return "replay_task" if self.lesson.number < 15 else "fork_task"

    async def retry(self, id: int) -> None:
        await self.lesson.rerun.retry_task(self.pool, self.queries, id)

    async def replay(self, id: int) -> None:
        await self.lesson.rerun.replay_task(self.pool, self.queries, id)

    def mend(self) -> None:
        """From now on the task `broken` works."""
        self.calls["mended"] = 1


@pytest.fixture
def lab(lesson: Any, pool: Pool, queries: Any) -> ResetLab:
    lab = ResetLab(lesson, pool, queries)
    # No attempt ends because the machine was busy.
    set_globals(lesson, {"INACTIVE_AFTER": 60.0, "SUSPEND_AFTER": 60.0})
    return lab


async def order(context: Any, input: Any) -> Any:
    charge = await context.run_task("step", "charge")
    return [charge, await context.run_task("broken", "email")]


async def test_a_retry_runs_the_failed_step_again_and_no_other(lab: ResetLab) -> None:
    failed = await lab.run(order)
    before = await lab.children(failed["id"])
    assert failed["status"] == "FAILED"

    lab.mend()
    await lab.retry(failed["id"])
    row = await lab.finish(failed["id"], order)
    assert row["output"] == ["charge", "email"]
    assert (row["attempt"], row["retry_count"]) == (2, 0)
    assert (lab.calls["charge"], lab.calls["email"]) == (1, 2)
    after = await lab.children(failed["id"])
    assert [child["id"] for child in after] == [child["id"] for child in before]
    assert [child["attempt"] for child in after] == [1, 2]


async def test_a_retry_that_fails_again_can_be_retried_again(lab: ResetLab) -> None:
    id = (await lab.run(order))["id"]
    for attempt in (2, 3):
        await lab.retry(id)
        row = await lab.finish(id, order)
        assert (row["status"], row["attempt"]) == ("FAILED", attempt)
    lab.mend()
    await lab.retry(id)
    assert (await lab.finish(id, order))["status"] == "COMPLETED"
    assert (lab.calls["charge"], lab.calls["email"]) == (1, 4)


async def nested(context: Any, input: int) -> Any:
    """A durable task in a durable task in a durable task, of which the innermost is broken."""
    before = await context.run_task("step", f"before {input}")
    if input:
        return [before, await context.run_task("nested", input - 1, is_durable=True)]
    return [before, await context.run_task("broken", "leaf")]


async def test_a_retry_goes_down_to_the_step_that_failed(lab: ResetLab) -> None:
    failed = await lab.run(nested, input=2)
    assert failed["status"] == "FAILED"

    lab.mend()
    await lab.retry(failed["id"])
    row = await lab.finish(failed["id"], nested)
    assert row["output"] == ["before 2", ["before 1", ["before 0", "leaf"]]]
    assert lab.calls == {"before 2": 1, "before 1": 1, "before 0": 1, "leaf": 2, "mended": 1}
    attempts = {task["id"]: task["attempt"] for task in await lab.tasks()}
    assert sorted(attempts.values()) == [1, 1, 1, 2, 2, 2, 2]


async def test_a_retry_does_not_run_again_what_was_handled(lab: ResetLab) -> None:
    async def parent(context: Any, input: Any) -> Any:
        try:
            await context.run_task("broken", "handled")
        except lab.errors.ChildTaskError:
            return await context.run_task("broken", "not handled")

    failed = await lab.run(parent)
    assert failed["status"] == "FAILED"
    lab.mend()
    await lab.retry(failed["id"])
    assert (await lab.finish(failed["id"], parent))["output"] == "not handled"
    assert (lab.calls["handled"], lab.calls["not handled"]) == (1, 2)


async def test_a_retry_mends_one_failure_of_a_group_at_a_time(lab: ResetLab) -> None:
    """Only the first is what ended the run; the others are history until it is their turn."""

    async def parent(context: Any, input: Any) -> Any:
        calls = [context.run_task("broken", n) for n in (1, 2)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        if errors := [result for result in results if isinstance(result, BaseException)]:
            raise BaseExceptionGroup("steps", errors)
        return results

    id = await lab.enqueue(parent)

    async def both_have_started() -> bool:
        return len(await lab.children(id)) == 2

    async with working(lab.worker(parent, concurrency=0)):
        await wait_for(both_have_started, "both have started before one of them fails")
        async with working(lab.worker(durable_concurrency=0)):
            await finished(lab.pool, id)
    lab.mend()
    children = [child["id"] for child in await lab.children(id)]
    await lab.retry(id)
    row = await lab.finish(id, parent)
    assert (row["status"], row["output"]["child_task_id"]) == ("FAILED", children[1])
    assert (lab.calls["1"], lab.calls["2"]) == (2, 1)
    await lab.retry(id)
    assert (await lab.finish(id, parent))["output"] == [1, 2]
    assert (lab.calls["1"], lab.calls["2"]) == (2, 2)


async def test_a_retry_after_a_failure_of_the_functions_own(lab: ResetLab) -> None:
    async def parent(context: Any, input: Any) -> Any:
        result = await context.run_task("step", 1)
        if not lab.calls["mended"]:
            raise OSError("no luck")
        return result

    id = (await lab.run(parent, max_retries=1))["id"]
    lab.mend()
    await lab.retry(id)
    assert (await lab.finish(id, parent))["output"] == 1
    assert lab.calls["1"] == 1


async def test_a_retry_after_non_determinism_needs_the_old_function(lab: ResetLab) -> None:
    async def parent(context: Any, input: Any) -> Any:
        result = await context.run_task("step", 2 if context.attempt == 2 else 1)
        if context.attempt == 1:
            raise OSError("again")
        return result

    failed = await lab.run(parent, max_retries=1)
    assert "NonDeterminismError" in failed["output"]["error"]
    await lab.retry(failed["id"])
    assert (await lab.finish(failed["id"], parent))["output"] == 1
    assert lab.calls == {"1": 1}


async def fails(context: Any, input: Any) -> None:
    await context.run_task("broken", "leaf")


async def compensates(context: Any, input: Any) -> None:
    """Does something about the failure of its child, which is then its own."""
    try:
        await context.run_task(input[0], input[1:], is_durable=input[0] != "broken")
    except Exception:
        await context.run_task("step", "refund")
        raise


async def passes_on(context: Any, input: Any) -> None:
    await context.run_task(input[0], input[1:], is_durable=True)


@pytest.mark.parametrize(
    "path",
    [
        "compensates broken",
        "compensates fails",
        "passes_on compensates broken",
        "passes_on passes_on compensates fails",
    ],
)
async def test_a_retry_is_refused_if_the_function_went_on_from_the_failure_at_any_level(
    lab: ResetLab, path: str
) -> None:
    """The step would be done and its refund would stay: what follows would contradict the log."""
    functions = [fails, compensates, passes_on]
    name, *input = path.split()
    id = await enqueue(lab.pool, name, input, is_durable=True)
    failed = await lab.finish(id, *functions)
    assert (failed["status"], lab.calls["refund"]) == ("FAILED", 1)

    lab.mend()
    before = await lab.tasks()
    with pytest.raises(ValueError, match=lab.way_out):
        await lab.retry(id)
    assert await lab.tasks() == before, "it has changed something all the same"
    await lab.replay(id)
    assert (await lab.finish(id, *functions))["status"] == "COMPLETED"
    assert lab.calls["refund"] == 1


async def test_a_refused_retry_names_the_task_that_went_on_and_its_child(lab: ResetLab) -> None:
    id = await lab.enqueue(passes_on, ["compensates", "broken"])
    await lab.finish(id, passes_on, compensates)
    (inner,) = await lab.children(id)
    leaf, _ = await lab.children(inner["id"])
    with pytest.raises(ValueError, match=rf"task {inner['id']} .*child {leaf['id']} \(broken\)"):
        await lab.retry(id)


async def test_a_compensation_is_seen_although_the_child_was_ended_by_hand(lab: ResetLab) -> None:
    """Then it may lack the time of its end."""
    id = await enqueue(lab.pool, "compensates", ["fails"], is_durable=True)
    async with working(lab.worker(compensates)):
        (child,) = await wait_for(lambda: lab.children(id), "the child is recorded")
        await execute(lab.pool, "UPDATE tasks SET status = 'FAILED' WHERE id = %s", child["id"])
        assert (await finished(lab.pool, id))["status"] == "FAILED"
    with pytest.raises(ValueError, match=lab.way_out):
        await lab.retry(id)


async def test_a_branch_that_went_on_meanwhile_makes_a_retry_refuse_too(lab: ResetLab) -> None:
    """The log does not tell it from a compensation."""
    failed: list[BaseException] = []

    async def first(context: Any) -> None:
        try:
            await context.run_task("broken", "email")
        except Exception as error:
            failed.append(error)
            raise

    async def second(context: Any) -> None:
        await wait_for(lambda: failed, "the other branch has failed")
        await context.run_task("step", "print")

    async def parent(context: Any, input: Any) -> None:
        await asyncio.gather(first(context), second(context), return_exceptions=True)
        raise failed[-1]

    id = (await lab.run(parent))["id"]
    with pytest.raises(ValueError, match=lab.way_out):
        await lab.retry(id)


class Delays:
    """A lesson's queries, whose first answer that names a child is long on its way."""

    def __init__(self, queries: Any) -> None:
        self.queries = queries
        self.is_on_its_way = False
        self.may_arrive = asyncio.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.queries, name)

    async def get_finished_tasks(self, conn: Any, **values: Any) -> AsyncIterator[Any]:
        rows = [row async for row in self.queries.get_finished_tasks(conn, **values)]
        if rows:
            self.is_on_its_way = True
            await self.may_arrive.wait()
        for row in rows:
            yield row


async def test_an_answer_from_before_the_retry_does_not_wake_the_next_attempt(
    lab: ResetLab,
) -> None:
    """A worker that asked then and reads the answer now would see the old failure once more."""
    delays = lab.queries = Delays(lab.queries)
    parents = lab.worker(order, concurrency=0)
    waits: list[int] = []
    wait_for_child = parents.children.wait_for

    async def counting(child: Any) -> Any:
        waits.append(child.id)
        return await wait_for_child(child)

    parents.children.wait_for = counting
    id = await lab.enqueue(order)
    async with working(parents):
        await wait_for(lambda: len(waits) == 1, "it waits for the charge")
        charge = waits[0]
        # By hand, since nobody else is to notice that this attempt is over.
        fail = "UPDATE tasks SET status = 'FAILED', finished_at = now(), output = %s WHERE id = %s"
        await execute(lab.pool, fail, Jsonb({"error": "no luck"}), charge)
        await wait_for(lambda: delays.is_on_its_way, "the answer is on its way")
        await execute(lab.pool, fail, Jsonb({"error": "so", "child_task_id": charge}), id)
        await lab.retry(id)
        await wait_for(lambda: waits == [charge, charge], "the next attempt waits for it as well")
        delays.may_arrive.set()
        lab.mend()
        async with working(lab.worker(durable_concurrency=0)):
            row = await finished(lab.pool, id)
    assert (row["status"], row["attempt"]) == ("COMPLETED", 2), row["output"]


@pytest.mark.parametrize("action", ["retry", "replay"])
async def test_a_reset_task_is_queued_as_new_but_for_its_attempt(
    lab: ResetLab, action: str
) -> None:
    id = (await lab.run(order, max_retries=1))["id"]
    counts = ["retry_count", "lost_count"] if lab.lesson.number >= 10 else ["retry_count"]
    used = "".join(f"{count} = 1, " for count in counts)
    await execute(lab.pool, f"UPDATE tasks SET {used} attempt = attempt + 10")
    events = await lab.children(id)
    await getattr(lab, action)(id)

    row = await get_task(lab.pool, id)
    assert (row["status"], row["attempt"], row["max_retries"]) == ("QUEUED", 11, 1)
    assert [row[count] for count in counts] == [0] * len(counts)
    for column in ("output", "finished_at", "worker_id"):
        assert row[column] is None
    if action == "retry":
        charge, email = await lab.children(id)
        assert charge == events[0]
        assert (email["status"], email["attempt"]) == ("QUEUED", 11)
        assert [email[count] for count in counts] == [0] * len(counts)
    else:
        assert await lab.children(id) == []
        old = [await get_task(lab.pool, child["id"]) for child in events]
        assert [task["status"] for task in old] == ["COMPLETED", "FAILED"]


@pytest.mark.parametrize("works_at_first", [True, False], ids=["COMPLETED", "FAILED"])
async def test_a_replay_runs_everything_anew(lab: ResetLab, works_at_first: bool) -> None:
    if works_at_first:
        lab.mend()
    first = await lab.run(order)
    before = await lab.children(first["id"])

    lab.mend()
    await lab.replay(first["id"])
    row = await lab.finish(first["id"], order)
    assert row["output"] == ["charge", "email"]
    assert row["attempt"] == 2
    assert (lab.calls["charge"], lab.calls["email"]) == (2, 2)
    after = await lab.children(first["id"])
    assert {child["id"] for child in before}.isdisjoint(child["id"] for child in after)
    assert [child["event_id"] for child in after] == [1, 2]


async def test_a_replay_may_do_something_else(lab: ResetLab) -> None:
    """Its log is gone, or has been left, so there is nothing to differ from."""

    async def parent(context: Any, input: Any) -> Any:
        steps = 3 if context.attempt == 1 else 1
        return [await context.run_task("step", [context.attempt, n]) for n in range(steps)]

    id = (await lab.run(parent))["id"]
    await lab.replay(id)
    assert (await lab.finish(id, parent))["output"] == [[2, 0]]


REFUSED = [("retry", status) for status in ("QUEUED", "RUNNING", "COMPLETED")] + [
    ("replay", status) for status in ("QUEUED", "RUNNING")
]


@pytest.mark.parametrize(("action", "status"), REFUSED)
async def test_a_task_that_has_not_ended_so_is_refused(
    lab: ResetLab, action: str, status: str
) -> None:
    id = await lab.enqueue(order, status=status)
    row = await get_task(lab.pool, id)
    with pytest.raises(ValueError, match=f"{id}.*{status}"):
        await getattr(lab, action)(id)
    assert await get_task(lab.pool, id) == row


@pytest.mark.parametrize("action", ["retry", "replay"])
async def test_a_plain_or_unknown_task_is_refused(lab: ResetLab, action: str) -> None:
    id = await enqueue(lab.pool, "step", status="FAILED")
    with pytest.raises(ValueError, match=f"{id}.*not durable"):
        await getattr(lab, action)(id)
    with pytest.raises(ValueError, match="no task 4711"):
        await getattr(lab, action)(4711)
    assert (await get_task(lab.pool, id))["status"] == "FAILED"


@pytest.mark.parametrize("actions", [("retry", "retry"), ("replay", "replay"), ("retry", "replay")])
async def test_of_two_at_the_same_time_one_is_refused(
    lab: ResetLab, actions: tuple[str, str]
) -> None:
    id = (await lab.run(nested, input=1))["id"]
    lab.mend()
    outcomes = await asyncio.gather(
        *(getattr(lab, action)(id) for action in actions * 4), return_exceptions=True
    )
    assert outcomes.count(None) == 1
    assert sum(isinstance(outcome, ValueError) for outcome in outcomes) == 7
    row = await lab.finish(id, nested)
    assert (row["status"], row["attempt"]) == ("COMPLETED", 2)
    assert lab.calls["leaf"] == 2


@pytest.mark.parametrize("action", ["retry", "replay"])
@pytest.mark.parametrize("status", ["QUEUED", "RUNNING"])
async def test_a_child_is_left_alone_while_its_parent_is_at_work(
    lab: ResetLab, action: str, status: str
) -> None:
    """The parent may have handled the failure, and its next attempt would see another outcome."""

    async def parent(context: Any, input: Any) -> Any:
        try:
            await context.run_task("fails", None, is_durable=True)
        except lab.errors.ChildTaskError:
            return "handled"

    id = (await lab.run(parent, fails))["id"]
    (child,) = await lab.children(id)
    lab.mend()
    await execute(lab.pool, "UPDATE tasks SET status = %s WHERE id = %s", status, id)
    before = await lab.tasks()
    with pytest.raises(ValueError, match=rf"task {child['id']} .* task {id}.*{status}"):
        await getattr(lab, action)(child["id"])
    assert await lab.tasks() == before

    await execute(lab.pool, "UPDATE tasks SET status = 'COMPLETED' WHERE id = %s", id)
    await getattr(lab, action)(child["id"])
    assert (await lab.finish(child["id"], fails))["status"] == "COMPLETED"
    assert (await get_task(lab.pool, id))["output"] == "handled"


async def test_a_child_may_be_mended_before_its_parent(lab: ResetLab) -> None:
    id = await lab.enqueue(passes_on, ["fails"])
    assert (await lab.finish(id, passes_on, fails))["status"] == "FAILED"
    (child,) = await lab.children(id)
    lab.mend()
    await lab.retry(child["id"])
    assert (await lab.finish(child["id"], fails))["status"] == "COMPLETED"
    await lab.retry(id)
    assert (await lab.finish(id, passes_on))["status"] == "COMPLETED"
    assert lab.calls["leaf"] == 2


async def with_open_descendants(lab: ResetLab) -> tuple[int, int, int]:
    """A durable task that has FAILED while its child and its grandchild are queued."""

    async def gives_up(context: Any, input: Any) -> None:
        calls = [context.run_task("child", None, is_durable=True), context.run_task("step", "ends")]
        tasks = [asyncio.ensure_future(call) for call in calls]
        await wait_for(lambda: lab.calls["child"] and lab.calls["ends"], "both have started")
        if context.attempt == 1:
            raise OSError("no luck")
        await asyncio.gather(*tasks)

    async def child(context: Any, input: Any) -> None:
        lab.calls["child"] += 1
        await context.run_task("slow", None)

    async def slow(input: Any) -> None:
        lab.calls["slow"] += 1

    lab.functions = [gives_up, child]
    lab.slow = slow
    id = await lab.enqueue(gives_up)
    async with working(lab.worker(*lab.functions)):  # which does not know `slow`
        await wait_for_status(lab.pool, id, "FAILED")
        below, step = await lab.children(id)
        await wait_for_status(lab.pool, step["id"], "COMPLETED")

        async def grandchildren() -> list[dict[str, Any]]:
            return await lab.children(below["id"])

        (leaf,) = await wait_for(grandchildren, "the grandchild is there")
    # What others do with what a worker leaves behind.
    await execute(
        lab.pool, "UPDATE tasks SET status = 'QUEUED', worker_id = NULL WHERE status = 'RUNNING'"
    )
    return id, below["id"], leaf["id"]


@pytest.mark.parametrize("status", ["QUEUED", "COMPLETED"])
async def test_a_replay_abandons_what_is_left_to_do_of_the_run_before(
    lab: ResetLab, status: str
) -> None:
    """Two levels deep, whatever became of the one between: or its effects would come on top."""
    id, child, leaf = await with_open_descendants(lab)
    await execute(lab.pool, "UPDATE tasks SET status = %s WHERE id = %s", status, child)
    await lab.replay(id)
    abandoned = [child, leaf] if status == "QUEUED" else [leaf]
    for row in await lab.tasks():
        is_abandoned = row["status"] == "FAILED" and row["output"]["error"].startswith(
            "abandoned: "
        )
        assert is_abandoned == (row["id"] in abandoned)
        assert row["finished_at"] is not None or not is_abandoned
    row = await lab.finish(id, *lab.functions, lab.slow)
    assert (row["status"], row["attempt"]) == ("COMPLETED", 2)
    assert lab.calls["slow"] == 1


@pytest.mark.parametrize("runs", [1, 2], ids=["child", "grandchild"])
async def test_a_replay_is_refused_while_something_of_the_run_before_runs(
    lab: ResetLab, runs: int
) -> None:
    ids = await with_open_descendants(lab)
    await execute(lab.pool, "UPDATE tasks SET status = 'RUNNING' WHERE id = %s", ids[runs])
    before = await lab.tasks()
    name = ["", "child", "slow"][runs]
    with pytest.raises(ValueError, match=rf"task {ids[0]} .*task {ids[runs]} \({name}\).*RUNNING"):
        await lab.replay(ids[0])
    assert await lab.tasks() == before, "it has changed something all the same"
    assert len(await lab.children(ids[0])) == 2
