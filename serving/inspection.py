"""A page for people: a user's history and live features, the answer with its parts as bars, similar items, the release.

A small companion of the server: it calls it over gRPC, reads the user's record from Redis and titles from the catalogue.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from recsys_core.catalog import read_catalog
from recsys_core.lake import Lake
from recsys_core.online import CorruptValue
from recsys_core.settings import Settings
from serving.client import AsyncRecsysClient, ClientOptions, Recommendation, RecsysError
from serving.store import Store

log = logging.getLogger(__name__)

PAGE = Path(__file__).with_name("inspection.html")
SHOWN = 50
LOOPBACK_NAMES = ("127.0.0.1", "localhost", "::1", "[::1]")
STATUSES = {"INVALID_ARGUMENT": 400, "NOT_FOUND": 404, "UNAUTHENTICATED": 401, "PERMISSION_DENIED": 403}
HEADERS = {
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class Titles:
    """Titles of items from the catalogue of the lake; none where there is no catalogue."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    @cached_property
    def _catalog(self) -> pa.Table:
        return read_catalog(Lake(self._settings.lake_uri)).select(["item_id", "title"])

    def of(self, item_ids: Iterable[str]) -> dict[str, str]:
        """Title by item id, for those that have one."""
        wanted = pa.array(list(dict.fromkeys(item_ids)), pa.string())
        at = pc.index_in(wanted, value_set=self._catalog["item_id"].combine_chunks())
        titles = self._catalog["title"].take(at).to_pylist()
        return {item: title for item, title in zip(wanted.to_pylist(), titles, strict=True) if title}


class Inspection:
    """The page's questions."""

    def __init__(self, settings: Settings, client: AsyncRecsysClient, store: Store, dagster_url: str) -> None:
        self._client = client
        self._store = store
        self._titles = Titles(settings)
        self._dagster = dagster_url.rstrip("/")

    async def user(self, request: Request) -> Response:
        """What is known of a user, and the answer with everything that can be said of it."""
        user_id = request.path_params["user_id"]
        given = request.query_params.get("count", "10")
        try:
            count = min(max(int(given), 0), 100)
        except ValueError:
            return JSONResponse({"error": f"count is {given!r}; it must be a whole number"}, 400)
        [raw] = await self._store.read((user_id.encode(),))
        state = self._store.state(user_id, raw)
        try:
            record: Any = state.record()
        except CorruptValue as error:
            return JSONResponse({"error": str(error)}, 500)
        served = await self._client.recommend(user_id, count)
        answer = await self._client.recommend(user_id, count, explain=True)
        shown = [item for item, _, _ in record.last[:SHOWN]] + list(record.seen[:SHOWN])
        titles = await asyncio.to_thread(self._titles.of, shown)
        return JSONResponse(
            {
                "user_id": user_id,
                "known": record.known,
                "last": [
                    {"item_id": item, "title": titles.get(item, ""), "event_type": kind, "ts_ms": ts}
                    for item, kind, ts in record.last[:SHOWN]
                ],
                "last_ts": record.last_ts,
                "seen": [{"item_id": item, "title": titles.get(item, "")} for item in record.seen[:SHOWN]],
                "seen_total": record.items_had,
                "als_version": record.als_version,
                "cached": None
                if state.answer is None
                else {"release_id": state.answer.release_id, "computed_at": state.answer.computed_at},
                "now": time.time_ns() // 1_000_000,
                "served": {"tier": served.tier, "milliseconds": served.milliseconds, "release_id": served.release_id},
                "answer": explained(answer),
            }
        )

    async def item(self, request: Request) -> Response:
        """Items like one item."""
        found = await self._client.similar_items(request.path_params["item_id"], 10)
        return JSONResponse({"items": [item._asdict() for item in found], "release_id": found.release_id})

    async def release(self, request: Request) -> Response:  # noqa: ARG002
        """The release in service, each asset behind it with its page in the Dagster UI."""
        release = await self._client.get_release()
        said = asdict(release)
        for name in ("created_at", "promoted_at", "loaded_at"):
            said[name] = said[name].isoformat()
        if said["last_refused"]:
            said["last_refused"]["refused_at"] = said["last_refused"]["refused_at"].isoformat()
        for source in said["sources"]:
            source["url"] = asset_url(self._dagster, source["asset"], source["partition"])
        said["url"] = asset_url(self._dagster, "release", release.day)
        return JSONResponse(said)


def explained(answer: Recommendation) -> dict[str, Any]:
    """An explained answer; `shares` are weight · part of each item, whose sum is its score."""
    weights = answer.weights or {}
    items = []
    for item in answer:
        parts = item.parts or {}
        shares = {name: weights.get(name, 0.0) * value for name, value in parts.items()}
        items.append({**item._asdict(), "moved_by": [m._asdict() for m in item.moved_by], "shares": shares})
    return {
        "tier": answer.tier,
        "release_id": answer.release_id,
        "milliseconds": answer.milliseconds,
        "weights": weights,
        "items": items,
    }


def asset_url(dagster_url: str, asset: str, partition: str) -> str:
    """The page of an asset in the Dagster UI, at the partition where there is one."""
    return f"{dagster_url}/assets/{asset}" + (f"?view=partitions&partition={partition}" if partition else "?view=lineage")


def app(settings: Settings, address: str, options: ClientOptions, dagster_url: str, hosts: Sequence[str] = ()) -> Starlette:
    """The page and its questions, for the server at `address`.

    It answers under the names of this machine's loopback and under `hosts`: another name in a request is that of a page of
    somebody else, whose name now leads here (DNS rebinding) and who would read every user's history.
    """

    @asynccontextmanager
    async def lifespan(made: Starlette) -> AsyncIterator[None]:
        client = AsyncRecsysClient(address, options=options)
        store = Store(settings.redis, settings.cache.ttl_seconds)
        inspection = Inspection(settings, client, store, dagster_url)
        made.router.routes.extend(
            [
                Route("/api/user/{user_id:path}", _answered(inspection.user)),
                Route("/api/item/{item_id:path}", _answered(inspection.item)),
                Route("/api/release", _answered(inspection.release)),
            ]
        )
        yield
        await client.close()
        await store.close()

    trusted = Middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK_NAMES, *hosts], www_redirect=False)
    return Starlette(routes=[Route("/", _page)], middleware=[trusted], lifespan=lifespan)


async def _page(request: Request) -> Response:  # noqa: ARG001
    return FileResponse(PAGE, headers=HEADERS)


def _answered(question: Callable[[Request], Any]) -> Callable[[Request], Any]:
    """What the server refuses, and what fails here, becomes an error that the page shows."""

    async def answered(request: Request) -> Response:
        try:
            response: Response = await question(request)
        except RecsysError as error:
            return JSONResponse({"error": str(error)}, STATUSES.get(error.status, 503), headers=HEADERS)
        except Exception as error:
            log.exception("a question of the page failed")
            said = f"{type(error).__name__}: the log of `recsys inspect` says more"
            return JSONResponse({"error": said}, 500, headers=HEADERS)
        response.headers.update(HEADERS)
        return response

    return answered


def run(
    settings: Settings,
    address: str,
    options: ClientOptions,
    host: str,
    port: int,
    dagster_url: str,
    on_ready: Callable[[str], None],
    hosts: Sequence[str] = (),
) -> None:
    """Serve the page until SIGTERM or Ctrl-C. `on_ready` gets its address, `hosts` are further names that it answers to.

    Raises OSError, which names the port and the option, when it is taken.
    """
    import socket

    import uvicorn

    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        # Whoever opens the page at once waits for it.
        listening.listen()
    except OSError as error:
        listening.close()
        reason = f"is something else there? --port chooses another one ({error.strerror})"
        raise OSError(f"can't serve the page on {host}:{port}, {reason}") from error
    config = uvicorn.Config(app(settings, address, options, dagster_url, [host, *hosts]), log_level="warning")
    on_ready(f"http://{host}:{listening.getsockname()[1]}")
    uvicorn.Server(config).run(sockets=[listening])
