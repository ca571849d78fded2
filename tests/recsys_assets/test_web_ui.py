"""The web UI in a real browser: the graph is there, and a partition launched by hand is made."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pytest
from browser import NO_BROWSER, find_browser, lineage_path, open_page
from playwright.sync_api import Error, Page
from recsys_home import QUICK_SPARK_VARIABLE
from test_definitions import GRAPH

from recsys_cli.demo import fix_partitions
from recsys_cli.processes import free_port, pid_file
from recsys_cli.stack import check, running_services
from recsys_core.events import hour_key, key_start_ms
from recsys_core.lake import Lake
from recsys_core.landing import Landing
from recsys_core.simulate import SOURCE, Simulation, SimulationConfig
from recsys_core.tables import CLICKS_HOURLY

pytestmark = pytest.mark.skipif(find_browser() is None, reason=NO_BROWSER)

LAST_HOUR = "2026-01-03T23"
FIRST_OF_SIX, LAST_OF_SIX, BOT_HOUR = "2026-01-02T15", "2026-01-02T20", "2026-01-02T19"
HOURS = 72
PAGE_SECONDS = 60
RUN_SECONDS = 150

GROUP_OF_ASSET = """names => {
    const drawn = [...document.querySelectorAll('foreignObject')].map(node => [node.textContent, node.getBoundingClientRect()]);
    const holds = (outer, inner) => outer.left <= inner.left && inner.right <= outer.right
        && outer.top <= inner.top && inner.bottom <= outer.bottom;
    return names.assets.map(asset => {
        const box = drawn.find(([text]) => text.startsWith(asset))?.[1];
        return [asset, box && drawn.find(([text, outer]) => names.groups.includes(text) && holds(outer, box))?.[0]];
    });
}"""
"""For each asset the group in whose frame it is drawn."""


@dataclass(frozen=True)
class Stack:
    """A running stack: its home and the address of its web UI."""

    home: Path
    url: str


def wait_for(condition: Callable[[], bool], seconds: float, what: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.2)


def processes_of(home: Path) -> list[str]:
    """Processes whose command line names the home."""
    listed = subprocess.run(["ps", "-eo", "pid=,args="], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if str(home) in line]


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    """Three days of a small clickstream in the landing zone of a new home, the partitions of which end with it.

    One of its hours is all a bot's.
    """
    home = tmp_path_factory.mktemp("web-ui") / "home"
    made = Simulation(SimulationConfig(users=200, items=120, days=3, events=8000, end=key_start_ms("2026-01-04")))
    home.mkdir()
    filled = Lake(str(home / "lake"))
    made.write_catalog(filled)
    for batch in made.batches():
        hour, events = hour_key(batch.arrival_ms), batch.events
        if hour == BOT_HOUR:
            at = events.schema.get_field_index("user_id")
            events = events.set_column(at, events.schema.field(at), pa.array(["bot"] * events.num_rows))
        if events.num_rows:
            Landing(filled).write_events(SOURCE, hour, events)
    fix_partitions(home, made.config.start_ms, made.config.end_ms - 1)
    return filled


@pytest.fixture(scope="module")
def stack(lake: Lake) -> Iterator[Stack]:
    """`recsys up` in that home, on ports of its own."""
    home = Path(lake.uri).parent
    (home / "empty.toml").touch()
    own = {
        "RECSYS_CONFIG": str(home / "empty.toml"),
        "RECSYS_DAGSTER__PORT": str(free_port()),
        "RECSYS_SERVING__PORT": str(free_port()),
        "RECSYS_SPARK__SHUFFLE_PARTITIONS": "1",
        **QUICK_SPARK_VARIABLE,
        # The partitions are over, so that schedules and sensors run and find nothing to do.
        "RECSYS_DAGSTER__AUTOMATION": "true",
        "RECSYS_REDIS__URL": f"redis://127.0.0.1:{free_port()}/0",
    }
    log = home / "up.log"
    with log.open("w") as output:
        up = subprocess.Popen(
            [sys.executable, "-m", "recsys_cli.main", "up", "--home", str(home)],
            env={**os.environ, **own},
            cwd=home,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def ready() -> bool:
        assert up.poll() is None, log.read_text()
        services = {service.name: service for service in running_services(home)}
        return all(
            name in services
            and pid_file(home, name).is_file()
            and not check(services[name], int(pid_file(home, name).read_text()))
            for name in ("redis", "webserver", "daemon")
        )

    try:
        wait_for(ready, PAGE_SECONDS, log.read_text)
        yield Stack(home, next(service.where for service in running_services(home) if service.name == "webserver"))
    finally:
        up.send_signal(signal.SIGTERM)
        try:
            up.wait(30)
        except subprocess.TimeoutExpired:
            up.kill()
            up.wait()
    wait_for(lambda: not processes_of(home), 15, lambda: "\n".join(processes_of(home)))


@pytest.fixture
def page() -> Iterator[Page]:
    # So large that the graph is drawn with all details and whole names.
    with open_page(2500, 2100, PAGE_SECONDS) as opened:
        yield opened


@contextmanager
def step(page: Page, what: str, folder: Path) -> Iterator[None]:
    """A step in the browser; the error of one that fails names a picture of the page."""
    try:
        yield
    except (Error, AssertionError) as error:
        picture = folder / f"{what.replace(' ', '-')}.png"
        page.screenshot(path=picture)
        raise AssertionError(f"{what} failed at {page.url}, see {picture}: {error}") from error


def test_the_lineage_page_shows_every_asset_in_its_group(stack: Stack, page: Page, tmp_path: Path) -> None:
    groups = sorted({str(asset["group"]) for asset in GRAPH.values()})
    # Large enough for the graph to be drawn with whole names.
    page.set_viewport_size({"width": 3200, "height": 2400})
    with step(page, "lineage", tmp_path):
        page.goto(stack.url + lineage_path(groups), wait_until="domcontentloaded")
        for name in (*groups, *GRAPH):
            page.locator("foreignObject").get_by_text(name, exact=True).first.wait_for()
        found = page.evaluate(GROUP_OF_ASSET, {"assets": list(GRAPH), "groups": groups})
        assert dict(found) == {name: asset["group"] for name, asset in GRAPH.items()}


def test_an_hour_launched_on_the_page_of_an_asset_is_made_and_checked(
    stack: Stack, page: Page, lake: Lake, tmp_path: Path
) -> None:
    assert lake.find(CLICKS_HOURLY, LAST_HOUR) is None
    with step(page, "partitions", tmp_path):
        page.goto(f"{stack.url}/assets/clicks_hourly?view=partitions", wait_until="domcontentloaded")
        page.get_by_text(f"Missing ({HOURS})").wait_for()
        page.get_by_text(LAST_HOUR, exact=True).first.wait_for()
    with step(page, "launch", tmp_path):
        page.get_by_role("button", name="Materialize").first.click()
        dialog = page.get_by_role("dialog")
        dialog.get_by_role("button", name="Latest").click()
        dialog.get_by_text("1 partition", exact=True).wait_for()
        dialog.get_by_role("button", name="Launch 1 run").click()
        page.get_by_text("Launched run").wait_for()
        page.get_by_text("View", exact=True).last.click()
    with step(page, "run", tmp_path):
        page.wait_for_url(re.compile("/runs/"))
        page.get_by_text(re.compile("^(Success|Failure|Canceled)$")).first.wait_for(timeout=RUN_SECONDS * 1000)
        assert page.get_by_text("Success", exact=True).first.is_visible()
        page.get_by_text(f"partition: {LAST_HOUR}").first.wait_for()
    with step(page, "result", tmp_path):
        page.goto(f"{stack.url}/assets/clicks_hourly?view=partitions", wait_until="domcontentloaded")
        page.get_by_text("Materialized (1)").wait_for()
        page.goto(f"{stack.url}/assets/clicks_hourly?view=checks", wait_until="domcontentloaded")
        for name in ("event_ids_are_unique", "events_lie_in_their_hour"):
            page.get_by_text(name).first.wait_for()
    assert lake.get(CLICKS_HOURLY, LAST_HOUR).rows > 0


def test_six_hours_launched_from_the_dialog_are_made_and_the_bad_one_is_shown_with_its_report(
    stack: Stack, page: Page, lake: Lake, tmp_path: Path
) -> None:
    with step(page, "backfill", tmp_path):
        page.goto(f"{stack.url}/assets/clicks_hourly?view=partitions", wait_until="domcontentloaded")
        page.get_by_text(re.compile(r"^Missing \(\d+\)$")).first.wait_for()
        page.get_by_role("button", name="Materialize").first.click()
        dialog = page.get_by_role("dialog")
        chosen = dialog.get_by_placeholder(re.compile("^ex: "))
        chosen.fill(f"[{FIRST_OF_SIX}...{LAST_OF_SIX}]")
        chosen.press("Enter")
        dialog.get_by_text("6 partitions", exact=True).wait_for()
        dialog.get_by_role("button", name="Launch backfill").click()
        dialog.wait_for(state="hidden")
    wait_for(lambda: lake.find(CLICKS_HOURLY, LAST_OF_SIX) is not None, RUN_SECONDS, lambda: "the backfill made nothing")
    assert lake.get(CLICKS_HOURLY, BOT_HOUR).rows > 100
    with step(page, "failing check", tmp_path):
        wait_for(lambda: "users_are_many" in str(kept_verdict(lake)), RUN_SECONDS, lambda: str(kept_verdict(lake)))
        page.goto(f"{stack.url}/assets/clicks_hourly?view=checks&checkDetail=users_are_many", wait_until="domcontentloaded")
        page.get_by_text("failing rows").first.wait_for(timeout=RUN_SECONDS * 1000)
        page.get_by_text("report", exact=True).first.wait_for()
    with step(page, "finished", tmp_path):
        page.goto(f"{stack.url}/runs?view=backfills", wait_until="domcontentloaded")
        page.get_by_text(f"{FIRST_OF_SIX}").or_(page.get_by_text("6 partitions")).first.wait_for()
        wait_for(
            lambda: backfill_states(page, stack) == ["COMPLETED_SUCCESS"],
            RUN_SECONDS,
            lambda: str(backfill_states(page, stack)),
        )


def kept_verdict(lake: Lake) -> object:
    kept = lake.find("clicks_profile", BOT_HOUR[:10])
    return kept.extra["hours"].get(BOT_HOUR) if kept else None


def ask(page: Page, stack: Stack, query: str) -> dict:
    """What the live web server answers to a query of its own pages."""
    answer = page.request.post(f"{stack.url}/graphql", data={"query": query})
    return dict(answer.json()["data"])


def backfill_states(page: Page, stack: Stack) -> list[str]:
    found = ask(page, stack, "{ partitionBackfillsOrError { ... on PartitionBackfills { results { status } } } }")
    return [backfill["status"] for backfill in found["partitionBackfillsOrError"]["results"]]


def test_schedules_and_sensors_are_listed_and_running(stack: Stack, page: Page, tmp_path: Path) -> None:
    names = {"arrivals_schedule", "hourly_schedule", "nightly_schedule", "compact_job_schedule", "prune_job_schedule"}
    names |= {"alerts", "automation", "champion_promoted", "late_hours", "missed_hours", "missed_nights", "stream_observed"}
    with step(page, "automation", tmp_path):
        page.goto(f"{stack.url}/automation", wait_until="domcontentloaded")
        for name in names:
            page.get_by_text(name, exact=True).first.wait_for()
    found = ask(
        page,
        stack,
        "{ repositoriesOrError { ... on RepositoryConnection { nodes { sensors { name sensorState { status } } "
        "schedules { name scheduleState { status } } } } } }",
    )
    (repository,) = found["repositoriesOrError"]["nodes"]
    states = {sensor["name"]: sensor["sensorState"]["status"] for sensor in repository["sensors"]}
    states |= {schedule["name"]: schedule["scheduleState"]["status"] for schedule in repository["schedules"]}
    assert states == dict.fromkeys(names, "RUNNING")
