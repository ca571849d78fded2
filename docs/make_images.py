"""The README's pictures: screenshots of the web UI of a home in which the demo has been run.

    python docs/make_images.py [--home .recsys/demo] [--out docs/images] [--failed clicks_hourly/users_are_many]

Needs playwright (the extra `dev`) and a Chromium or Chrome.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, build_opener

from recsys_cli.processes import LOOPBACK, free_port, running, wait_until
from recsys_cli.stack import PROJECT, prepare_dagster_home
from recsys_core.settings import HOME_VARIABLE

sys.path.insert(0, str(PROJECT / "tests"))  # shares the browser with the tests
from browser import NO_BROWSER, find_browser, lineage_path, open_page

GROUPS = ["ingestion", "features", "models", "retrieval", "serving"]
MARGIN = 16
SECONDS = 60
SETTLED_MS = 5000
"""The graph moves into place and its states come in."""

EXTENT = """() => {
    const boxes = [...document.querySelectorAll('foreignObject')].map(node => node.getBoundingClientRect());
    return [Math.min(...boxes.map(b => b.left)), Math.min(...boxes.map(b => b.top)),
            Math.max(...boxes.map(b => b.right)), Math.max(...boxes.map(b => b.bottom))];
}"""
"""The rectangle around all nodes and groups of the graph."""


@contextmanager
def web_ui(home: Path) -> Iterator[str]:
    """The address of the web UI of a home, which runs while the block does."""
    port = free_port()
    url = f"http://{LOOPBACK}:{port}"
    environment = {HOME_VARIABLE: str(home), "DAGSTER_HOME": str(prepare_dagster_home(home))}
    command = [
        sys.executable,
        "-m",
        "dagster_webserver",
        "-h",
        LOOPBACK,
        "-p",
        str(port),
        "-w",
        str(PROJECT / "workspace.yaml"),
    ]

    def answers() -> bool:
        try:
            return bool(build_opener(ProxyHandler({})).open(f"{url}/server_info", timeout=5).status == 200)
        except OSError:
            return False

    with running("webserver-images", home, command, environment) as check:
        wait_until(answers, "the web UI", SECONDS, check)
        yield url


def graph(url: str, out: Path) -> None:
    """The lineage of all assets, cut to the graph."""
    with open_page(1600, 1240, SECONDS) as page:
        page.goto(url + lineage_path(GROUPS), wait_until="domcontentloaded")
        page.get_by_text("rec_cache").first.wait_for()
        page.add_style_tag(content="#zoom-slider-container { display: none }")
        page.wait_for_timeout(SETTLED_MS)
        left, top, right, bottom = page.evaluate(EXTENT)
        page.screenshot(path=out, clip=rectangle(left - MARGIN, top - MARGIN, right + MARGIN, bottom + MARGIN))


def evaluation(url: str, out: Path) -> None:
    """The page of the asset `evaluation`, down to the table of the models."""
    with open_page(1500, 1400, SECONDS) as page:
        page.goto(f"{url}/assets/evaluation", wait_until="domcontentloaded")
        page.get_by_text("served ranking").first.wait_for()
        page.wait_for_timeout(SETTLED_MS)
        below = page.get_by_text("View in graph").bounding_box()
        page.screenshot(path=out, clip=rectangle(0, 0, 1500, below["y"] - MARGIN if below else 1400))


def failing_check(url: str, out: Path, asset: str = "clicks_hourly", check: str = "users_are_many") -> None:
    """The page of a check that failed, with the rows that failed it; for a home in which it did."""
    with open_page(1500, 1000, SECONDS) as page:
        page.goto(f"{url}/assets/{asset}?view=checks&checkDetail={check}", wait_until="domcontentloaded")
        page.get_by_text("failing rows").first.wait_for()
        page.get_by_text("[Show Markdown]").first.click()
        page.get_by_role("dialog").get_by_text("what").first.wait_for()
        page.wait_for_timeout(SETTLED_MS)
        page.screenshot(path=out)


def partitions(url: str, out: Path, asset: str = "clicks_hourly") -> None:
    """The partitions of an asset."""
    with open_page(1500, 900, SECONDS) as page:
        page.goto(f"{url}/assets/{asset}?view=partitions", wait_until="domcontentloaded")
        page.get_by_text("Materialized (").first.wait_for()
        page.wait_for_timeout(SETTLED_MS)
        page.screenshot(path=out)


def automation(url: str, out: Path) -> None:
    """Schedules and sensors, and whether they run."""
    with open_page(1500, 800, SECONDS) as page:
        page.goto(f"{url}/automation", wait_until="domcontentloaded")
        page.get_by_text("hourly_schedule").first.wait_for()
        page.wait_for_timeout(2 * SETTLED_MS)
        page.screenshot(path=out)


def rectangle(left: float, top: float, right: float, bottom: float) -> Any:
    """What `screenshot` calls a clip."""
    return {"x": left, "y": top, "width": right - left, "height": bottom - top}


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the README's pictures.")
    parser.add_argument("--home", type=Path, default=Path(".recsys/demo"))
    parser.add_argument("--out", type=Path, default=PROJECT / "docs" / "images")
    parser.add_argument("--failed", help="ASSET/CHECK of a check that failed in that home, for a picture of it")
    options = parser.parse_args()
    if not (options.home / "releases" / "champion.json").is_file():
        sys.exit(f"{options.home} holds no release: run `make demo` first")
    if find_browser() is None:
        sys.exit(NO_BROWSER)
    options.out.mkdir(parents=True, exist_ok=True)
    with web_ui(options.home.absolute()) as url:
        graph(url, options.out / "graph.png")
        evaluation(url, options.out / "evaluation.png")
        partitions(url, options.out / "partitions.png")
        automation(url, options.out / "automation.png")
        if options.failed:
            failing_check(url, options.out / "check.png", *options.failed.split("/"))


if __name__ == "__main__":
    main()
