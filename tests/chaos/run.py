"""Chaos: orders are processed while somebody shoots at their workers and at their database.

python tests/chaos/run.py [--minutes M] [--seed S] [--orders N] [--workers W] [--lesson DIRECTORY]

Real processes, on a Postgres server of their own. At random a worker is killed, stopped for longer
than INACTIVE_AFTER, or told to end; backends are terminated, also between a commit and the answer
to it; Postgres is restarted. A worker that ends is started again, and up to lesson 07 it may end
whenever the database goes away. From lesson 14 on the orders wait for a signal that another process
sends, and from lesson 15 on one more forks orders that have finished. In the end everything must be
as if nothing had happened. The seed fixes the order of the faults, not their exact moments. Ends
with status 1, the rows that are wrong, and the logs kept, if something is. Not for Windows, which
cannot stop a process.
"""

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from checks import BRANCH_CHECKS, CHECKS, FIGURES
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from shared import EmbeddedPostgres, open_pool
from shared.demo import show
from shared.schema import schema_name

TESTS = Path(__file__).parents[1]
LESSON = TESTS.parent / "lessons" / "16-batches"
DURABLE, SURVIVES_OUTAGES, STOPS, LISTENS, SIGNALS, FORKS = (
    7,
    8,
    9,
    11,
    14,
    15,
)  # from these lessons on
QUEUE = "orders"
PATIENCE = 30.0  # seconds; reached only if something is wrong


@dataclass
class WorkerProcess:
    process: subprocess.Popen[bytes]
    log: Path
    continue_at: float | None = None  # while it is stopped
    told_to_end: bool = False

    def is_ready(self) -> bool:
        """Whether it has begun to work."""
        with self.log.open() as file:
            return "ready\n" in file.read(1000)

    def found_no_database(self) -> bool:
        """Whether it has ended as a program may if it does not get its first connection."""
        log = self.log.read_text()
        return self.process.returncode == 1 and not self.is_ready() and "Traceback" not in log

    def lost_the_database(self) -> bool:
        """Whether it has ended as a worker may that does not survive an outage."""
        log = self.log.read_text()
        says_so = "the database went away: " in log and "Traceback" not in log
        return self.process.returncode == 1 and says_so


class Chaos:
    """A server, its workers, and what has been done to them."""

    def __init__(self, options: argparse.Namespace, directory: Path) -> None:
        self.options = options
        self.lesson = int(options.lesson.resolve().name.partition("-")[0])
        self.directory = directory
        self.random = random.Random(options.seed)
        self.server = EmbeddedPostgres(directory / "postgres")
        self.workers: list[WorkerProcess] = []
        self.clerks: dict[str, WorkerProcess] = {}  # by what they do
        self.started = 0
        self.enqueued = 0
        self.done: Counter[str] = Counter()  # which fault how often
        self.wrong: list[str] = []
        self.interrupted = 0  # the signal's number
        # Only noted: whatever is going on, such as a start of Postgres, is finished first.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.interrupt)
        self.journal = (directory / "chaos.log").open("w", buffering=1)

    def interrupt(self, number: int, frame: object) -> None:
        self.interrupted = number

    def note(self, what: str) -> None:
        """A line in the journal, with the time as the workers' logs have it."""
        self.journal.write(f"{time.strftime('%H:%M:%S')}.{time.time() % 1 * 1000:03.0f} {what}\n")

    def pause(self, seconds: float = 0.02) -> None:
        if self.interrupted:
            raise SystemExit(128 + self.interrupted)
        time.sleep(seconds)

    def wait_until(self, condition: Callable[[], object], what: str) -> None:
        """Return when the condition holds, or with something wrong if that takes too long."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > deadline:
                self.wrong.append(f"waited in vain until {what}")
                return
            self.pause()

    def query(self, statement: str, *parameters: Any) -> list[dict[str, Any]]:
        # Nobody terminates this connection: whoever does such things is waiting for it.
        options = f"-c search_path={schema_name(self.options.lesson)}"
        with psycopg.connect(
            self.url, autocommit=True, options=options, row_factory=dict_row
        ) as conn:
            cursor = conn.execute(statement.encode(), parameters or None)
            return cursor.fetchall() if cursor.description else []

    def set_up(self) -> None:
        self.url = os.environ["DATABASE_URL"] = self.server.start()

        async def make_schema() -> None:
            async with open_pool(self.options.lesson):
                pass

        asyncio.run(make_schema())
        for _ in range(self.options.workers):
            self.start_worker()
        for lesson, work in {SIGNALS: "approve", FORKS: "reconsider"}.items():
            if self.lesson >= lesson:
                log = self.directory / f"clerk-{work}.log"
                process = self.start_process(log, "clerk.py", self.options.lesson, QUEUE, work)
                self.clerks[work] = WorkerProcess(process, log)
                self.wait_until(self.clerks[work].is_ready, f"the clerk can {work}")

    def start_process(self, log: Path, script: str, *arguments: Any) -> subprocess.Popen[bytes]:
        with log.open("wb") as output:
            # In a session of its own: Ctrl-C is for this program, which ends the others itself.
            process = subprocess.Popen(
                [sys.executable, "-B", Path(__file__).with_name(script), *arguments],
                stdout=output,
                stderr=output,
                start_new_session=True,
                env=os.environ | {"PYTHONPATH": str(TESTS)},
            )
        self.note(f"{log.name} is process {process.pid}")
        return process

    def start_worker(self) -> None:
        self.started += 1
        log = self.directory / f"worker-{self.started}.log"
        settings = {
            # Who listens is told of most things, and has to find the rest in good time.
            "POLL_INTERVAL": self.options.inactive_after / (50 if self.lesson < LISTENS else 1),
            "LISTEN_AGAIN": self.options.inactive_after / 5,
            "SUSPEND_AFTER": self.options.inactive_after / 5,
            "HEARTBEAT_INTERVAL": self.options.inactive_after / 10,
            "INACTIVE_AFTER": self.options.inactive_after,
            "SHUTDOWN_GRACE": self.options.inactive_after,
            # An order that waits long on a slow machine sees many workers die. It is not to blame.
            "MAX_LOST_WORKERS": 1_000_000,
            # With few slots a task that was taken away may wait for the worker that it had.
            "concurrency": self.random.choice([1, 5, 100]),
            "durable_concurrency": self.random.choice([2, 1000]),
        }
        process = self.start_process(
            log, "order_worker.py", self.options.lesson, QUEUE, json.dumps(settings)
        )
        self.workers.append(WorkerProcess(process, log))

    def look_after_workers(self) -> None:
        """Continue those who have been stopped for long enough, replace those who have ended."""
        for worker in list(self.workers):
            if worker.continue_at and time.monotonic() > worker.continue_at:
                self.note(f"{worker.log.name}: SIGCONT")
                worker.process.send_signal(signal.SIGCONT)
                worker.continue_at = None
            status = worker.process.poll()
            if status is None:
                continue
            self.workers.remove(worker)
            if not worker.told_to_end:
                self.start_worker()
            if worker.found_no_database():
                self.done["workers that found no database"] += 1
            elif self.lesson < SURVIVES_OUTAGES and worker.lost_the_database():
                self.done["workers that ended with the database"] += 1
            elif not worker.told_to_end:
                self.wrong.append(f"{worker.log.name} ended by itself with status {status}")
            elif status not in self.statuses_when_told_to_end():
                self.wrong.append(
                    f"{worker.log.name} was told to end and did so with status {status}"
                )

        for work, clerk in self.clerks.items():
            if clerk.process.poll() is not None:
                self.wrong.append(f"the clerk who does {work} has ended by itself: {clerk.log}")

    def end_clerk(self, work: str) -> None:
        if clerk := self.clerks.pop(work, None):
            clerk.process.terminate()
            clerk.process.wait()

    def statuses_when_told_to_end(self) -> set[int]:
        if self.lesson >= STOPS:
            return {0}
        # Killed by the signal is one that was just ending anyway, with the database.
        return {128 + signal.SIGTERM, -signal.SIGTERM}

    # The faults.

    def victims(self) -> list[WorkerProcess]:
        return [worker for worker in self.workers if worker.is_ready() and not worker.told_to_end]

    def kill_worker(self) -> None:
        worker = self.random.choice(self.victims())
        self.note(f"{worker.log.name}: SIGKILL")
        worker.process.kill()
        worker.process.wait()
        self.workers.remove(worker)
        self.start_worker()
        self.done["workers killed"] += 1

    def stop_worker(self) -> None:
        worker = self.random.choice(self.victims())
        self.note(f"{worker.log.name}: SIGSTOP")
        worker.process.send_signal(signal.SIGSTOP)
        # Often it comes back when its tasks have been taken away but not been finished yet.
        seconds = self.options.inactive_after * (1.05 + self.random.expovariate(2))
        worker.continue_at = time.monotonic() + seconds
        self.done["workers stopped for a while"] += 1

    def end_worker(self) -> None:
        worker = self.random.choice(self.victims())
        self.note(f"{worker.log.name}: SIGTERM")
        worker.process.terminate()
        worker.told_to_end = True
        self.start_worker()
        self.done["workers told to end"] += 1

    def terminate(self, condition: str, share: float, counted_as: str) -> None:
        """Terminate this share of the clients' backends for which the condition holds."""
        rows = self.query(f"""
            SELECT pid
            FROM pg_stat_activity
            WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() AND {condition}
            ORDER BY pid
        """)
        pids = [row["pid"] for row in rows if self.random.random() < share]
        self.note(f"{counted_as}: {pids}")
        self.query("SELECT pg_terminate_backend(pid) FROM unnest(%s::INT[]) AS pid", pids)
        self.done[counted_as] += len(pids)

    def terminate_backends(self) -> None:
        self.terminate("true", self.random.choice([0.1, 0.5, 1]), "backends terminated")

    def lose_answers(self) -> None:
        """Make commits wait for a standby that does not exist, and terminate those who wait.

        They have committed, and their clients never hear of it.
        """
        self.query("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
        self.query("SELECT pg_reload_conf()")
        time.sleep(self.options.inactive_after * self.random.uniform(0.1, 0.5))
        self.terminate("wait_event = 'SyncRep'", 0.7, "answers lost after a commit")
        self.query("ALTER SYSTEM RESET synchronous_standby_names")
        self.query("SELECT pg_reload_conf()")

    def restart_postgres(self, mode: str) -> None:
        self.note(f"Postgres stops, mode {mode}")
        self.server.execute("pg_ctl", "stop", "-D", str(self.server.data), "-m", mode, "-w")
        time.sleep(self.options.inactive_after * self.random.choice([0, 0.2, 1]))
        self.server.launch()
        self.note("Postgres is back")
        self.done[f"restarts of Postgres, {mode}"] += 1

    def shuffled_faults(self) -> list[Callable[[], None]]:
        """Like a deck of cards, so that even a short run has some of each kind."""
        deck = [self.kill_worker] * 4 + [self.stop_worker] * 3 + [self.end_worker]
        deck += [self.terminate_backends] * 3 + [self.lose_answers] * 3
        deck += [lambda: self.restart_postgres("fast"), lambda: self.restart_postgres("immediate")]
        self.random.shuffle(deck)
        return deck

    # The course of events.

    def rage(self) -> None:
        """Enqueue the orders bit by bit, and meanwhile shoot."""
        deck: list[Callable[[], None]] = []
        start = time.monotonic()
        seconds = self.options.minutes * 60
        next_fault = start
        while (now := time.monotonic()) < start + seconds and not self.wrong:
            due = min(self.options.orders, int(self.options.orders * 1.1 * (now - start) / seconds))
            self.enqueue(due - self.enqueued)
            self.look_after_workers()
            # A fault that hits workers which are only just starting would be wasted.
            if now >= next_fault and len(self.victims()) > self.options.workers / 2:
                deck = deck or self.shuffled_faults()
                deck.pop()()
                pause = self.random.expovariate(2 / self.options.inactive_after)
                next_fault = time.monotonic() + pause
            self.pause()
        self.enqueue(self.options.orders - self.enqueued)

    def enqueue(self, count: int) -> None:
        for _ in range(count):
            self.enqueued += 1
            input = {"order_id": f"order-{self.enqueued}", "amount": self.random.randint(1, 999)}
            self.query(
                """
                INSERT INTO tasks (queue, task_name, input, is_durable)
                VALUES (%s, 'process_order', %s, true)
                """,
                QUEUE,
                Jsonb(input),
            )
            if self.lesson >= LISTENS:
                topic = "md5(current_schema() || ' ' || %s)"
                self.query(f"SELECT pg_notify('tasks', {topic})", QUEUE)

    def settle(self) -> None:
        """The faults are over: let the workers finish, however long, as long as they get on."""
        self.note("the faults are over")
        self.end_clerk("reconsider")
        for worker in self.workers:
            worker.continue_at = worker.continue_at and time.monotonic()
        deadline, before = 0.0, -1
        while unfinished := self.count("tasks WHERE finished_at IS NULL"):
            if unfinished != before:
                deadline, before = time.monotonic() + PATIENCE, unfinished
            if time.monotonic() > deadline:
                self.wrong.append(f"{unfinished} tasks are stuck")
            if self.wrong:
                return
            self.look_after_workers()
            self.pause(0.1)
        self.end_clerk("approve")
        self.wait_until(self.who_was_told_has_ended, "all who were told to end have ended")
        self.wait_until(self.only_the_living_are_listed, "`workers` lists all who live, only them")

    def count(self, rows: str) -> int:
        return int(self.query(f"SELECT count(*) AS n FROM {rows}")[0]["n"])

    def who_was_told_has_ended(self) -> bool:
        self.look_after_workers()
        return not any(worker.told_to_end for worker in self.workers)

    def only_the_living_are_listed(self) -> bool:
        self.look_after_workers()
        names = [row["display_name"] for row in self.query("SELECT display_name FROM workers")]
        listed = sorted(int(name.rpartition(":")[2]) for name in names)
        return listed == sorted(worker.process.pid for worker in self.workers)

    def check(self) -> None:
        if (orders := self.query(FIGURES)[0]["orders"]) != self.enqueued:
            self.wrong.append(f"{self.enqueued} orders were enqueued, {orders} are there")
        checks = CHECKS | (BRANCH_CHECKS if self.lesson >= FORKS else {})
        for what, statement in checks.items():
            for row in self.query(statement)[:20]:
                self.wrong.append(f"{what}: {row}")

    def end_workers(self) -> None:
        """SIGTERM: all workers end, from lesson 09 on with status 0, and their rows are gone."""
        for worker in self.workers:
            if not worker.told_to_end:  # a second signal would be for one that hangs
                worker.process.terminate()
                worker.told_to_end = True
        self.wait_until(self.who_was_told_has_ended, "all workers have ended")
        for row in self.query("SELECT * FROM workers") if self.lesson >= STOPS else []:
            self.wrong.append(f"a worker that has ended but not left: {row}")

    def run(self) -> None:
        start = time.monotonic()
        self.set_up()
        self.rage()
        self.settle()
        self.check()
        self.end_workers()
        figures = self.query(FIGURES)[0]
        self.done.update({what: n for what, n in figures.items() if n is not None})
        self.done["charges asked for again"] = sum(
            log.read_text().count("charged before") for log in self.directory.glob("worker-*.log")
        )
        self.done["seconds"] = round(time.monotonic() - start)
        show(f"seed {self.options.seed}", [{"what": k, "number": n} for k, n in self.done.items()])

    def clean_up(self) -> None:
        """Leave no process behind, whatever has happened."""
        for worker in [*self.workers, *self.clerks.values()]:
            worker.process.kill()
            worker.process.wait()
        self.server.stop()
        self.journal.close()
        # The logs are kept for a failure, whether found by a check or an exception.
        shutil.rmtree(self.directory if self.interrupted else self.server.directory)


def durable_lesson(text: str) -> Path:
    """The directory of a lesson that has durable tasks."""
    number = Path(text).resolve().name.partition("-")[0]
    if os.path.isdir(text) and number.isdecimal() and int(number) >= DURABLE:
        return Path(text)
    raise argparse.ArgumentTypeError(f"{text} is not the directory of a lesson from 07 on")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=0.3, help="how long there are faults")
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000))
    parser.add_argument("--orders", type=int, default=120)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument(
        "--lesson", type=durable_lesson, default=LESSON, help="another one, or a copy"
    )
    parser.add_argument(
        "--inactive-after", type=float, default=1.0, help="in seconds; other times go with it"
    )
    options = parser.parse_args()
    if options.workers < 1 or options.inactive_after <= 0:
        parser.error("--workers and --inactive-after have to be above 0")
    print(f"seed {options.seed}", flush=True)
    directory = Path(tempfile.mkdtemp(prefix="chaos-"))
    chaos = Chaos(options, directory)
    try:
        chaos.run()
    finally:
        chaos.clean_up()
    if chaos.wrong:
        print(*chaos.wrong, sep="\n")
        sys.exit(f"seed {options.seed}: {len(chaos.wrong)} things are wrong; logs: {directory}")
    shutil.rmtree(directory)
    print("all is well")


if __name__ == "__main__":
    main()
