"""The gRPC process: binds the service to its parts, follows the release, drains on SIGTERM."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from recsys_core.release import Releases
from recsys_core.settings import Settings
from serving import recsys_pb2 as pb
from serving.champion import Champion, Loaded, NotReady, Refused
from serving.ladder import Ladder, UnknownItem, asset_versions
from serving.store import Store
from serving.validation import InvalidRequest, check_batch, check_id, options_of, parse, similar_options_of

log = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["Recommender"].full_name
TREND_SECONDS = 5.0
COUNTS_SECONDS = 60.0
GRACE_SECONDS = 5.0
MAX_REQUEST_BYTES = 4 * 1024 * 1024

STATUSES: Mapping[type[Exception], grpc.StatusCode] = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    UnknownItem: grpc.StatusCode.NOT_FOUND,
    NotReady: grpc.StatusCode.UNAVAILABLE,
    TimeoutError: grpc.StatusCode.UNAVAILABLE,
}

Method = Callable[[bytes], Awaitable[bytes]]


class Recommender:
    """The methods of the service, bytes in and bytes out. What they raise has a status in STATUSES."""

    def __init__(self, champion: Champion, ladder: Ladder, settings: Settings) -> None:
        self._champion = champion
        self._ladder = ladder
        self._settings = settings

    async def recommend(self, data: bytes) -> bytes:
        request = parse(pb.RecommendRequest, data)
        check_id("user_id", request.user_id, self._settings)
        return await self._ladder.recommend(request.user_id, options_of(request, self._settings))

    async def recommend_batch(self, data: bytes) -> bytes:
        request = parse(pb.RecommendBatchRequest, data)
        options = options_of(request, self._settings)
        check_batch(request.user_ids, len(request.user_ids), options.count, self._settings)
        responses = await self._ladder.recommend_batch(request.user_ids, options)
        return b"".join(_field(pb.RecommendBatchResponse.RESPONSES_FIELD_NUMBER, response) for response in responses)

    async def similar_items(self, data: bytes) -> bytes:
        request = parse(pb.SimilarItemsRequest, data)
        check_id("item_id", request.item_id, self._settings)
        return await self._ladder.similar(request.item_id, similar_options_of(request, self._settings))

    async def get_release(self, data: bytes) -> bytes:
        parse(pb.GetReleaseRequest, data)
        return release_response(self._champion.get(), self._champion.refused).SerializeToString()

    def handlers(self) -> grpc.GenericRpcHandler:
        """Raw bytes on both sides: a request that can't be parsed gets its status here instead of INTERNAL."""
        methods: dict[str, Method] = {
            "Recommend": self.recommend,
            "RecommendBatch": self.recommend_batch,
            "SimilarItems": self.similar_items,
            "GetRelease": self.get_release,
        }
        return grpc.method_handlers_generic_handler(
            SERVICE, {name: grpc.unary_unary_rpc_method_handler(_with_status(method)) for name, method in methods.items()}
        )


def _with_status(method: Method) -> Callable[[bytes, grpc.aio.ServicerContext], Awaitable[bytes]]:
    async def handler(data: bytes, context: grpc.aio.ServicerContext) -> bytes:
        try:
            return await method(data)
        except tuple(STATUSES) as error:
            status = next(s for kind, s in STATUSES.items() if isinstance(error, kind))
            message = str(error) or "the deadline of this answer's computation has passed"
        except Exception:
            log.exception("%s failed", method.__name__)
            status, message = grpc.StatusCode.UNAVAILABLE, "this answer failed; the server's log says why"
        return await context.abort(status, message)

    return handler


def _field(number: int, data: bytes) -> bytes:
    """A length-delimited field in protobuf's wire format."""
    head = bytearray([number << 3 | 2])
    length = len(data)
    while length > 0x7F:
        head.append(length & 0x7F | 0x80)
        length >>= 7
    head.append(length)
    return bytes(head) + data


def release_response(loaded: Loaded, refused: Refused | None) -> pb.GetReleaseResponse:
    """What GetRelease says."""
    manifest = loaded.manifest
    response = pb.GetReleaseResponse(
        release_id=manifest.release_id,
        day=manifest.day,
        created_at_ms=int(manifest.created_at * 1000),
        promoted_at_ms=int(loaded.pointer.promoted_at * 1000),
        loaded_at_ms=int(loaded.loaded_at * 1000),
        models=[
            pb.Model(name=name, present=model is not None, version=str((model or {}).get("version", "")))
            for name, model in sorted({"two_tower": None, **manifest.models}.items())
        ],
        metrics=flattened(manifest.metrics),
        sources=asset_versions(manifest.sources),
        item_count=loaded.snapshot.items.num_rows,
    )
    if refused is not None:
        response.last_refused.release_id = refused.release_id
        response.last_refused.reason = refused.reason
        response.last_refused.refused_at_ms = int(refused.refused_at * 1000)
    return response


def flattened(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of nested metrics, names joined by dots."""
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{name}.")
        elif isinstance(value, int | float):
            flat[prefix + name] = float(value)
    return flat


class Server:
    """A running server inside an event loop. `start` it, use it, `stop` it."""

    def __init__(self, settings: Settings, trend_seconds: float = TREND_SECONDS) -> None:
        self._settings = settings
        self._trend_seconds = trend_seconds
        self.store = Store(settings.redis, settings.cache.ttl_seconds)
        self.champion = Champion(Releases(settings.releases_uri), settings)
        self.ladder = Ladder(self.champion, self.store, settings)
        self._health = health.aio.HealthServicer()
        self._tasks: list[asyncio.Task[None]] = []
        self._server: grpc.aio.Server | None = None

    async def start(self) -> str:
        """Bind, load the champion if there is one, and return the address. Raises OSError when it can't bind."""
        server = grpc.aio.server(
            options=[
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
                ("grpc.max_send_message_length", -1),
            ]
        )
        server.add_generic_rpc_handlers((Recommender(self.champion, self.ladder, self._settings).handlers(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if self._settings.serving.reflection:
            from grpc_reflection.v1alpha import reflection

            reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        host, wanted = self._settings.serving.host, self._settings.serving.port
        try:
            port = server.add_insecure_port(f"{host}:{wanted}")
        except RuntimeError as error:
            raise OSError(f"can't listen on {host}:{wanted}, is something else there? ({error})") from error
        await self._tell_health()
        await server.start()
        self._server = server
        if await self.champion.look():
            await self._tell_health()
        self._tasks = [
            asyncio.create_task(self.champion.follow(self._tell_health)),
            asyncio.create_task(self.store.follow_trending(self._trend_seconds, self._set_trend)),
            asyncio.create_task(self._log_counts()),
        ]
        for task in self._tasks:
            task.add_done_callback(_log_end)
        return f"{host}:{port}"

    async def stop(self, grace: float = GRACE_SECONDS) -> None:
        """Say NOT_SERVING, let calls under way finish for `grace` seconds, release everything."""
        await self._health.enter_graceful_shutdown()
        if self._server is not None:
            await self._server.stop(grace)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.ladder.close()
        self.champion.close()
        await self.store.close()

    async def _set_trend(self, value: Any) -> None:
        await self.champion.set_trend(value.scores)

    async def _tell_health(self) -> None:
        serving = health_pb2.HealthCheckResponse.SERVING
        status = serving if self.champion.current else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", SERVICE):
            await self._health.set(name, status)

    async def _log_counts(self) -> None:
        logged: dict[str, int] = {}
        while True:
            await asyncio.sleep(COUNTS_SECONDS)
            counts = dict(self.ladder.counts + self.store.counts)
            if counts != logged:
                log.info("since the start: %s", ", ".join(f"{name} {count}" for name, count in sorted(counts.items())))
                logged = counts


def _log_end(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.critical("a background task of the server has ended", exc_info=error)


async def serve(settings: Settings, on_ready: Callable[[str], None] = lambda _: None) -> None:
    """Serve until SIGTERM or SIGINT. `on_ready` gets the bound address once calls are taken."""
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    server = Server(settings)
    try:
        address = await server.start()
        log.info("serving on %s", address)
        on_ready(address)
        await stopping.wait()
        log.info("stopping; calls under way get %.0f s", GRACE_SECONDS)
    finally:
        await server.stop()


def main(settings: Settings, on_ready: Callable[[str], None] = lambda _: None) -> int:
    """Run `serve` in this process, logging to stderr, and return its exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if sys.platform == "win32":
        runner = asyncio.run
    else:
        import uvloop

        runner = uvloop.run
    try:
        runner(serve(settings, on_ready))
    except OSError as error:
        log.critical("%s", error)
        return 1
    return 0
