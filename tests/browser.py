"""The browser that the machine has, driven by Playwright. Nothing is downloaded."""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, Error, Playwright, sync_playwright

NAMES = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"]
NONE = "there is no Chromium or Chrome here: the lab's page is not tested"


@contextmanager
def running_browser() -> Iterator[Browser | None]:
    """A browser without a window; None if the machine has none.

    Raises playwright.sync_api.Error if there is one that does not start.
    """
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None and sys.platform == "linux":
        yield None  # without Playwright's driver, which lacks libraries where no browser is
        return
    with sync_playwright() as playwright:
        browser = start(playwright, path) if path else start_chrome(playwright)
        yield browser
        if browser:
            browser.close()


def start(playwright: Playwright, path: str) -> Browser:
    """Start a browser. On a busy machine it may not answer in time: then once more."""
    try:
        return playwright.chromium.launch(executable_path=path)
    except Error:
        return playwright.chromium.launch(executable_path=path)


def start_chrome(playwright: Playwright) -> Browser | None:
    """Chrome, where Playwright looks for it on macOS and Windows; None if it is not there."""
    try:
        return playwright.chromium.launch(channel="chrome")
    except Error:
        return None
