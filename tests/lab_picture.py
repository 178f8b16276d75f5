"""The picture of the lab in the root README, from a real run: python tests/lab_picture.py"""

from pathlib import Path

import browser
from lab_process import open_lab

PICTURE = Path(__file__).parent.parent / "shared" / "lab" / "picture.png"
SECONDS = 60_000  # in ms


def main() -> None:
    """Play a scene to its end, with the lesson's own constants, and take its picture."""
    lesson = open_lab("07", HEARTBEAT_INTERVAL=1.0, INACTIVE_AFTER=5.0)
    with lesson as lab, browser.running_browser() as chromium:
        if chromium is None:
            raise SystemExit(browser.NONE)
        page = chromium.new_page(
            viewport={"width": 1280, "height": 800}, device_scale_factor=2, color_scheme="light"
        )
        page.goto(lab.url)
        page.get_by_role("button", name="Killed after the charge").click()
        page.get_by_role("button", name="Next").click()
        one = page.get_by_role("button", name="One", exact=True)
        one.wait_for(timeout=SECONDS)
        page.wait_for_timeout(2000)  # a reader has to read the question first
        one.click()
        page.locator(".verdict").wait_for(timeout=SECONDS)
        page.get_by_text("0 of 20").wait_for(timeout=SECONDS)  # the worker has told that, too
        page.screenshot(path=PICTURE)


if __name__ == "__main__":
    main()
