"""The lab's page, in a real browser: its buttons, its scenes, and who can use it.

Without a browser these tests are skipped. The server behind the page: test_lab.py.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
from axe_playwright_python.sync_playwright import Axe  # type: ignore[import-untyped]
from playwright.sync_api import Browser, Locator, Page, expect

import browser as machine
from lab_process import DEADLINE, LabProcess, open_lab
from shared.lab import scenes
from shared.lessons import find_lesson

# Scenes have deadlines of their own, which are to be reached first.
PATIENCE = 1500 * DEADLINE  # ms
expect.set_options(timeout=PATIENCE)

WIDE, NARROW = (1400, 900), (390, 844)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with machine.running_browser() as browser:
        if browser is None:
            pytest.skip(machine.NONE)
        yield browser


@contextmanager
def opened(
    browser: Browser, lab: LabProcess, size: tuple[int, int] = WIDE, **options: Any
) -> Iterator[Page]:
    """The lab's page. An error in its scripts fails the test."""
    errors: list[str] = []
    viewport = {"width": size[0], "height": size[1]}
    with browser.new_context(viewport=viewport, **options) as context:  # type: ignore[arg-type]
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(lab.url)
        yield page
        assert errors == []


@pytest.fixture
def lab(browser: Browser, database: str) -> Iterator[LabProcess]:
    """The lab on lesson 07."""
    with open_lab("07") as lab:
        yield lab


@pytest.fixture
def page(browser: Browser, lab: LabProcess) -> Iterator[Page]:
    with opened(browser, lab) as page:
        yield page


def click(page: Page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def card(page: Page, key: str) -> Locator:
    return page.get_by_role("article", name=f"worker {key}")


def start_worker(page: Page, key: str) -> psutil.Process:
    """Start a worker by its button; returns its process."""
    click(page, "Start a worker")
    expect(card(page, key).get_by_text("alive")).to_be_visible()
    words = card(page, key).get_by_text("process").inner_text().replace(",", "").split()
    return psutil.Process(int(words[1]))


def status_of_task(page: Page) -> Locator:
    return page.locator("#timeline .head .status")


def picture(page: Page) -> Locator:
    return page.locator("#timeline").get_by_role("img")


def test_buttons_do_what_they_say_to_processes(page: Page, lab: LabProcess) -> None:
    first, second = start_worker(page, "A"), start_worker(page, "B")
    lab.do("stop", worker="B")
    expect(card(page, "B").get_by_text("stopped, as asked")).to_be_visible()
    assert not second.is_running()

    click(page, "An order")
    expect(status_of_task(page)).to_have_text("COMPLETED")
    expect(page.locator("#queue [data-key=COMPLETED] b")).to_have_text("3")
    expect(page.locator("#log")).to_contain_text("RUNNING send_confirmation_email")

    click(page, "Freeze: worker A")
    expect(card(page, "A").get_by_text("frozen")).to_be_visible()
    deadline = time.monotonic() + DEADLINE
    while first.status() != psutil.STATUS_STOPPED:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    click(page, "Thaw: worker A")
    expect(card(page, "A").get_by_text("alive")).to_be_visible()
    assert first.status() != psutil.STATUS_STOPPED

    click(page, "Kill -9: worker A")
    expect(card(page, "A").get_by_text("killed")).to_be_visible()
    assert not first.is_running()
    click(page, "Forget the dead")
    expect(page.get_by_role("article")).to_have_count(0)


def test_a_crash_is_drawn(page: Page, lab: LabProcess) -> None:
    lab.do("start_worker", concurrency=0)  # it has the order, and not its steps
    click(page, "An order")
    expect(picture(page)).to_have_accessible_name(re.compile("charge_payment QUEUED"))
    click(page, "Kill -9: worker A")
    start_worker(page, "B")
    words = "attempt 1 on worker A: killed; attempt 2 on worker B: COMPLETED"
    expect(picture(page)).to_have_accessible_name(re.compile(words))
    expect(picture(page).locator(".kill")).to_have_count(1)
    expect(picture(page).locator(".stale")).to_have_count(1)
    expect(picture(page).locator("text", has_text="kill -9 A")).to_be_visible()
    expect(picture(page).locator(".event")).to_have_count(2)
    expect(picture(page).locator("text", has_text="event 1, task 2")).to_be_visible()


def test_a_failure_is_retried_and_replayed(page: Page) -> None:
    start_worker(page, "A")
    click(page, "One that fails")
    expect(status_of_task(page)).to_have_text("FAILED")
    click(page, "Retry")
    expect(status_of_task(page)).to_have_text("COMPLETED")
    expect(page.locator(".extra")).to_contain_text("42, key 2")
    click(page, "Replay")
    expect(page.locator(".extra")).to_contain_text("42, key 2; 42, key 4")
    # The steps of before are nobody's now, and look like none of the reader's orders.
    expect(page.locator(".tasks li", has_text="left by a replay of 1")).to_have_count(2)
    expect(page.locator(".tasks li", has_text="process_order")).not_to_contain_text("left")


def test_what_is_refused_is_said(page: Page, lab: LabProcess) -> None:
    start_worker(page, "A")
    expect(card(page, "A")).to_contain_text(re.compile("heartbeat .* ago"))  # by one of them
    click(page, "Cut connections: worker A")
    expect(card(page, "A").get_by_text("the database went away")).to_be_visible()
    expect(card(page, "A").get_by_text("ended, status 1")).to_be_visible()
    expect(page.locator("#fault")).to_be_hidden()
    page.route("**/api/enqueue", lambda route: route.fulfill(status=400, json={"error": "No."}))
    click(page, "An order")
    expect(page.locator("#notice")).to_have_text("No.")


def play(page: Page, title: str, answer: Callable[[list[str]], str]) -> list[str]:
    """Play a scene to its end; returns what was the right answer to each question."""
    scene = page.locator("#scene")
    click(page, title)
    rights = []
    while True:
        others = scene.get_by_role("button", name="To the other scenes")
        button = scene.locator("button.primary, .choices button").first
        button.wait_for()
        assert not scene.get_by_text("cannot go on").is_visible(), scene.inner_text()
        rights += scene.locator(".truth").all_inner_texts()
        if choices := scene.locator(".choices button").all_inner_texts():
            click(page, answer(choices))
            scene.locator(".choices").wait_for(state="detached")
            continue
        sentence = scene.locator(".sentence").inner_text()
        if others.is_visible():
            others.click()
            scene.locator(".programme").wait_for()
            return rights
        button.click()
        page.locator("#scene .sentence", has_not_text=sentence).wait_for()


# Lesson, INACTIVE_AFTER, and for each scene the right answer.
SCENES: list[tuple[str, float, dict[str, str]]] = [
    (
        "04",
        3.5,
        {"Killed half-way through an order": "Two", "Frozen, and back": "It is refused"},
    ),
    (
        "07",
        3.5,
        {
            "Killed while the child runs": "process_order and charge_payment",
            "Killed after the charge, before its outcome": "One",
            "Killed between two steps": "process_order alone",
            "Killed after the last step": "process_order alone",
            "Frozen, and back": "One",
        },
    ),
    # What a worker runs first, if it starts long before it may take over.
    (
        "07",
        10,
        {
            "Killed before event and child are committed": "Once",
            "Killed before anybody claims the child": "charge_payment",
        },
    ),
    (
        "12",
        3.5,
        {
            "Told to stop": "B has it at once, while A still packs",
            "Killed while an order sleeps": "8 seconds",
        },
    ),
    # In these nobody is taken for dead.
    (
        "14",
        20,
        {
            "Told to stop": "B has it at once, while A still packs",
            "Killed, and nothing is lost": "No, it was nobody's when A died",
            "Approved before it has asked": "It is received",
            "Approved while no worker runs": "QUEUED",
        },
    ),
    ("15", 20, {"Only the email again": "send_confirmation_email"}),
]


@pytest.mark.parametrize(("number", "inactive_after", "rights"), SCENES)
def test_each_scene_plays_to_its_end(
    browser: Browser, database: str, number: str, inactive_after: float, rights: dict[str, str]
) -> None:
    with (
        open_lab(number, INACTIVE_AFTER=inactive_after, SHUTDOWN_GRACE=20.0) as lab,
        opened(browser, lab) as page,
    ):
        for title, right in rights.items():
            assert play(page, title, lambda choices: choices[0]) == [right]


def test_every_scene_is_played() -> None:
    assert {scene.title for scene in scenes.SCENES} == {title for *_, s in SCENES for title in s}


def test_a_second_tab_and_a_reload_are_in_the_midst_of_it(
    browser: Browser, page: Page, lab: LabProcess
) -> None:
    click(page, "Killed after the charge, before its outcome")
    click(page, "Next")
    question = "How many payments will there be in the end?"
    expect(page.get_by_text(question)).to_be_visible()
    words = picture(page).get_attribute("aria-label")
    with opened(browser, lab) as other:
        expect(other.get_by_text(question)).to_be_visible()
        expect(card(other, "A").get_by_text("task 2 is held in charge_payment")).to_be_visible()
        page.reload()
        expect(page.get_by_text(question)).to_be_visible()
        expect(picture(page)).to_have_attribute("aria-label", words or "")
        click(page, "One")
        for tab in (page, other):
            expect(tab.get_by_text("You said “One”.")).to_be_visible()
            expect(tab.locator("#scene button.primary")).to_have_count(0)
        for tab in (page, other):
            expect(tab.locator(".verdict")).to_have_text("Right:")
            expect(tab.locator(".rows tbody tr")).to_have_count(1)


def test_by_keyboard_alone(page: Page) -> None:
    def press_until(name: str) -> None:
        """Go on with Tab until the focus is there, and press Enter."""
        for _ in range(60):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.textContent") == name:
                return page.keyboard.press("Enter")
        raise AssertionError(f"Tab does not lead to {name}")

    expect(page.locator(".programme")).to_be_visible()
    press_until("Killed between two steps")
    expect(page.get_by_role("button", name="Next")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator(".choices button").first).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator(".verdict")).to_have_text("Right:")
    expect(page.get_by_role("button", name="Next scene")).to_be_focused()

    page.get_by_role("tab", name="Stage").focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Diff")).to_be_focused()
    expect(page.get_by_role("heading", name="durable_context.py")).to_be_visible()


def test_a_thousand_orders_are_no_burden_to_the_page(page: Page) -> None:
    start_worker(page, "A")
    page.get_by_label("show all tasks").check()
    click(page, "A thousand")
    expect(page.locator("#queue [data-key=COMPLETED] b")).to_have_text(re.compile(r"[2-9]\d\d"))
    # What it draws does not grow with them: of 400 tasks and more there are 800 lines.
    expect(page.locator("#log > div")).to_have_count(400)
    expect(page.locator(".tasks li")).to_have_count(30)
    expect(page.get_by_text("The list shows 30 tasks")).to_be_visible()
    click(page, "Kill -9: worker A")
    expect(card(page, "A").get_by_text("killed")).to_be_visible()


def test_a_fault_of_the_lesson_is_shown(browser: Browser, database: str, tmp_path: Path) -> None:
    copy = tmp_path / "07-mine"
    shutil.copytree(find_lesson("07"), copy)
    module = copy / "worker.py"
    text = module.read_text(encoding="utf-8")
    module.write_text(text.replace("class Worker:", "class Worker"), encoding="utf-8")
    with open_lab(copy) as lab, opened(browser, lab) as page:
        expect(page.locator("#fault")).to_be_visible()
        expect(page.locator("#fault")).to_contain_text("worker.py")
        module.write_text(text, encoding="utf-8")
        start_worker(page, "B" if card(page, "A").count() else "A")
        expect(page.locator("#fault")).to_be_hidden()


@pytest.mark.skipif(sys.platform == "win32", reason="a script is no program there")
def test_a_browser_that_does_not_start_is_no_reason_to_skip(
    browser: Browser, tmp_path: Path
) -> None:
    program = tmp_path / "chromium"
    program.write_text(f"#!/bin/sh\necho started >> {tmp_path / 'starts'}\nexit 1\n")
    program.chmod(0o755)
    result = subprocess.run(
        [sys.executable, "-c", "import browser\nwith browser.running_browser(): pass"],
        env=os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert "BrowserType.launch" in result.stderr
    assert (tmp_path / "starts").read_text().count("started") == 2


def test_a_scene_begins_with_an_empty_picture_and_leads_to_the_next(page: Page) -> None:
    start_worker(page, "A")
    click(page, "An order")
    expect(status_of_task(page)).to_have_text("COMPLETED")
    click(page, "Killed between two steps")
    expect(page.get_by_text("The scene has no order yet.")).to_be_visible()
    expect(page.get_by_role("article")).to_have_count(0)
    click(page, "Next")
    expect(picture(page)).to_have_accessible_name(re.compile("charge_payment COMPLETED"))
    click(page, "None")
    expect(page.locator("#scene caption")).to_have_text(re.compile(r", at \d\d:\d\d:\d\d$"))
    click(page, "Next scene")
    expect(page.get_by_text("Scene 6: Killed after the last step (the fourth")).to_be_visible()
    expect(page.get_by_text("The scene has no order yet.")).to_be_visible()
    expect(page.get_by_role("article")).to_have_count(0)
    click(page, "Leave the scene")
    expect(page.get_by_text("✓ played")).to_have_count(1)


def edges(page: Page, *kinds: str) -> list[list[list[float]]]:
    """Where the elements of each kind begin and end, in one drawing: the next one may differ."""
    code = """(chart, kinds) => kinds.map(kind => [...chart.querySelectorAll(kind)].map(one => {
        const { x, width } = one.getBBox();
        return [x, x + width];
    }))"""
    found: list[list[list[float]]] = picture(page).evaluate(code, kinds)
    return found


def test_a_signal_queues_a_suspended_order(browser: Browser, database: str) -> None:
    with open_lab("14") as lab, opened(browser, lab) as page:
        start_worker(page, "A")
        click(page, "One to approve")
        # A slow machine may suspend it once before, while it waits for its charge.
        expect(picture(page)).to_have_accessible_name(re.compile("; approval "))
        expect(status_of_task(page)).to_have_text("SUSPENDED")
        click(page, "Kill -9: worker A")
        # What the order has survived is in its picture.
        expect(picture(page).locator("text", has_text="kill -9 A")).to_be_visible()
        expect(page.locator(".legend").get_by_text("SUSPENDED: nobody has it")).to_be_visible()
        expect(page.locator(".legend").get_by_text("SLEEPING")).to_be_visible()
        click(page, "Send")
        expect(status_of_task(page)).to_have_text("QUEUED")
        expect(picture(page).locator("text", has_text="signal")).to_be_visible()
        (_, signal), suspended, queued = edges(page, ".moment", ".suspended", ".queued")
        chosen = lab.open_page(1).state["chosen"]
        (approval,) = [child for child in chosen["children"] if child["name"] == "approval"]
        (sent,) = [moment for moment in chosen["moments"] if moment["what"] == "signal"]
        late = 300 * (approval["finished_at"] - sent["at"])  # pixels at most
        _, end = suspended[-1]
        assert abs(end - signal[0]) < 30 + late, "SUSPENDED until the signal comes"
        assert abs(max(queued)[0] - end) < 2, "and QUEUED from then on"


def test_a_sleep_that_nobody_ends_in_time(browser: Browser, database: str) -> None:
    with open_lab("13") as lab, opened(browser, lab) as page:
        # What a lesson is about comes first in it.
        expect(page.locator(".programme li").first).to_contain_text("this lesson's own")
        click(page, "Killed, and nothing is lost")
        click(page, "Next")
        expect(page.locator(".choices")).to_be_visible()
        expect(picture(page).locator(".due")).to_have_count(1)  # 8 seconds, and nobody runs
        page.locator(".choices button").last.click()
        expect(page.locator(".verdict")).to_have_text("Right:")
        expect(page.locator(".sentence")).to_contain_text("had come while no worker ran")
        expect(picture(page).locator(".due")).to_have_count(1)
        expect(page.locator(".legend").get_by_text("its time had come")).to_be_visible()


def test_a_fork_and_its_branches(browser: Browser, database: str) -> None:
    with open_lab("15") as lab, opened(browser, lab) as page:
        start_worker(page, "A")
        click(page, "An order")
        expect(status_of_task(page)).to_have_text("COMPLETED")
        expect(picture(page).locator("text", has_text="branch")).to_have_count(0)
        page.locator("[name=event]").fill("2")
        click(page, "Fork")
        # A slow machine may suspend an attempt, so there may be more than two.
        for name in ("attempt 1, branch 1", re.compile("attempt [2-5], branch 2")):
            expect(picture(page).locator("text", has_text=name).first).to_be_visible()
        expect(picture(page)).to_have_accessible_name(
            re.compile("attempt [2-5] on worker A: COMPLETED")
        )
        expect(page.locator(".legend").get_by_text("on a branch that was left")).to_be_visible()


def test_two_clicks_are_two_workers(page: Page) -> None:
    page.get_by_role("button", name="Start a worker").dblclick()
    expect(page.get_by_role("article")).to_have_count(2)


def test_time_in_which_nothing_happens_is_folded(page: Page, lab: LabProcess) -> None:
    start_worker(page, "A")
    click(page, "A slow one")
    expect(picture(page)).to_have_accessible_name(re.compile("charge_payment RUNNING"))
    click(page, "Freeze: worker A")
    expect(picture(page).locator(".stale")).to_have_count(2)  # the order, and its step
    expect(page.get_by_text("RUNNING, and nobody runs it")).to_be_visible()
    expect(picture(page).locator(".fold text")).to_have_text(re.compile(r"^\d.* s long, folded$"))
    click(page, "Thaw: worker A")
    expect(status_of_task(page)).to_have_text("COMPLETED")
    expect(picture(page).locator(".fold")).to_have_count(1)
    expect(picture(page).locator(".stale")).to_have_count(2)


def test_a_card_keeps_its_place_and_the_focus(page: Page) -> None:
    start_worker(page, "A")
    start_worker(page, "B")
    click(page, "Kill -9: worker A")
    expect(card(page, "A").get_by_text("killed")).to_be_visible()
    expect(card(page, "A")).to_be_focused()
    keys = page.get_by_role("article").evaluate_all("all => all.map(one => one.dataset.key)")
    assert keys == ["A", "B"]
    click(page, "Forget the dead")
    expect(page.get_by_role("button", name="Start a worker")).to_be_focused()


def test_an_answer_that_is_no_json_is_said(page: Page) -> None:
    page.route("**/api/enqueue", lambda route: route.fulfill(status=500, body="Internal"))
    click(page, "An order")
    expect(page.locator("#notice")).to_have_text(re.compile("The lab has a fault"))


def show(page: Page, is_shown: bool) -> None:
    """What a browser does when its reader turns to another tab, and back. Without a window
    every tab is seen."""
    page.evaluate(
        """isHidden => {
            Object.defineProperty(document, "hidden", { value: isHidden, configurable: true });
            document.dispatchEvent(new Event("visibilitychange"));
        }""",
        not is_shown,
    )


def test_many_tabs_do_not_hinder_each_other(page: Page, lab: LabProcess) -> None:
    tabs = [page]
    for _ in range(6):  # as many connections as a browser has for all of them
        expect(tabs[-1].locator(".programme")).to_be_visible()
        show(tabs[-1], False)
        tabs.append(page.context.new_page())
        tabs[-1].goto(lab.url)
    start_worker(tabs[-1], "A")
    expect(card(page, "A")).to_have_count(0)
    show(page, True)
    expect(card(page, "A").get_by_text("alive")).to_be_visible()
    click(page, "An order")
    expect(status_of_task(page)).to_have_text("COMPLETED")


def test_the_end_of_the_lab_is_shown(page: Page, lab: LabProcess) -> None:
    expect(page.locator(".programme")).to_be_visible()
    lab.process.terminate()
    expect(page.get_by_text("The lab does not answer.")).to_be_visible()


@pytest.mark.parametrize(("scheme", "size"), [("light", WIDE), ("dark", NARROW)])
def test_axe_finds_nothing(
    browser: Browser, lab: LabProcess, scheme: str, size: tuple[int, int]
) -> None:
    with opened(browser, lab, size, color_scheme=scheme) as page:
        expect(page.locator(".programme")).to_be_visible()
        check(page)
        start_worker(page, "A")
        click(page, "Killed after the charge, before its outcome")
        click(page, "Next")
        expect(page.locator(".choices")).to_be_visible()
        check(page)
        click(page, "Two")
        expect(page.locator(".working, .truth").first).to_be_visible()
        check(page)
        expect(page.locator(".answer")).to_contain_text("Not quite. You said “Two”. It was: One")
        check(page)
        page.get_by_role("tab", name="Diff").click()
        expect(page.get_by_role("heading", name="durable_context.py")).to_be_visible()
        # All of it would take half a minute.
        check(page, "header", "#diff nav", "#diff article:nth-of-type(2)")


def check(page: Page, *parts: str) -> None:
    """No violation of the rules of axe in the page, and nothing wider than the window."""
    where = {"include": [[part] for part in parts]} if parts else None
    found = Axe().run(page, context=where).response["violations"]
    assert [(one["id"], [node["html"] for node in one["nodes"]]) for one in found] == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
