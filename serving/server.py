"""The gRPC process: binds the service to its parts, follows the release, drains on SIGTERM."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import aclosing
from importlib.abc import MetaPathFinder
from typing import Any, TypeAlias

# gRPC looks when it is imported. Its event engine hands each read and write to a pool of threads; without it a call takes a
# seventh less of the processor.
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_listener")

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from recsys_core.online import TrendingValue
from recsys_core.release import Releases
from recsys_core.settings import Settings
from serving import recsys_pb2 as pb
from serving.champion import Champion, Loaded, NotReady, Refused
from serving.crowd import Crowd
from serving.explain import asset_versions
from serving.ladder import Ladder, UnknownItem
from serving.metrics import Metrics, serve_metrics
from serving.ranker import TooSlow
from serving.security import MissingSecret, Tokens, server_credentials
from serving.seldom import Seldom
from serving.store import LiveTrends, Store
from serving.tracing import Tracing, passed_on, set_up_logging
from serving.validation import (
    InvalidRequest,
    Options,
    check_batch,
    check_id,
    item_options_of,
    options_of,
    parse,
)
from serving.wire import joined_responses, plain_request

log = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["Recommender"].full_name
LIVE = "live"
"""Health of the process itself, with or without a release."""
TREND_SECONDS = 5.0
COUNTS_SECONDS = 60.0
MAX_REQUEST_BYTES = 4 * 1024 * 1024
MAX_METADATA_BYTES = 16 * 1024
MAX_PENDING = 20_000
"""Calls that wait in gRPC for their turn. Beyond it gRPC ends calls as CANCELLED, so the limit of calls under way, which says
RESOURCE_EXHAUSTED, has to come first."""
HANDSHAKE_MS = 10_000
"""What a new connection has to say its first words in."""
IDLE_MS = 5 * 60_000
"""A connection without a call for so long is closed; its client connects again by itself with the next call."""
AGE_MS = 10 * 60_000
"""A connection so old is asked to be made anew, so that new servers get their share of the clients. gRPC spreads the moments by
a tenth; calls and streams under way on it go on to their ends."""
KEEPALIVE_MS, KEEPALIVE_TIMEOUT_MS = 60_000, 20_000
"""A silent connection is asked for a sign of life so often, and closed when none comes in this time."""
PINGS_MS = 10_000
"""Clients may ask for one as often as this."""
STREAM_WINDOW = 16
"""Requests of one stream that are worked on at a time."""
SWITCH_SECONDS = 0.0005
"""How long a thread that ranks or loads may keep the event loop from the interpreter."""

STATUSES: Mapping[type[Exception], grpc.StatusCode] = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    UnknownItem: grpc.StatusCode.NOT_FOUND,
    NotReady: grpc.StatusCode.UNAVAILABLE,
    TooSlow: grpc.StatusCode.UNAVAILABLE,
}

Context: TypeAlias = grpc.aio.ServicerContext
Remaining = Callable[[], float | None]
Method = Callable[[bytes, Remaining], Awaitable[bytes]]


class Recommender:
    """The methods of the service, bytes in and bytes out. What they raise has a status in STATUSES."""

    def __init__(self, champion: Champion, ladder: Ladder, settings: Settings) -> None:
        self._champion = champion
        self._ladder = ladder
        self._settings = settings
        self._max_id = settings.events.max_id_bytes
        self._plain = [Options(count) for count in range(min(settings.serving.max_items, 127) + 1)]
        self._plain[0] = Options(min(Options().count, settings.serving.max_items))

    async def recommend(self, data: bytes, remaining: Remaining) -> bytes:
        plain = plain_request(data)
        if plain is not None:
            user_id, count = plain
            if 0 < len(user_id) <= self._max_id and count < len(self._plain) and _is_utf8(user_id):
                return await self._ladder.recommend(user_id, self._plain[count], remaining)
        request = parse(pb.RecommendRequest, data)
        check_id("user_id", request.user_id, self._settings)
        return await self._ladder.recommend(request.user_id.encode(), options_of(request, self._settings), remaining)

    async def recommend_batch(self, data: bytes, remaining: Remaining) -> bytes:
        request = parse(pb.RecommendBatchRequest, data)
        options = options_of(request, self._settings)
        check_batch(request.user_ids, len(request.user_ids), options, self._settings)
        user_ids = [user_id.encode() for user_id in request.user_ids]
        return joined_responses(await self._ladder.recommend_batch(user_ids, options, remaining))

    async def similar_items(self, data: bytes, remaining: Remaining) -> bytes:
        request = parse(pb.SimilarItemsRequest, data)
        check_id("item_id", request.item_id, self._settings)
        options = item_options_of(request, self._settings)
        return await self._ladder.similar(request.item_id, options, request.same_category, remaining)

    async def trending(self, data: bytes, remaining: Remaining) -> bytes:
        request = parse(pb.TrendingRequest, data)
        return await self._ladder.trending(item_options_of(request, self._settings), remaining)

    async def get_release(self, data: bytes, remaining: Remaining) -> bytes:  # noqa: ARG002
        parse(pb.GetReleaseRequest, data)
        return release_response(self._champion.get(), self._champion.refused).SerializeToString()


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


class Gate:
    """Between gRPC and the methods: tokens, the limit of calls under way, statuses, and what is measured of every call."""

    def __init__(
        self, recommender: Recommender, settings: Settings, metrics: Metrics, tokens: Tokens, tracing: Tracing
    ) -> None:
        self._recommender = recommender
        self._limit = settings.serving.max_concurrent
        self._metrics = metrics
        self._tokens = tokens
        self._tracing = tracing
        self._logs = settings.serving.log_sample > 0
        self.under_way = 0
        self._streams = 0
        self._of_streams = 0
        self._readers: set[asyncio.Task[None]] = set()
        self._faults = Seldom(log)
        metrics.gauges["calls_under_way"] = lambda: self.under_way

    @property
    def open_calls(self) -> int:
        """Calls as gRPC counts them: of a stream not its requests but itself."""
        return self.under_way - self._of_streams + self._streams

    def handlers(self) -> grpc.GenericRpcHandler:
        """Raw bytes on both sides: a request that can't be parsed gets its status here instead of INTERNAL."""
        methods = self._recommender
        unary: dict[str, Method] = {
            "Recommend": methods.recommend,
            "RecommendBatch": methods.recommend_batch,
            "SimilarItems": methods.similar_items,
            "Trending": methods.trending,
            "GetRelease": methods.get_release,
        }
        handlers = {name: grpc.unary_unary_rpc_method_handler(self._unary(name, method)) for name, method in unary.items()}
        handlers["RecommendStream"] = grpc.stream_stream_rpc_method_handler(self._stream)
        return grpc.method_handlers_generic_handler(SERVICE, handlers)

    def _unary(self, name: str, method: Method) -> Callable[[bytes, Context], Awaitable[bytes]]:
        latency = self._metrics.latency(name)
        answered = (name, "OK")
        calls = self._metrics.calls

        async def handler(data: bytes, context: Context) -> bytes:
            started = time.perf_counter()
            metadata = context.invocation_metadata() or ()
            self.under_way += 1
            try:
                self._let_in(name, metadata)
                if self.under_way > self._limit:
                    raise self._shed()
                if len(metadata) > 1 and (echoed := passed_on(metadata)):
                    context.set_trailing_metadata(echoed)
                if self._tracing.on:
                    with self._tracing.call(name, metadata):
                        response = await method(data, context.time_remaining)
                else:
                    response = await method(data, context.time_remaining)
            except Exception as error:
                status, message = self._status_of(name, error)
                self._ended(name, status.name, started, metadata)
                await context.abort(status, message)
                raise
            except asyncio.CancelledError:
                self._ended(name, "CANCELLED", started, metadata)
                raise
            finally:
                self.under_way -= 1
            calls[answered] += 1
            took = time.perf_counter() - started
            latency.observe(took)
            if self._logs:
                self._tracing.log(name, "OK", took, metadata)
            return response

        return handler

    async def _stream(self, requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        started, name = time.perf_counter(), "RecommendStream"
        metadata = context.invocation_metadata() or ()
        status, message = grpc.StatusCode.OK, ""
        self._streams += 1
        try:
            self._let_in(name, metadata)
            if echoed := passed_on(metadata):
                context.set_trailing_metadata(echoed)
            async with aclosing(self._in_order(requests, context)) as answers:
                async for answer in answers:
                    yield answer
        except Exception as error:  # noqa: BLE001
            status, message = self._status_of(name, error)
        except (asyncio.CancelledError, GeneratorExit):
            status = grpc.StatusCode.CANCELLED
            raise
        finally:
            self._streams -= 1
            self._ended(name, status.name, started, metadata)
        if status is not grpc.StatusCode.OK:
            await context.abort(status, message)

    async def _in_order(self, requests: AsyncIterator[bytes], context: Context) -> AsyncGenerator[bytes, None]:
        """Answers in the order of the requests, STREAM_WINDOW of them worked on at a time; the end cancels those that are.

        A read of gRPC that is cancelled leaves about 100 bytes for ever, so one that is under way ends with the call.
        """
        begun: asyncio.Queue[asyncio.Task[bytes] | None] = asyncio.Queue()
        window = asyncio.Semaphore(STREAM_WINDOW)
        reading = over = False

        async def read() -> None:
            nonlocal reading
            coming = aiter(requests)
            try:
                while True:
                    await window.acquire()
                    reading = True
                    data = await anext(coming, None)
                    reading = False
                    if data is None or over:
                        return
                    begun.put_nowait(asyncio.create_task(self._of_stream(data, context)))
            except Exception:
                if not over:
                    raise
            finally:
                begun.put_nowait(None)

        reader = asyncio.create_task(read())
        self._readers.add(reader)
        reader.add_done_callback(self._readers.discard)
        try:
            while (task := await begun.get()) is not None:
                answer = await task
                window.release()
                yield answer
            await reader
        finally:
            over = True
            queued = [begun.get_nowait() for _ in range(begun.qsize())]
            left: list[asyncio.Task[Any]] = [other for other in queued if other is not None]
            if not reading:
                left.append(reader)
            for other in left:
                other.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    async def _of_stream(self, data: bytes, context: Context) -> bytes:
        self.under_way += 1
        self._of_streams += 1
        try:
            if self.under_way > self._limit:
                raise self._shed()
            return await self._recommender.recommend(data, context.time_remaining)
        finally:
            self.under_way -= 1
            self._of_streams -= 1

    def _let_in(self, name: str, metadata: Any) -> None:
        """Raises Refusal when the caller may not make the call."""
        if not self._tokens:
            return
        status = self._tokens.status(name, metadata)
        if status is grpc.StatusCode.UNAUTHENTICATED:
            raise Refusal(status, "a bearer token that this server knows is needed in `authorization`")
        if status is not grpc.StatusCode.OK:
            raise Refusal(status, f"this token does not open {name}")

    def _shed(self) -> Refusal:
        self._metrics.events["shed"] += 1
        return Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{self._limit} calls are under way; try again a little later")

    def _status_of(self, name: str, error: Exception) -> tuple[grpc.StatusCode, str]:
        if isinstance(error, Refusal):
            return error.status, str(error)
        if isinstance(error, tuple(STATUSES)):
            status = next(s for kind, s in STATUSES.items() if isinstance(error, kind))
            return status, str(error)
        self._metrics.events["unexpected_failures"] += 1
        self._faults.fail(error, "%s failed", name)
        return grpc.StatusCode.UNAVAILABLE, "this answer failed; the server's log says why"

    def _ended(self, name: str, status: str, started: float, metadata: Any) -> None:
        took = time.perf_counter() - started
        self._metrics.calls[name, status] += 1
        self._metrics.latency(name).observe(took)
        self._tracing.log(name, status, took, metadata)


class Refusal(Exception):
    """A call that is not let in. `status` says why."""

    def __init__(self, status: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.status = status


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


class Health(health.aio.HealthServicer):
    """The standard service, which counts those who watch."""

    watchers = 0

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:
        self.watchers += 1
        try:
            await super().Watch(request, context)
        finally:
            self.watchers -= 1


class Server:
    """A running server inside an event loop. `start` it, use it, `stop` it.

    Attributes:
        metrics: its numbers.
    """

    def __init__(self, settings: Settings, trend_seconds: float = TREND_SECONDS, shared_port: bool = False) -> None:
        """`shared_port`: other processes listen on the same port. Raises MissingSecret, OSError for files of TLS."""
        self._settings = settings
        self._trend_seconds = trend_seconds
        self._shared_port = shared_port
        self.metrics = Metrics()
        self._credentials = server_credentials(settings.serving)
        self._tokens = Tokens(settings.serving.tokens)
        self._tracing = Tracing(settings.serving)
        self.store = Store(settings.redis, settings.cache.ttl_seconds, self.metrics)
        self._live = LiveTrends(settings.redis, settings.trends.half_lives_hours)
        self.champion = Champion(Releases(settings.releases_uri), settings, self.metrics)
        self.ladder = Ladder(self.champion, self.store, settings, self.metrics)
        self._health = Health()
        self._probed = health.aio.HealthServicer()
        self._probes: grpc.aio.Server | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._server: grpc.aio.Server | None = None
        self._tell_numbers_of_the_moment()

    def _tell_numbers_of_the_moment(self) -> None:
        champion, gauges = self.champion, self.metrics.gauges
        gauges["redis_circuit_open"] = lambda: float(self.store.breaker.open)
        gauges["ranking_circuit_open"] = lambda: float(any(ranker.breaker.open for ranker in self.ladder.rankers))
        gauges["release_age_seconds"] = lambda: time.time() - champion.current.manifest.created_at if champion.current else 0.0
        gauges["release_items"] = lambda: float(champion.current.snapshot.items.num_rows) if champion.current else 0.0
        self.metrics.info["release"] = lambda: champion.current.snapshot.release_id if champion.current else ""

    async def start(self) -> str:
        """Bind, load the champion if there is one, and return the address. Raises OSError when it can't bind."""
        server = grpc.aio.server(
            options=[
                ("grpc.so_reuseport", int(self._shared_port)),
                ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
                ("grpc.max_send_message_length", -1),
                ("grpc.max_metadata_size", MAX_METADATA_BYTES),
                ("grpc.server.max_pending_requests", MAX_PENDING),
                ("grpc.server.max_pending_requests_hard_limit", MAX_PENDING),
                *_connection_limits(),
            ]
        )
        recommender = Recommender(self.champion, self.ladder, self._settings)
        gate = Gate(recommender, self._settings, self.metrics, self._tokens, self._tracing)
        server.add_generic_rpc_handlers((gate.handlers(),))
        crowd = Crowd(lambda: gate.open_calls + self._health.watchers)
        self.store.topology.follow_crowd(crowd)
        self.metrics.gauges["calls_waiting"] = crowd.waiting
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if self._reflects():
            from grpc_reflection.v1alpha import reflection

            reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        address = self._bind(server, self._settings.serving.port, self._credentials)
        await self.store.prepare()
        await self._set_health(health_pb2.HealthCheckResponse.SERVING, LIVE)
        await self._tell_health()
        await server.start()
        self._server = server
        await self._start_probes()
        if await self.champion.look():
            await self._tell_health()
        self._tasks = [
            asyncio.create_task(self.champion.follow(self._tell_health)),
            asyncio.create_task(self.store.follow_trending(self._trend_seconds, self._set_trend, self._live)),
            asyncio.create_task(self._log_counts()),
        ]
        for task in self._tasks:
            task.add_done_callback(_log_end)
        return address

    def _reflects(self) -> bool:
        """Reflection answers callers without a token, so that it is to be asked for where tokens are."""
        wanted = self._settings.serving.reflection
        return not self._tokens if wanted is None else wanted

    async def _start_probes(self) -> None:
        """The health service on a port of its own: the probes of Kubernetes and Docker speak no TLS."""
        port = self._settings.serving.health_port
        if port:
            self._probes = grpc.aio.server(options=[("grpc.so_reuseport", int(self._shared_port)), *_connection_limits()])
            health_pb2_grpc.add_HealthServicer_to_server(self._probed, self._probes)
            self._bind(self._probes, port, None, "health_port")
            await self._probes.start()

    def _bind(
        self, server: grpc.aio.Server, wanted: int, credentials: grpc.ServerCredentials | None, setting: str = "port"
    ) -> str:
        host = self._settings.serving.host
        try:
            if credentials is None:
                port = server.add_insecure_port(f"{host}:{wanted}")
            else:
                port = server.add_secure_port(f"{host}:{wanted}", credentials)
        except RuntimeError as error:
            reason = f"is something else there? serving.{setting} chooses another one ({error})"
            raise OSError(f"can't listen on {host}:{wanted}, {reason}") from error
        return f"{host}:{port}"

    async def stop(self, grace: float | None = None) -> None:
        """Say NOT_SERVING, wait for balancers to see it, let calls under way finish, release everything."""
        for told in (self._health, self._probed):
            await told.enter_graceful_shutdown()
        if self._server is not None:
            await asyncio.sleep(self._settings.serving.linger_seconds)
            await self._server.stop(self._settings.serving.drain_seconds if grace is None else grace)
        if self._probes is not None:
            await self._probes.stop(None)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.ladder.close()
        self.champion.close()
        await self.store.close()
        self._live.close()
        self._tracing.close()

    async def _set_trend(self, value: TrendingValue) -> None:
        await self.champion.set_trend(value)

    async def _tell_health(self) -> None:
        serving = health_pb2.HealthCheckResponse.SERVING
        status = serving if self.champion.current else health_pb2.HealthCheckResponse.NOT_SERVING
        await self._set_health(status, "", SERVICE)

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus, *services: str) -> None:
        for told in (self._health, self._probed):
            for name in services:
                await told.set(name, status)

    async def _log_counts(self) -> None:
        logged: dict[str, int] = {}
        while True:
            await asyncio.sleep(COUNTS_SECONDS)
            counts = dict(self.metrics.events)
            if counts != logged:
                log.info("since the start: %s", ", ".join(f"{name} {count}" for name, count in sorted(counts.items())))
                logged = counts


def _connection_limits() -> list[tuple[str, int]]:
    """What becomes of silent, idle and old connections."""
    return [
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
        ("grpc.max_connection_idle_ms", IDLE_MS),
        ("grpc.max_connection_age_ms", AGE_MS),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.http2.min_ping_interval_without_data_ms", PINGS_MS),
        ("grpc.keepalive_permit_without_calls", 1),
    ]


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
        if port := settings.serving.metrics_port:
            serve_metrics(settings.serving.host, port, lambda: [server.metrics.snapshot()])
        settle()
        log.info("serving on %s", address)
        on_ready(address)
        await stopping.wait()
        log.info("stopping; calls under way get %.0f s", settings.serving.drain_seconds)
    finally:
        await server.stop()


def settle() -> None:
    """What has been loaded so far stays: the garbage collector need not walk through it again."""
    sys.setswitchinterval(SWITCH_SECONDS)
    gc.collect()
    gc.freeze()


def run(program: Coroutine[Any, Any, None]) -> int:
    """Run a program on the event loop of this process and return the exit code."""
    if sys.platform == "win32":
        runner: Any = asyncio.run
    else:
        import uvloop

        runner = uvloop.run
    try:
        runner(program)
    except (OSError, MissingSecret) as error:
        log.critical("%s", error)
        return 1
    return 0


class _Absent(MetaPathFinder):
    """Says of pandas that it is not installed."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:  # noqa: ARG002
        if fullname == "pandas":
            raise ModuleNotFoundError("a serving process does without pandas", name=fullname)


def without_pandas() -> None:
    """Keep Arrow from importing pandas, a quarter of a second of the start, only to ask whether a list is one of its series.

    A serving process has no use for it, and its image does not have it.
    """
    sys.meta_path.insert(0, _Absent())


def main(settings: Settings, on_ready: Callable[[str], None] = lambda _: None) -> int:
    """Serve in this process, or in `serving.processes` children of it, and return the exit code. Logs go to stderr."""
    set_up_logging(settings.serving)
    if settings.serving.processes == 1:
        without_pandas()
        return run(serve(settings, on_ready))
    from serving.supervisor import supervise

    return run(supervise(settings, on_ready))
