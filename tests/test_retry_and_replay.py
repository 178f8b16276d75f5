"""retry_task goes on where a durable task failed; replay_task runs it anew."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from durable_helpers import Lab
from helpers import enqueue, execute, finished, get_task, wait_for, working
from shared import Pool

pytestmark = pytest.mark.since(7)


class ResetLab(Lab):
    async def retry(self, id: int) -> None:
        await self.lesson.durable_context.retry_task(self.pool, self.queries, id)

    async def replay(self, id: int) -> None:
        await self.lesson.durable_context.replay_task(self.pool, self.queries, id)

    def mend(self) -> None:
        """From now on the task `broken` works."""
        self.calls["mended"] = 1


@pytest.fixture
def lab(lesson: Any, pool: Pool, queries: Any, monkeypatch: pytest.MonkeyPatch) -> ResetLab:
    return ResetLab(lesson, pool, queries)


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

    id = (await lab.run(parent))["id"]
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


class Repeats:
    """A lesson's queries, of which one answers again, later, what it has answered before."""

    def __init__(self, queries: Any) -> None:
        self.queries = queries
        self.answers: list[Any] = []
        self.repeats = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.queries, name)

    async def get_finished_tasks(self, conn: Any, **values: Any) -> AsyncIterator[Any]:
        self.repeats += bool(self.answers)
        for row in self.answers:
            yield row
        async for row in self.queries.get_finished_tasks(conn, **values):
            self.answers.append(row)
            yield row


async def test_an_answer_from_before_the_retry_does_not_wake_the_next_attempt(
    lab: ResetLab,
) -> None:
    """A worker that asked then and reads the answer now would see the old failure once more."""
    lab.queries = Repeats(lab.queries)
    parents = lab.worker(order, concurrency=0)
    id = await lab.enqueue(order)
    async with working(parents):
        async with working(lab.worker(durable_concurrency=0)):
            assert (await finished(lab.pool, id))["status"] == "FAILED"
        lab.mend()
        await lab.retry(id)
        repeats = lab.queries.repeats
        await wait_for(lambda: lab.queries.repeats > repeats + 1, "it has the old answer again")
        assert (await get_task(lab.pool, id))["status"] == "RUNNING"
        async with working(lab.worker(durable_concurrency=0)):
            assert (await finished(lab.pool, id))["status"] == "COMPLETED"


@pytest.mark.parametrize("action", ["retry", "replay"])
async def test_a_reset_task_is_queued_as_new_but_for_its_attempt(
    lab: ResetLab, action: str
) -> None:
    id = (await lab.run(order, max_retries=1))["id"]
    counts = "retry_count = 1, lost_count = 2, attempt = attempt + 10"
    await execute(lab.pool, f"UPDATE tasks SET {counts}")
    events = await lab.children(id)
    await getattr(lab, action)(id)

    row = await get_task(lab.pool, id)
    assert (row["status"], row["attempt"], row["max_retries"]) == ("QUEUED", 11, 1)
    assert (row["retry_count"], row["lost_count"]) == (0, 0)
    for column in ("output", "finished_at", "worker_id"):
        assert row[column] is None
    if action == "retry":
        charge, email = await lab.children(id)
        assert charge == events[0]
        assert (email["status"], email["attempt"]) == ("QUEUED", 11)
        assert (email["retry_count"], email["lost_count"]) == (0, 0)
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
    """Its log is gone, so there is nothing to differ from."""

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
