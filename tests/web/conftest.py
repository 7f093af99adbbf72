"""A real Chromium that opens pages from disk with the network off, and tells what it complained of."""

import contextlib
import shutil
import time
from pathlib import Path

import pytest

from web.page import page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE = 120  # seconds


@pytest.fixture(scope="session")
def browser():
    """A browser without a window. Skips where there is no Playwright or no Chromium."""
    sync_api = pytest.importorskip("playwright.sync_api",
                                   reason="playwright is missing: pip install -r requirements-web.txt")
    if CHROMIUM is None:
        pytest.skip("chromium is missing: apt-get install chromium, or another way to install it")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Opened:
    """An open page: Playwright's page, and what it said in the console, and what it asked for beyond its own file."""

    def __init__(self, browser, path: Path, address: str, **options):
        self.context = browser.new_context(offline=True, **options)
        self.page, self.complaints, self.requests = self.context.new_page(), [], []
        self.page.set_default_timeout(1000 * PATIENCE)
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.context.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(f"{path.resolve().as_uri()}{address}")
        self.requests = [url for url in self.requests if not url.startswith(path.resolve().as_uri())]

    def wait(self, condition: str):
        """Wait until an expression of the page is true, and return its value; the page forbids what Playwright has."""
        end = time.monotonic() + PATIENCE
        while not (value := self.page.evaluate(condition)):
            assert time.monotonic() < end, f"never: {condition}; {self.complaints}"
            time.sleep(0.02)
        return value

    def made(self) -> str:
        """Wait until an image is made and shown; what the page then tells."""
        return self.wait("film.done && film.timer === null && $('told').textContent")


@pytest.fixture
def opened(browser, tmp_path):
    """opened(models or a path, address="", **options of the context) -> an Opened page, without complaints to the end.

    At the end no page has complained, and none has asked for anything but its own file and its own worker.
    """
    with contextlib.ExitStack() as stack:
        pages = []

        def open_page(models, address="", **options):
            path = models
            if not isinstance(models, Path):
                path = tmp_path / f"page{len(pages)}.html"
                path.write_text(page(models), encoding="utf-8")
            pages.append(Opened(browser, path, address, **options))
            stack.callback(pages[-1].context.close)
            return pages[-1]
        yield open_page
        for each in pages:
            assert each.complaints == []
            assert [url for url in each.requests if not url.startswith(("blob:null/", "blob:file:", "data:,"))] == []
