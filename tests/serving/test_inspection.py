"""The page for people: what it answers, and what a browser shows of it."""

from __future__ import annotations

import json
import socket
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator

import pytest
import uvicorn
from browser import NO_BROWSER, find_browser, open_page
from worlds import World, eventually, now_ms

from recsys_core.catalog import CATALOG_SCHEMA, merge_catalog
from recsys_core.lake import Lake
from recsys_core.online import UserRecord
from serving.client import ClientOptions
from serving.inspection import app, run


@pytest.fixture
def page(world: World) -> Iterator[str]:
    """The page's address; user `ann` acted on two items, the catalogue has their titles."""
    import pyarrow as pa

    items = world.snapshot.items.slice(0, 60).select(CATALOG_SCHEMA.names).cast(CATALOG_SCHEMA)
    merge_catalog(Lake(world.settings.lake_uri), pa.table(items))
    last = (("item-25", "click", now_ms() - 60_000), ("item-17", "view", now_ms() - 120_000))
    world.put_record("ann", UserRecord(last=last, last_ts=last[0][2], seen=("item-2", "item-400")))
    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        app(world.settings, world.address, ClientOptions(timeout=10), "http://dagster:3000", ["ops.shop.example"]),
        log_level="warning",
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    eventually(lambda: server.started)
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    thread.join()


def ask(page: str, path: str) -> tuple[int, dict]:
    try:
        with urllib.request.urlopen(page + path, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_a_user_has_history_features_and_an_explained_answer(page: str) -> None:
    status, said = ask(page, "/api/user/ann")
    assert status == 200
    assert [(a["item_id"], a["title"], a["event_type"]) for a in said["last"]] == [
        ("item-25", "Title 25", "click"),
        ("item-17", "Title 17", "view"),
    ]
    assert said["seen"] == [{"item_id": "item-2", "title": "Title 2"}, {"item_id": "item-400", "title": ""}]
    assert said["served"]["tier"] == "REALTIME_ALS_ONLY"
    for item in said["answer"]["items"]:
        assert sum(item["shares"].values()) == pytest.approx(item["score"], abs=1e-4)
        assert item["sources"]


def test_nobody_has_what_is_popular(page: str) -> None:
    status, said = ask(page, "/api/user/" + urllib.parse.quote("no/such user", safe=""))
    assert status == 200
    assert (said["known"], said["served"]["tier"], said["last"]) == (False, "POPULAR", [])


def test_what_the_server_refuses_is_said(page: str) -> None:
    assert ask(page, "/api/item/never") == (404, {"error": "NOT_FOUND: item_id 'never' is not in release 2026-01-01.a"})
    assert ask(page, "/api/user/" + "x" * 300)[0] == 400
    assert ask(page, "/api/user/ann?count=many") == (400, {"error": "count is 'many'; it must be a whole number"})
    assert ask(page, "/api/user/ann?count=-99999999999")[0] == 400


def test_a_catalogue_that_cannot_be_read_is_said(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(_: Lake) -> None:
        raise OSError("the store is away")

    monkeypatch.setattr("serving.inspection.read_catalog", away)
    assert ask(page, "/api/user/ann") == (500, {"error": "OSError: the log of `recsys inspect` says more"})


def test_the_release_links_to_its_assets(page: str) -> None:
    _, said = ask(page, "/api/release")
    assert said["release_id"] == "2026-01-01.a"
    assert said["sources"][0]["url"] == "http://dagster:3000/assets/als_factors?view=partitions&partition=2026-01-01"
    assert said["sources"][1]["url"] == "http://dagster:3000/assets/item_catalog?view=lineage"


def asked_as(page: str, host: str) -> int:
    """The status of a question by a browser that believes that `host` is here."""
    request = urllib.request.Request(f"{page}/api/user/ann", headers={"Host": host})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_the_page_answers_to_no_name_but_its_own(page: str) -> None:
    """The page of somebody else may give its own name this address, and then ask what it likes."""
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.evil.example", "*", ""):
        for path in ("/", "/api/user/ann", "/api/item/item-1", "/api/release", "/nowhere"):
            request = urllib.request.Request(page + path, headers={"Host": host})
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(request, timeout=60)
            assert caught.value.code == 400, (host, path)
            assert b"item" not in caught.value.read()


def test_the_page_answers_to_the_names_of_this_machine_and_those_that_are_allowed(page: str) -> None:
    port = page.rpartition(":")[2]
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", f"[::1]:{port}", "LOCALHOST", "ops.shop.example"):
        assert asked_as(page, host) == 200, host


class Opened(Exception):
    """Ends a page that could be reached."""


def test_the_page_can_be_reached_as_soon_as_its_address_is_said(world: World) -> None:
    def open_at_once(url: str) -> None:
        with socket.create_connection(("127.0.0.1", urllib.parse.urlsplit(url).port), timeout=5):
            raise Opened

    with pytest.raises(Opened):
        run(world.settings, world.address, ClientOptions(), "127.0.0.1", 0, "http://127.0.0.1:3000", open_at_once)


def test_what_moved_an_item_has_its_title(page: str) -> None:
    _, said = ask(page, "/api/user/ann")
    assert {m["title"] for item in said["answer"]["items"] for m in item["moved_by"]} <= {"Title 25", "Title 17"}
    assert any(item["moved_by"] for item in said["answer"]["items"])


@pytest.mark.skipif(find_browser() is None, reason=NO_BROWSER)
def test_a_person_sees_the_answer_its_bars_similar_items_and_the_lineage(page: str) -> None:
    with open_page(1400, 900, 60) as browser:
        browser.goto(page)
        browser.get_by_text("2026-01-01.a").first.wait_for()
        assert browser.get_by_role("link", name="als_factors").get_attribute("href").startswith("http://dagster:3000/assets/")
        browser.get_by_placeholder("user id").fill("ann")
        browser.get_by_role("button", name="Show").click()
        browser.get_by_text("Title 25").first.wait_for()
        assert browser.locator("#tier").inner_text() == "REALTIME_ALS_ONLY"
        assert browser.locator("tr.item").count() == 10
        assert browser.locator("tr.item .bar span").count() >= 10
        width = browser.locator("tr.item .bar span").first.bounding_box()["width"]
        assert width > 10
        browser.locator("tr.item").first.click()
        browser.get_by_text("cosine").wait_for()
        browser.get_by_placeholder("user id").fill("<img src=x onerror=alert(1)>")
        browser.get_by_role("button", name="Show").click()
        browser.get_by_text("Nothing is known of this user.").wait_for()
        assert browser.locator("img").count() == 0
