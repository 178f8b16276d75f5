"""The lab's server, its workers, and its safety. The page itself: test_lab_page.py."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import psycopg
import pytest

from lab_process import DEADLINE, LabProcess, Page, Refused, open_lab
from lesson_loader import LESSONS, Lesson
from programs import run_program
from shared.embedded import EmbeddedPostgres
from shared.lab.record import Record
from shared.lessons import find_lesson

LATEST = max(LESSONS.glob("[0-9][0-9]-*"))
WAITING = """
    SELECT count(*)
    FROM pg_stat_activity
    WHERE datname = current_database()
      AND wait_event_type = 'Lock'
"""


@pytest.fixture
def lab(database: str) -> Iterator[LabProcess]:
    """The lab on lesson 07."""
    with open_lab("07") as lab:
        yield lab


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A reader's copy of lesson 07."""
    path = tmp_path / "07-mine"
    shutil.copytree(find_lesson("07"), path, ignore=shutil.ignore_patterns("__pycache__"))
    return path


def is_running(pid: int) -> bool:
    with_status = psutil.pid_exists(pid) and psutil.Process(pid).status()
    return with_status not in (False, psutil.STATUS_ZOMBIE)


def start_order(lab: LabProcess, kind: str = "order") -> tuple[int, Page]:
    """Enqueue an order; its id, and a page that shows it."""
    id = lab.do("enqueue", kind=kind)["first"]
    return id, lab.open_page(id)


def is_finished(page: Page, status: str = "COMPLETED") -> bool:
    """Whether the page shows that its task has ended: the row, and then the workers' lines."""
    if not (chosen := page.state["chosen"]):
        return False
    lanes = chosen["lanes"] + [lane for child in chosen["children"] for lane in child["lanes"]]
    last = ends(chosen["lanes"])[-1:]  # none, if no line has come yet
    return (chosen["task"]["status"], last) == (status, [status]) and all(ends(lanes))


def ends(lanes: list[dict[str, Any]]) -> list[str | None]:
    return [lane.get("end") for lane in lanes]


def charge_waits(page: Page) -> bool:
    """Whether the page shows that its order has begun, and that nobody has its first step.

    One task that is QUEUED might be the order itself, a moment after it was enqueued.
    """
    chosen = page.state["chosen"]
    return bool(chosen) and [child["status"] for child in chosen["children"]] == ["QUEUED"]


@pytest.mark.since(2)
@pytest.mark.only(2, 3, 4, 6, 7, int(LATEST.name[:2]))
def test_every_lesson_runs_and_shows_what_it_has(lesson: Lesson, database: str) -> None:
    with open_lab(
        lesson.path, INACTIVE_AFTER=20.0
    ) as lab:  # nobody is late, however busy the machine
        assert lab.do("start_worker") == {"key": "A"}
        id, page = start_order(lab)
        page.until(lambda: is_finished(page), "the order is completed")
        state = page.state
        *suspended, last = ends(state["chosen"]["lanes"])
        assert (set(suspended), last) in [(set(), "COMPLETED"), ({"SUSPENDED"}, "COMPLETED")]
        assert lesson.number >= 13 or not suspended  # then a slow machine may suspend an order
        assert state["chosen"]["lanes"][0]["worker_key"] == "A"
        assert state["tasks"][0]["id"] == id
        assert ("payments" in state["chosen"]) == (lesson.number >= 4)
        assert all(len(p) >= 1 for p in [state["chosen"].get("payments", [1])])
        assert len(state["chosen"]["events"]) == (2 if lesson.number >= 5 else 0)
        assert len(state["chosen"]["children"]) == (2 if lesson.number >= 7 else 0)
        assert ("slots" in page.worker("A")) == (lesson.number >= 3)
        if lesson.number >= 4:
            assert page.worker("A")["heartbeat_age"] < DEADLINE
            assert state["lesson"]["inactive_after"] == 20.0
        number = 3 if lesson.number >= 7 else 1
        # The queue may have been counted a moment before the order was read.
        page.until(lambda: page.state["queue"]["COMPLETED"] == number, "all are counted")
        page.until(
            lambda: "RUNNING process_order" in [x.get("what") for x in page.log], "so it says"
        )


def test_a_killed_worker_and_who_takes_over(lab: LabProcess) -> None:
    lab.do("start_worker", concurrency=0)  # it has the order, and not its steps
    page = start_order(lab)[1]
    page.until(lambda: charge_waits(page), "the charge waits")
    pid = page.worker("A")["pid"]
    assert is_running(pid)

    lab.do("kill", worker="A")
    assert not is_running(pid)
    page.until(lambda: page.worker("A")["state"] == "dead", "the page shows that it is dead")
    assert page.worker("A")["exit"] == -signal.SIGKILL
    assert "error" not in page.worker("A")
    lab.do("start_worker")
    page.until(lambda: is_finished(page), "the order is completed")

    chosen = page.state["chosen"]
    assert ends(chosen["lanes"]) == ["killed", "COMPLETED"]
    assert [lane["worker_key"] for lane in chosen["lanes"]] == ["A", "B"]
    assert [lane["worker_key"] for child in chosen["children"] for lane in child["lanes"]] == [
        *"BB"
    ]
    whats = [moment["what"] for moment in chosen["moments"]]
    assert whats.index("kill") < whats.index("requeued")
    with pytest.raises(Refused, match="has ended already"):
        lab.do("kill", worker="A")
    lab.do("clear")
    page.until(lambda: not page.worker("A"), "its card is gone")


def test_a_frozen_worker_is_fenced_off_when_it_comes_back(lab: LabProcess) -> None:
    lab.do("start_worker", concurrency=0)
    page = start_order(lab)[1]
    page.until(lambda: charge_waits(page), "the charge waits")
    lab.do("freeze", worker="A")
    page.until(lambda: page.worker("A")["state"] == "frozen", "it is frozen")
    process = psutil.Process(page.worker("A")["pid"])
    page.until(lambda: process.status() == psutil.STATUS_STOPPED, "so it is")
    lab.do("start_worker")
    page.until(lambda: is_finished(page), "the order is completed")
    assert ends(page.state["chosen"]["lanes"]) == ["requeued", "COMPLETED"]

    lab.do("thaw", worker="A")
    lanes = ["fenced off", "COMPLETED"]
    page.until(lambda: ends(page.state["chosen"]["lanes"]) == lanes, "it is fenced off")
    assert page.worker("A")["state"] == "alive"
    assert len(page.state["chosen"]["payments"]) == 1


def test_what_befalls_a_worker_is_news_to_what_it_has_let_go_of() -> None:
    record = Record()
    record.say("start", "started worker A", "A")
    record.hear("A", "10:00:00.000 INFO     worker vm:1, task 7, attempt 1: RUNNING process_order")
    record.hear("A", "10:00:01.000 INFO     worker vm:1, task 7, attempt 1: SUSPENDED")
    record.say("kill", "killed worker A", "A")
    record.ended("A", 1.0)
    record.say("start", "started worker A", "A")  # its letter is free again
    record.say("kill", "killed another worker A", "A")
    texts = [each["text"] for each in record.moments_of([7]) if each["what"] == "kill"]
    assert texts == ["killed worker A"]


def test_sigterm_and_cut_connections(database: str) -> None:
    with open_lab(LATEST) as lab:
        lab.do("start_worker")
        page = lab.open_page()
        page.until(lambda: "heartbeat_age" in page.worker("A"), "it has the connection for that")
        lab.do("cut_connections", worker="A")
        page.until(lambda: [x for x in page.log if x["level"] == "WARNING"], "it notices")
        order = start_order(lab)[1]
        order.until(lambda: is_finished(order), "the worker has survived that")
        lab.do("stop", worker="A")
        page.until(lambda: page.worker("A")["state"] == "dead", "it has stopped")
        assert page.worker("A")["exit"] == 0


def test_retry_replay_fork_and_signal(database: str) -> None:
    with open_lab(LATEST) as lab:
        lab.do("start_worker")
        id, page = start_order(lab, "failing_order")
        page.until(lambda: is_finished(page, "FAILED"), "the order has failed")
        lab.do("retry", task=id)
        page.until(lambda: is_finished(page), "the order is completed")
        assert len(page.state["chosen"]["payments"]) == 1
        with pytest.raises(Refused, match=f"task {id} is COMPLETED, not FAILED"):
            lab.do("retry", task=id)
        lab.do("replay", task=id)
        page.until(lambda: len(page.state["chosen"]["payments"]) == 2, "it is charged again")

        page.until(lambda: is_finished(page, "FAILED"), "its email has failed once more")
        lab.do("fork", task=id, event=2)
        left = [1, 2]  # replaced from their first event on, and from the second
        page.until(
            lambda: [b["from_event"] for b in page.state["chosen"]["branches"]] == left,
            "it is forked",
        )
        page.until(lambda: is_finished(page, "FAILED"), "it has ended")
        assert len(page.state["chosen"]["payments"]) == 2

        id, page = start_order(lab, "approval")
        page.until(lambda: len(page.state["chosen"]["events"]) == 2, "it waits")
        lab.do("signal", task=id, name="approval", payload={"by": "Ann"})
        page.until(lambda: is_finished(page), "the order is completed")
        assert page.state["chosen"]["task"]["output"]["approval"] == {"by": "Ann"}
        (sent,) = page.state["chosen"]["signals"]
        assert sent["received_by"] == page.state["chosen"]["events"][1]["child"]


def test_two_pages_a_thousand_orders_and_one_that_comes_again(lab: LabProcess) -> None:
    first, second = lab.open_page(), lab.open_page()
    lab.do("enqueue", count=1000)
    first.until(lambda: first.state["queue"]["QUEUED"] == 1000, "all are shown")
    second.until(lambda: second.state["queue"]["QUEUED"] == 1000, "on both pages")
    assert len(first.state["tasks"]) == 30
    lab.do("start_worker")
    first.until(lambda: first.state["queue"]["COMPLETED"] > 100, "they run")
    seen = first.until(lambda: first.log[-1:], "it has the log")[0]["n"]
    again = lab.request("/api/stream", x_lab_token=lab.token, last_event_id=str(seen))
    page = Page(again)
    page.until(lambda: page.log, "it gets the log")
    assert page.log[0]["n"] > seen
    assert page.state["workers"]


@pytest.mark.parametrize("number", ["04", "07", LATEST.name[:2]])
def test_a_scene_wants_an_empty_queue_and_one_can_empty_it(database: str, number: str) -> None:
    with open_lab(number) as lab:
        scene = "frozen"  # every one of these lessons has it
        lab.do("start_worker")
        done, page = start_order(lab, "approval" if number == LATEST.name[:2] else "order")
        if number == LATEST.name[:2]:  # rows in every table that leads to tasks
            lab.do("signal", task=done, name="approval", payload=1)
        page.until(lambda: is_finished(page), "the order is completed")
        lab.do("kill", worker="A")
        lab.do("start_worker", concurrency=0, durable_concurrency=0)
        lab.do("enqueue")
        with pytest.raises(Refused, match=r"still has an open task, .*Reset the lab"):
            lab.do("scene", name=scene)
        lab.do("enqueue", count=2)
        with pytest.raises(Refused, match="still has 3 open tasks"):
            lab.do("scene", name=scene)
        pid = page.until(lambda: page.worker("B").get("pid"), "its card is there")
        assert is_running(pid), "a scene that is refused kills nobody"
        assert page.state["scene"] is None

        lab.do("empty")
        page.until(lambda: not any(page.state["queue"].values()), "the queue is empty")
        page.until(lambda: page.state["workers"] == [], "and no worker runs")
        page.until(lambda: "reset" in [x.get("what") for x in page.log], "the log says so")
        lab.do("scene", name=scene)
        page.until(lambda: page.state["scene"] and page.state["scene"]["name"] == scene, "begun")


def play(lab: LabProcess, page: Page, name: str) -> list[dict[str, Any]]:
    """Play a scene to its end, with the first answer to each question; returns its steps."""
    lab.do("scene", name=name)
    steps: list[dict[str, Any]] = []

    def has_gone_on() -> bool:
        scene = page.state["scene"] or {}
        is_other = not steps or scene["sentence"] != steps[-1]["sentence"]
        return scene.get("name") == name and "busy" not in scene and is_other

    while not steps or not steps[-1]["done"]:
        page.until(has_gone_on, f"scene {name} has gone on")
        steps.append(page.state["scene"])
        assert "error" not in steps[-1], steps[-1]
        if not steps[-1]["done"]:
            lab.do("scene_next", answer=steps[-1].get("choices", [None])[0])
    return steps


def test_a_second_scene_has_its_own_workers_b(database: str) -> None:
    with open_lab("07", INACTIVE_AFTER=10.0) as lab:  # B works long before it may take over
        page = lab.open_page()
        steps = play(lab, page, "before-event")
        assert steps[1]["rows"]["rows"][0]["wait_event_type"] == "Lock", "its INSERT waits"
        assert [row["attempt"] for row in steps[-1]["rows"]["rows"]] == [2, 1, 1]
        order, charge, _ = [row["id"] for row in steps[-1]["rows"]["rows"]]
        assert charge == order + 2, "the child between the two was rolled back"

        steps = play(lab, page, "before-claim")
        (answer,) = [step["answer"] for step in steps if "answer" in step]
        assert answer["right"] == "charge_payment", "not what the first scene's B ran first"
        ended = [line["text"] for line in page.log if line["what"] == "ended"]
        assert ended == ["ended worker B"], "A was killed by the scene, B by the next one"
        page.until(lambda: page.state["scene"]["done"], "it has ended")
        lab.do("scene_stop")
        page.until(lambda: page.state["scenes"][1]["played"], "the programme shows that")
        played = [each["played"] for each in page.state["scenes"]]
        assert played == [True, True, False, False, False, False, False]
        assert [each["moment"] for each in page.state["scenes"]] == [1, 2, 3, 3, 4, 4, 5]


@pytest.mark.parametrize("number", ["07", "12"])
def test_a_worker_that_comes_back_is_refused_a_step(database: str, number: str) -> None:
    with open_lab(number) as lab:
        page = lab.open_page()
        steps = play(lab, page, "frozen")
        assert steps[-1]["answer"]["right"] == "One", "one email"
        emails = [
            row["attempt"] for row in steps[-1]["rows"]["rows"] if "email" in row["task_name"]
        ]
        assert emails == [1], "of which the table speaks, too"
        order = lab.open_page(steps[-1]["rows"]["rows"][0]["id"])
        order.until(lambda: order.state["chosen"], "the order is shown")
        assert len(order.state["chosen"]["payments"]) == 1
        assert "TaskNotOwnedError" in steps[-1]["sentence"]


def test_a_frozen_worker_has_told_what_slots_are_taken(lab: LabProcess) -> None:
    page = lab.open_page()
    lab.do("scene", name="frozen")
    lab.do("scene_next")
    page.until(lambda: page.worker("A").get("state") == "frozen", "it is frozen at a gate")
    slots = {"plain": [1, 10], "durable": [1, 20]}
    page.until(lambda: page.worker("A")["slots"] == slots, "it has told of both")


def test_told_to_stop_shows_who_had_what_at_that_time(database: str) -> None:
    # Nobody is late in it, however long the machine stops a worker.
    with open_lab("09", INACTIVE_AFTER=20.0, SHUTDOWN_GRACE=20.0) as lab:
        last = play(lab, lab.open_page(), "stop")[-1]
        assert "parcel" in last["rows"]["title"]
        order, *_, parcel = last["rows"]["rows"]
        assert order["attempt"] == 2
        assert (parcel["task_name"], parcel["status"], parcel["attempt"]) == (
            "pack_parcel",
            "RUNNING",
            1,
        )


def test_what_the_list_never_leaves_out(lab: LabProcess) -> None:
    page = lab.open_page()
    lab.do("start_worker")
    failed = lab.do("enqueue", kind="failing_order")["first"]
    page.until(lambda: page.state["queue"]["FAILED"] == 2, "email and order have failed")
    lab.do("kill", worker="A")
    lab.do("enqueue", count=100)
    lab.do("start_worker", concurrency=0, durable_concurrency=40)  # the orders wait for their steps
    page.until(lambda: page.state["queue"]["RUNNING"] == 40, "more run than are listed")
    looked_at = failed + 90  # it waits, and there are newer ones
    lab.open_page(looked_at)
    page.until(lambda: page.state["tasks"][0]["id"] == looked_at, "what somebody looks at is first")
    tasks = page.state["tasks"]
    assert len(tasks) == 30
    assert tasks[1]["id"] == failed
    assert {task["status"] for task in tasks[2:]} == {"RUNNING"}


def test_only_who_knows_the_token_gets_in(lab: LabProcess) -> None:
    host, port = lab.address.removeprefix("http://").split(":")
    assert host == "127.0.0.1"
    listening = psutil.Process(lab.process.pid).net_connections()
    addresses = {c.laddr for c in listening if c.status == psutil.CONN_LISTEN}
    assert {(a.ip, a.port) for a in addresses} == {("127.0.0.1", int(port))}

    right = {"x_lab_token": lab.token, "origin": lab.address}
    wrong: list[tuple[str, bytes | None, dict[str, str]]] = [
        ("/", None, {}),
        ("/?token=no", None, {}),
        ("/static/index.html", None, {}),
        ("/api/stream", None, {"x_lab_token": "no"}),
        (f"/api/stream?token={lab.token}", None, {}),  # it is for the page alone
        ("/", None, right | {"host": f"example.org:{port}"}),
        ("/", None, right | {"host": f"127.0.0.1:{int(port) + 1}"}),
        ("/api/enqueue", b"{}", right | {"origin": "http://example.org"}),
        ("/api/enqueue", b"{}", right | {"origin": "null"}),
        ("/api/enqueue", b"{}", {"x_lab_token": lab.token}),
        ("/api/enqueue", b"{}", {"origin": lab.address}),
    ]
    for path, data, headers in wrong:
        with pytest.raises(Refused, match="403"):
            lab.request(path, data, **headers)
    page = lab.open_page()
    assert sum(page.state["queue"].values()) == 0

    with lab.request(f"/?token={lab.token}") as response:
        cookie = response.headers["set-cookie"]
        assert "httponly" in cookie.lower()
        assert "samesite=strict" in cookie.lower()
        assert "default-src 'self'" in response.headers["content-security-policy"]
    with lab.request("/", cookie=cookie.split(";")[0]) as response:
        assert response.status == 200


def test_it_signals_nobody_but_its_workers(lab: LabProcess) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        for name in (stranger.pid, str(stranger.pid), "A", None):
            for action in ("kill", "freeze", "thaw", "stop", "cut_connections"):
                with pytest.raises(Refused, match="There is no worker"):
                    lab.do(action, worker=name)
        assert psutil.Process(stranger.pid).status() != psutil.STATUS_STOPPED
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("explode", {}, "There is no action explode"),
    ("enqueue", {"count": 1001}, "count must be a whole number from 1 to 1000"),
    ("enqueue", {"count": "many"}, "count must be a whole number"),
    ("enqueue", {"kind": "approval"}, "has no tasks of the kind 'approval'"),
    ("enqueue", {"kid": "order"}, "unexpected keyword argument 'kid'"),
    ("start_worker", {"concurrency": -1}, "concurrency must be a whole number"),
    ("signal", {"task": 1, "name": "x"}, "has no signal yet"),
    ("restart_postgres", {}, "not ours to restart"),
    ("retry", {"task": 999}, "there is no task 999"),
]


def test_what_cannot_be_done_is_said_in_one_line(lab: LabProcess) -> None:
    for action, arguments, reason in REFUSALS:
        with pytest.raises(Refused, match=reason) as caught:
            lab.do(action, **arguments)
        status, text = caught.value.args
        assert status == 400
        assert len(text.splitlines()) == 1


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM", "SIGHUP", "SIGKILL"])
def test_whatever_ends_the_lab_ends_its_workers(lab: LabProcess, how: str) -> None:
    for _ in range(2):
        lab.do("start_worker")
    page = lab.open_page()
    page.until(lambda: page.worker("B"), "both cards are there")
    pids = [page.worker(key)["pid"] for key in "AB"]
    lab.do("freeze", worker="A")  # it cannot notice anything
    lab.process.send_signal(getattr(signal, how))
    assert lab.process.wait(DEADLINE) == (-signal.SIGKILL if how == "SIGKILL" else 0)
    deadline = time.monotonic() + DEADLINE
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline, "a worker has outlived the lab"
        time.sleep(0.02)


def test_a_faulty_module_is_shown_and_can_be_mended(copy: Path, database: str) -> None:
    module = copy / "worker.py"
    text = module.read_text(encoding="utf-8")
    faulty = text.replace("class Worker:", "class Worker")
    module.write_text(faulty, encoding="utf-8")
    with open_lab(copy) as lab:
        page = lab.open_page()
        assert "worker.py: expected ':'" in page.state["lesson"]["error"]
        module.write_text(text, encoding="utf-8")
        page.until(lambda: not page.state["lesson"]["error"], "the error is gone")

        module.write_text(faulty, encoding="utf-8")
        with pytest.raises(Refused, match="Worker A has not started: SyntaxError: expected ':'"):
            lab.do("start_worker")
        page.until(
            lambda: "Traceback" in page.worker("A").get("error", ""), "and what the worker said"
        )

        module.write_text(text, encoding="utf-8")
        lab.do("start_worker")
        page.until(lambda: not page.state["lesson"]["error"], "the error is gone")
        order = start_order(lab)[1]
        order.until(lambda: is_finished(order), "the order is completed")


def test_a_worker_that_does_not_start_is_heard_to_its_end(copy: Path, database: str) -> None:
    """What it has written may come later than the news of its end."""
    (copy / "worker.py").write_text("class Worker", encoding="utf-8")
    code = """
        import sys, time
        from shared.lab.processes import Processes
        read = Processes._read
        def read_late(self, worker):
            time.sleep(2)
            read(self, worker)
        Processes._read = read_late
        from shared.__main__ import main
        main(sys.argv[1:])
    """
    said = "Worker A has not started: SyntaxError: expected ':'"
    with (
        open_lab(copy, code=textwrap.dedent(code)) as lab,
        pytest.raises(Refused, match=said),
    ):
        lab.do("start_worker")


def test_a_faulty_schema_is_shown_and_can_be_mended(copy: Path, database: str) -> None:
    schema = copy / "schema.sql"
    text = schema.read_text(encoding="utf-8")
    schema.write_text(text.replace("CREATE TABLE", "CREATE TABEL", 1), encoding="utf-8")
    with open_lab(copy) as lab:
        page = lab.open_page()
        assert "schema.sql, line" in page.state["lesson"]["error"]
        schema.write_text(text, encoding="utf-8")
        page.until(lambda: not page.state["lesson"]["error"], "the error is gone")
        assert "QUEUED" in page.state["queue"]

        # A schema that changes while the lab is open: the tables are made anew with the worker.
        new = text.replace(
            "CREATE TABLE payments", "CREATE TABLE others (id INT);\nCREATE TABLE payments"
        )
        schema.write_text(new, encoding="utf-8")
        lab.do("start_worker")
        order = start_order(lab)[1]
        order.until(lambda: is_finished(order), "the order is completed")


def with_postgres_in(directory: Path) -> str:
    """The code of a lab whose embedded Postgres is in this directory."""
    code = f"""
        import sys
        from functools import cache
        from pathlib import Path
        import shared.database
        from shared.embedded import EmbeddedPostgres
        shared.database.embedded = cache(lambda: EmbeddedPostgres(Path({str(directory)!r})))
        from shared.__main__ import main
        main(sys.argv[1:])
    """
    return textwrap.dedent(code)


def test_a_restart_of_the_embedded_postgres(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DATABASE_URL", raising=False)
    with open_lab(find_lesson("08"), code=with_postgres_in(directory)) as lab:
        lab.do("start_worker")
        page = lab.open_page()
        before = EmbeddedPostgres(directory).pid_file_lines()[0]
        lab.do("restart_postgres")
        assert EmbeddedPostgres(directory).pid_file_lines()[0] != before
        assert page.state["database"]["embedded"]
        page.until(
            lambda: "restarting" in [state["database"]["state"] for state in page.states],
            "it has said so",
        )
        order = start_order(lab)[1]
        order.until(lambda: is_finished(order), "the worker goes on")
        order.until(lambda: order.state["database"]["state"] == "up", "it is up again")


def test_a_restarted_server_has_the_same_address(prepared_directory: Path, place: Path) -> None:
    # So long that its socket is in a directory of its own, made at its start.
    directory = place / "long" / ("x" * 100)
    directory.parent.mkdir()
    subprocess.run(["cp", "-a", prepared_directory, directory], check=True)
    server = EmbeddedPostgres(directory)
    before = server.start()
    try:
        pid = server.pid_file_lines()[0]
        server.restart()
        assert server.url() == before
        assert server.pid_file_lines()[0] != pid
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["01"], "The lab shows lessons from 02 on: lesson 01 has no workers yet."),
        (["99"], f"There is no lesson 99; the last one is {LATEST.name[:2]}."),
        (["no-such"], "There is no directory no-such."),
        (["07", "--port", "99999999"], "Cannot listen on port 99999999"),
    ],
)
def test_a_wrong_call_is_one_line(database: str, arguments: list[str], line: str) -> None:
    code = "from shared.__main__ import main; main(['lab', '--no-browser', *sys.argv[1:]])"
    assert line in run_program(code, *arguments).sole_error_line()


def test_without_the_extra_it_says_how_to_install_it() -> None:
    code = "sys.modules['uvicorn'] = None; from shared.__main__ import main; main(['lab'])"
    line = run_program(code).sole_error_line()
    assert line.startswith("The lab needs uvicorn.")
    assert "'.[lab]'" in line


def test_a_port_that_is_taken_is_one_line(lab: LabProcess) -> None:
    port = lab.address.rpartition(":")[2]
    code = "from shared.__main__ import main; main(['lab', '--no-browser', '--port', sys.argv[1]])"
    line = run_program(code, port, database_url=os.environ["DATABASE_URL"]).sole_error_line()
    assert f"Cannot listen on port {port}" in line


def test_a_second_restart_at_the_same_time_is_refused(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DATABASE_URL", raising=False)

    def restart(lab: LabProcess) -> str:
        try:
            lab.do("restart_postgres")
        except Refused as error:
            return str(error.args[1])
        return "restarted"

    with open_lab(find_lesson("08"), code=with_postgres_in(directory)) as lab:
        for _ in range(3):
            with ThreadPoolExecutor() as pool:
                answers = list(pool.map(restart, [lab, lab]))
            if answers != ["restarted", "restarted"]:
                break  # else the second came so late that the first had been done
        assert sorted(answers) == ["Postgres is being restarted already.", "restarted"]


def test_a_scene_that_is_left_twice_at_once(lab: LabProcess) -> None:
    lab.do("scene", name="before-event")
    lab.do("scene_next")  # on its way, which it has to leave first
    with ThreadPoolExecutor() as pool:
        answers = list(pool.map(lab.do, ["scene_stop", "empty", "scene_stop", "empty"]))
    assert answers == [{}] * 4


def test_a_scene_that_has_failed_was_not_played(copy: Path, database: str) -> None:
    module = copy / "worker.py"
    with open_lab(copy) as lab:
        page = lab.open_page()
        lab.do("scene", name="between")
        module.write_text("class Worker", encoding="utf-8")
        lab.do("scene_next")
        page.until(lambda: (page.state["scene"] or {}).get("error"), "it cannot go on")
        lab.do("scene_stop")
        page.until(lambda: page.state["scene"] is None, "it is left")
        assert not any(scene["played"] for scene in page.state["scenes"])


def test_a_print_without_its_newline_hides_nothing(copy: Path, database: str) -> None:
    with (copy / "worker.py").open("a", encoding="utf-8") as module:
        module.write('print("one, ", end="")\n')
    with open_lab(copy) as lab:
        assert lab.do("start_worker") == {"key": "A"}
        page = lab.open_page()
        page.until(lambda: "one, " in [line["text"] for line in page.log], "it is shown itself")


def test_what_editors_leave_behind_is_no_module(copy: Path, database: str) -> None:
    (copy / "worker.old.py").write_text("class Worker", encoding="utf-8")
    if sys.platform != "win32":
        (copy / ".#worker.py").symlink_to("somebody@vm.1234")  # Emacs' lock leads nowhere
    assert {"worker", "models"} < Lesson(copy).modules.keys()
    with open_lab(copy) as lab:
        assert lab.open_page().state["lesson"]["error"] is None
        assert lab.do("start_worker") == {"key": "A"}


def with_setting(module: str, name: str, value: float) -> str:
    """The code of a lab in which a module's constant has another value."""
    return (
        f"import sys, shared.lab.{module} as module\nmodule.{name} = {value}\n"
        "from shared.__main__ import main\nmain(sys.argv[1:])"
    )


def hold_at_the_question(lab: LabProcess) -> int:
    """Play scene 1 until its question, when it locks durable_events; an order that has ended."""
    lab.do("start_worker")
    id, page = start_order(lab)
    page.until(lambda: is_finished(page), "the order is completed")
    lab.do("scene", name="before-event")
    lab.do("scene_next")
    page.until(lambda: (page.state["scene"] or {}).get("choices"), "it asks")
    return id


def test_a_replay_that_waits_for_a_lock_is_given_up(database: str) -> None:
    with open_lab("07", code=with_setting("hand", "ACT_TIMEOUT", 3.0)) as lab:
        id = hold_at_the_question(lab)
        with pytest.raises(Refused, match=r"400.*replay has not ended within 3 s: .* a lock"):
            lab.do("replay", task=id)


def test_a_lab_that_closes_leaves_its_scene_first(database: str) -> None:
    with open_lab("07", code=with_setting("program", "CLOSING_TIME", 20)) as lab:
        id = hold_at_the_question(lab)
        with ThreadPoolExecutor() as pool:
            replay = pool.submit(lab.do, "replay", task=id)
            with psycopg.connect(database, autocommit=True) as conn:
                # The scene's own worker, and the replay.
                while conn.execute(WAITING).fetchone() != (2,):
                    assert not replay.done(), "it does not wait"
                    time.sleep(0.05)
            lab.process.terminate()
            assert replay.result() == {}


def test_a_task_with_a_long_output_is_shown(database: str) -> None:
    with open_lab(LATEST) as lab:
        lab.do("start_worker")
        id, page = start_order(lab, "approval")
        lab.do("signal", task=id, name="approval", payload="long" * 1000)
        page.until(lambda: is_finished(page), "it is completed")
        assert "longlong" in page.state["chosen"]["task"]["output"], "and its beginning is there"


def test_a_long_signal_arrives(database: str) -> None:
    with open_lab(LATEST) as lab:
        lab.do("start_worker")
        id, page = start_order(lab, "approval")
        arguments = {"task": id, "name": "approval", "payload": "ä" * 40_000}
        body = json.dumps(arguments, ensure_ascii=False).encode()  # not escaped, as a browser does
        lab.request("/api/signal", body, x_lab_token=lab.token, origin=lab.address).close()
        page.until(lambda: is_finished(page), "it has got it")


def test_a_fault_of_the_lab_is_answered_as_json(database: str) -> None:
    code = """
        import sys
        from shared.lab.hand import Hand
        async def clear(self):
            raise RuntimeError("unforeseen")
        Hand.clear = clear
        from shared.__main__ import main
        main(sys.argv[1:])
    """
    with open_lab("07", code=textwrap.dedent(code)) as lab:
        with pytest.raises(Refused, match=r"500.*The lab has a fault: RuntimeError: unforeseen\."):
            lab.do("clear")
        lab.do("start_worker")
