"""Headless Chromium, and the folder for its pictures."""
import shutil

import pytest

from lib import root

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="session")
def chromium():
    """Debian's Chromium or another one in the path, else the one that `playwright install chromium` fetched."""
    from playwright.sync_api import sync_playwright
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def shots():
    """Where screenshots are left to be looked at: build/shots."""
    folder = root() / "build" / "shots"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
