"""The browser that the machine has, driven by Playwright. Nothing is downloaded."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, Error, sync_playwright

NAMES = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"]
NONE = "there is no Chromium or Chrome here: the lab's page is not tested"


@contextmanager
def running_browser() -> Iterator[Browser | None]:
    """A browser without a window; None if the machine has none."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    with sync_playwright() as playwright:
        try:
            # Without a path Playwright looks where Chrome is on macOS and Windows.
            channel = None if path else "chrome"
            browser = playwright.chromium.launch(executable_path=path, channel=channel)
        except Error:
            browser = None
        yield browser
        if browser:
            browser.close()
