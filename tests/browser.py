"""Headless Chromium with the web UI of Dagster in it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Page

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MAC_APPLICATION = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")
NO_BROWSER = f"no Chromium or Chrome on PATH ({', '.join(NAMES)}) or in /Applications; Debian: apt-get install chromium"
ARGUMENTS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
LOOK = """
localStorage.setItem('dagster-nav-collapsed', 'true');
localStorage.setItem('asset-graph-direction', '"vertical"');
"""
"""What the UI remembers of a user: here that the navigation is folded and that the graph runs from top to bottom."""


def find_browser() -> str | None:
    """The path of a Chromium or Chrome, None when there is none."""
    on_path = next(filter(None, map(shutil.which, NAMES)), None)
    return on_path or (str(MAC_APPLICATION) if MAC_APPLICATION.is_file() else None)


@contextmanager
def open_page(width: int, height: int, seconds: float) -> Iterator[Page]:
    """A page in a window of that many pixels, in which every wait ends after `seconds`."""
    from playwright.sync_api import sync_playwright

    path = find_browser()
    if path is None:
        raise FileNotFoundError(NO_BROWSER)
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        try:
            page = started.new_page(viewport={"width": width, "height": height}, color_scheme="light")
            page.set_default_timeout(seconds * 1000)
            page.add_init_script(LOOK)
            yield page
        finally:
            started.close()


def lineage_path(groups: list[str]) -> str:
    """The route of the lineage of all assets with these groups opened."""
    return "/asset-groups?expanded=" + ",".join(f"global%40global%3A{group}" for group in groups)
