"""A typed client of the recommendation service.

with RecsysClient("127.0.0.1:50051") as client:
    for item in client.recommend("user-1", count=5):
        print(item.item_id, item.score)
"""

from __future__ import annotations

import asyncio
import json
import queue
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, NamedTuple, Self, TypeAlias, TypeVar

import grpc

from serving import recsys_pb2 as pb
from serving.recsys_pb2_grpc import RecommenderStub

PARTS = ("als", "two_tower", "session", "trend", "popular")
SERVICE = "recsys.v1.Recommender"
MAX_RESPONSE_BYTES = 256 * 1024 * 1024

T = TypeVar("T")
Awaited: TypeAlias = Coroutine[Any, Any, T]
One = TypeVar("One")
Many = TypeVar("Many")
Items = TypeVar("Items")
Held = TypeVar("Held")


class RecsysError(Exception):
    """A call failed. `status` is the gRPC status's name, `message` what the server says."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status
        self.message = message


class Influence(NamedTuple):
    """A user's action, and how much it adds to an item's score."""

    item_id: str
    event_type: str
    ts_ms: int
    strength: float
    title: str = ""


class ScoredItem(NamedTuple):
    """One item. A recommendation has the later fields on `explain`; similar and trending items have titles always.

    `sources` are the generators that proposed it, `moved_by` the user's last actions that add most to its score.
    """

    item_id: str
    score: float
    parts: dict[str, float] | None = None
    title: str = ""
    category: str = ""
    sources: tuple[str, ...] = ()
    moved_by: tuple[Influence, ...] = ()


@dataclass(frozen=True)
class AssetVersion:
    """An asset that a release was made from."""

    asset: str
    partition: str
    data_version: str


@dataclass(frozen=True)
class Recommendation:
    """An answer for one user, best item first.

    Attributes:
        tier: CACHE, REALTIME, REALTIME_ALS_ONLY, STALE_CACHE or POPULAR.
        release_id: the release that made it.
        computed_at: when it was made (UTC).
        milliseconds: how long the call took, seen from here; of a batch, the whole call.
        weights: of the parts, on `explain`.
        sources: the assets behind it, on `explain`.
        last_actions: of the user, newest first, on `explain`.
    """

    items: list[ScoredItem]
    tier: str
    release_id: str
    computed_at: datetime
    milliseconds: float
    weights: dict[str, float] | None = None
    sources: list[AssetVersion] = field(default_factory=list)
    last_actions: list[Influence] = field(default_factory=list)

    def __iter__(self) -> Iterator[ScoredItem]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)


@dataclass(frozen=True)
class SimilarItems:
    """Items near another one, most similar first; their scores are cosines."""

    items: list[ScoredItem]
    release_id: str
    milliseconds: float

    def __iter__(self) -> Iterator[ScoredItem]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)


@dataclass(frozen=True)
class RefusedRelease:
    """A release that the server would not serve, and why."""

    release_id: str
    reason: str
    refused_at: datetime


@dataclass(frozen=True)
class Release:
    """The release in service.

    Attributes:
        models: version by model, None for a model that the release does not hold.
        metrics: offline metrics, nested names joined by dots.
        last_refused: the last release that the server would not serve.
    """

    release_id: str
    day: str
    created_at: datetime
    promoted_at: datetime
    loaded_at: datetime
    models: dict[str, str | None]
    metrics: dict[str, float]
    sources: list[AssetVersion]
    item_count: int
    last_refused: RefusedRelease | None


@dataclass(frozen=True)
class Filter:
    """Which items may be in an answer; all that is set must hold.

    Attributes:
        min_price, max_price: inclusive bounds.
        attributes: names of catalogue attributes, each with the values of which one must be the item's.
        include_unavailable: also items that the catalogue says are not available.
    """

    min_price: float | None = None
    max_price: float | None = None
    attributes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    include_unavailable: bool = False


@dataclass(frozen=True)
class Diversity:
    """How much the items of an answer have to differ.

    Attributes:
        relevance: the share of relevance against likeness to the items before, in [0, 1]; 1 is the plain order.
        max_per_category: most items of one category; 0: no limit.
    """

    relevance: float = 1.0
    max_per_category: int = 0


@dataclass(frozen=True)
class Tls:
    """TLS of a channel: PEM files of the server's CA (None: the system's), and of an own certificate with its key."""

    ca: str | None = None
    certificate: str | None = None
    key: str | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Raises OSError when a file can't be read."""
        ca, key, certificate = (Path(f).read_bytes() if f else None for f in (self.ca, self.key, self.certificate))
        return grpc.ssl_channel_credentials(ca, key, certificate)


@dataclass(frozen=True)
class ClientOptions:
    """How calls are made.

    Attributes:
        timeout: deadline of a call in seconds, retries and hedging included.
        attempts: how often a call is tried, 1 to 5; again only after UNAVAILABLE and RESOURCE_EXHAUSTED, after a pause
            that doubles. All methods only read, so that trying again is safe.
        hedge_after: seconds without an answer after which a Recommend, SimilarItems or Trending is sent a second time; the
            first answer is taken. None: never. The 95th percentile of the latency is a good value (Dean & Barroso 2013,
            "The Tail at Scale").
        token: bearer token, sent with every call.
        tls: None for a channel without.
    """

    timeout: float = 1.0
    attempts: int = 3
    hedge_after: float | None = None
    token: str = field(default="", repr=False)
    tls: Tls | None = None

    def channel(self, transport: Any, address: str) -> Any:
        """A channel of `grpc` or `grpc.aio`; gRPC itself makes the retries. Raises OSError when a file can't be read."""
        options = [
            ("grpc.max_receive_message_length", MAX_RESPONSE_BYTES),
            ("grpc.enable_http_proxy", 0),
            ("grpc.service_config", json.dumps(self._service_config())),
        ]
        if self.tls is None:
            return transport.insecure_channel(address, options=options)
        return transport.secure_channel(address, self.tls.credentials(), options=options)

    def _service_config(self) -> dict[str, Any]:
        if self.attempts == 1:
            return {}
        policy = {
            "maxAttempts": self.attempts,
            "initialBackoff": "0.02s",
            "maxBackoff": "0.5s",
            "backoffMultiplier": 2,
            "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
        }
        # Retries stop while more than half of the calls fail, so that they don't add to an overload.
        return {
            "methodConfig": [{"name": [{"service": SERVICE}], "retryPolicy": policy}],
            "retryThrottling": {"maxTokens": 100, "tokenRatio": 0.5},
        }

    def metadata(self, request_id: str = "") -> tuple[tuple[str, str], ...] | None:
        """Metadata of a call."""
        found = [("authorization", f"Bearer {self.token}")] if self.token else []
        if request_id:
            found.append(("x-request-id", request_id))
        return tuple(found) or None


class _Methods(ABC, Generic[One, Many, Items, Held]):
    """What both clients say alike: each method's request, and what is read from its response.

    A client adds how a call is made, and the type parameters are what its methods therefore return: an answer or one that is
    awaited. The stream is its own, as both ends of it are.
    """

    _transport: Any
    """`grpc` or `grpc.aio`."""

    def __init__(self, address: str, timeout: float = 1.0, options: ClientOptions | None = None) -> None:
        """`timeout` is the deadline of a call in seconds; `options` say everything, this too."""
        self.address = address
        self.options = options or ClientOptions(timeout=timeout)
        self._channel = self.options.channel(self._transport, address)
        self._stub = RecommenderStub(self._channel)

    @abstractmethod
    def _ask(
        self, method: Any, request: Any, read: Callable[[Any, float], Any], request_id: str = "", hedged: bool = False
    ) -> Any:
        """What `read` makes of the response and the milliseconds that it took; sent twice by config when `hedged`."""

    def recommend(
        self,
        user_id: str,
        count: int = 10,
        *,
        categories: Sequence[str] = (),
        exclude: Sequence[str] = (),
        current_item: str = "",
        explain: bool = False,
        filter: Filter | None = None,
        diversity: Diversity | None = None,
        include_consumed: bool = False,
        request_id: str = "",
    ) -> One:
        """The best `count` items for a user.

        Args:
            categories: only items of these or below them.
            exclude: item ids not to be returned.
            current_item: the item that the user looks at now.
            explain: compute the answer anew, with the parts of each score, titles and sources.
            filter: further conditions on items.
            diversity: how much the items have to differ.
            include_consumed: also items that the user had already.
            request_id: goes through to the server's logs and back in the call's metadata.
        """
        wanted = _wanted(count, categories, exclude, current_item, explain, filter, diversity, include_consumed)
        request = pb.RecommendRequest(user_id=user_id, **wanted)
        return self._ask(self._stub.Recommend, request, _recommendation, request_id, hedged=True)

    def recommend_batch(
        self,
        user_ids: Sequence[str],
        count: int = 10,
        *,
        categories: Sequence[str] = (),
        exclude: Sequence[str] = (),
        current_item: str = "",
        explain: bool = False,
        filter: Filter | None = None,
        diversity: Diversity | None = None,
        include_consumed: bool = False,
    ) -> Many:
        """Answers in the order of the users; the options are those of `recommend`, shared by all."""
        wanted = _wanted(count, categories, exclude, current_item, explain, filter, diversity, include_consumed)
        request = pb.RecommendBatchRequest(user_ids=_several("user_ids", user_ids), **wanted)
        return self._ask(self._stub.RecommendBatch, request, _recommendations)

    def similar_items(
        self,
        item_id: str,
        count: int = 10,
        *,
        categories: Sequence[str] = (),
        exclude: Sequence[str] = (),
        same_category: bool = False,
        filter: Filter | None = None,
    ) -> Items:
        """The items nearest to an item; `same_category`: only those of its own category."""
        request = pb.SimilarItemsRequest(
            item_id=item_id,
            count=count,
            categories=_several("categories", categories),
            exclude_item_ids=_several("exclude", exclude),
            same_category=same_category,
            filter=_filter(filter),
        )
        return self._ask(self._stub.SimilarItems, request, _similar, hedged=True)

    def trending(
        self, count: int = 10, *, categories: Sequence[str] = (), exclude: Sequence[str] = (), filter: Filter | None = None
    ) -> Items:
        """What trends now, then what is popular; scores are the trend in [0, 1]."""
        request = pb.TrendingRequest(
            count=count,
            categories=_several("categories", categories),
            exclude_item_ids=_several("exclude", exclude),
            filter=_filter(filter),
        )
        return self._ask(self._stub.Trending, request, _trending, hedged=True)

    def get_release(self) -> Held:
        """The release in service."""
        return self._ask(self._stub.GetRelease, pb.GetReleaseRequest(), _release)

    def _not_ready(self, timeout: float) -> RecsysError:
        return RecsysError("UNAVAILABLE", f"{self.address} does not answer after {timeout} s")


class RecsysClient(_Methods[Recommendation, list[Recommendation], SimilarItems, Release]):
    """Calls one server over one channel; may be shared by threads. Every method raises RecsysError."""

    _transport = grpc

    def recommend_stream(self, user_ids: Iterable[str], count: int = 10) -> Iterator[Recommendation]:
        """Answers in the order of the users, while these are still coming; the deadline is not applied."""
        requests = (pb.RecommendRequest(user_id=user_id, count=count) for user_id in user_ids)
        started = time.perf_counter()
        with _failures():
            for response in self._stub.RecommendStream(requests, metadata=self.options.metadata()):
                yield _recommendation(response, _since(started))

    def wait_until_ready(self, timeout: float) -> None:
        """Wait for the server to accept the connection, `timeout` seconds at most."""
        try:
            grpc.channel_ready_future(self._channel).result(timeout)
        except grpc.FutureTimeoutError as error:
            raise self._not_ready(timeout) from error

    def _ask(
        self, method: Any, request: Any, read: Callable[[Any, float], Any], request_id: str = "", hedged: bool = False
    ) -> Any:
        started, metadata, after = time.perf_counter(), self.options.metadata(request_id), self.options.hedge_after
        with _failures():
            if hedged and after is not None:
                response = self._first(method, request, metadata, after)
            else:
                response = method(request, timeout=self.options.timeout, metadata=metadata)
        return read(response, _since(started))

    def _first(self, method: Any, request: Any, metadata: Any, after: float) -> Any:
        """The answer of the first of two equal calls that succeeds; the second one starts when the first is slow."""
        ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
        calls: list[Any] = []

        def start(timeout: float) -> None:
            calls.append(method.future(request, timeout=timeout, metadata=metadata))
            calls[-1].add_done_callback(ended.put)

        start(self.options.timeout)
        try:
            first = ended.get(timeout=after)
        except queue.Empty:
            start(self.options.timeout - after)
            first = ended.get()
            if first.code() is not grpc.StatusCode.OK:
                first = ended.get()
        finally:
            for call in calls:
                call.cancel()
        return first.result()

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class AsyncRecsysClient(
    _Methods[Awaited[Recommendation], Awaited[list[Recommendation]], Awaited[SimilarItems], Awaited[Release]]
):
    """`RecsysClient` for asyncio: the same methods, awaited. To be made inside a running event loop."""

    _transport = grpc.aio

    async def recommend_stream(self, user_ids: AsyncIterable[str], count: int = 10) -> AsyncIterator[Recommendation]:
        """See `RecsysClient.recommend_stream`."""
        requests = (pb.RecommendRequest(user_id=user_id, count=count) async for user_id in user_ids)
        started = time.perf_counter()
        with _failures():
            async for response in self._stub.RecommendStream(requests, metadata=self.options.metadata()):
                yield _recommendation(response, _since(started))

    async def wait_until_ready(self, timeout: float) -> None:
        """See `RecsysClient.wait_until_ready`."""
        try:
            await asyncio.wait_for(self._channel.channel_ready(), timeout)
        except TimeoutError as error:
            raise self._not_ready(timeout) from error

    async def _ask(
        self, method: Any, request: Any, read: Callable[[Any, float], Any], request_id: str = "", hedged: bool = False
    ) -> Any:
        started, metadata, after = time.perf_counter(), self.options.metadata(request_id), self.options.hedge_after
        with _failures():
            if hedged and after is not None:
                response = await self._first(method, request, metadata, after)
            else:
                response = await method(request, timeout=self.options.timeout, metadata=metadata)
        return read(response, _since(started))

    async def _first(self, method: Any, request: Any, metadata: Any, after: float) -> Any:
        """See `RecsysClient._first`."""

        async def call(timeout: float) -> Any:
            return await method(request, timeout=timeout, metadata=metadata)

        calls = {asyncio.create_task(call(self.options.timeout))}
        done, _ = await asyncio.wait(calls, timeout=after)
        if not done:
            calls.add(asyncio.create_task(call(self.options.timeout - after)))
        try:
            pending = set(calls)
            while True:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                won = [task for task in done if task.exception() is None]
                if won or not pending:
                    return (won or list(done))[0].result()
        finally:
            for task in calls:
                task.cancel()
            await asyncio.gather(*calls, return_exceptions=True)

    async def close(self) -> None:
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


@contextmanager
def _failures() -> Iterator[None]:
    """What gRPC raises of a call is a RecsysError."""
    try:
        yield
    except grpc.RpcError as error:
        raise RecsysError(error.code().name, error.details() or "") from error


def _since(started: float) -> float:
    """Milliseconds."""
    return (time.perf_counter() - started) * 1000


def _wanted(
    count: int,
    categories: Sequence[str],
    exclude: Sequence[str],
    current_item: str,
    explain: bool,
    filter: Filter | None,
    diversity: Diversity | None,
    include_consumed: bool,
) -> dict[str, Any]:
    """The fields that RecommendRequest and RecommendBatchRequest have in common."""
    shape = None
    if diversity is not None:
        shape = pb.Diversity(relevance=diversity.relevance, max_per_category=diversity.max_per_category)
    return {
        "count": count,
        "categories": _several("categories", categories),
        "exclude_item_ids": _several("exclude", exclude),
        "context": pb.Context(current_item_id=current_item) if current_item else None,
        "explain": explain,
        "filter": _filter(filter),
        "diversity": shape,
        "include_consumed": include_consumed,
    }


def _several(name: str, values: Sequence[str]) -> Sequence[str]:
    """The values. Raises TypeError for a text in the place of a list: its letters would be taken one by one."""
    if isinstance(values, str):
        raise TypeError(f"{name} is the text {values!r}; it must be a list of texts, such as [{values!r}]")
    return values


def _filter(wanted: Filter | None) -> pb.Filter | None:
    if wanted is None:
        return None
    return pb.Filter(
        min_price=wanted.min_price,
        max_price=wanted.max_price,
        attributes=[
            pb.AttributeFilter(name=name, values=_several(f"attributes[{name!r}]", values))
            for name, values in wanted.attributes.items()
        ],
        include_unavailable=wanted.include_unavailable,
    )


def _similar(response: Any, milliseconds: float) -> SimilarItems:
    items = [ScoredItem(i.item_id, i.similarity, None, i.title, i.category) for i in response.items]
    return SimilarItems(items, response.release_id, milliseconds)


def _trending(response: Any, milliseconds: float) -> SimilarItems:
    items = [ScoredItem(i.item_id, i.trend, None, i.title, i.category) for i in response.items]
    return SimilarItems(items, response.release_id, milliseconds)


def _influence(found: pb.Influence) -> Influence:
    return Influence(found.item_id, found.event_type, found.ts_ms, found.strength, found.title)


def _recommendation(response: pb.RecommendResponse, milliseconds: float) -> Recommendation:
    explanation = response.explanation if response.HasField("explanation") else None
    return Recommendation(
        items=[
            ScoredItem(
                i.item_id,
                i.score,
                _parts(i.parts) if i.HasField("parts") else None,
                i.title,
                i.category,
                tuple(i.sources),
                tuple(map(_influence, i.moved_by)),
            )
            for i in response.items
        ],
        tier=pb.Tier.Name(response.tier),
        release_id=response.release_id,
        computed_at=_time(response.computed_at_ms),
        milliseconds=milliseconds,
        weights=_parts(explanation.weights) if explanation else None,
        sources=_sources(explanation.sources) if explanation else [],
        last_actions=[_influence(action) for action in explanation.last_actions] if explanation else [],
    )


def _recommendations(response: Any, milliseconds: float) -> list[Recommendation]:
    return [_recommendation(r, milliseconds) for r in response.responses]


def _release(response: Any, milliseconds: float) -> Release:  # noqa: ARG001
    refused = response.last_refused
    return Release(
        release_id=response.release_id,
        day=response.day,
        created_at=_time(response.created_at_ms),
        promoted_at=_time(response.promoted_at_ms),
        loaded_at=_time(response.loaded_at_ms),
        models={m.name: m.version if m.present else None for m in response.models},
        metrics=dict(response.metrics),
        sources=_sources(response.sources),
        item_count=response.item_count,
        last_refused=RefusedRelease(refused.release_id, refused.reason, _time(refused.refused_at_ms))
        if response.HasField("last_refused")
        else None,
    )


def _parts(parts: pb.Parts) -> dict[str, float]:
    return {name: getattr(parts, name) for name in PARTS} | dict(parts.others)


def _sources(sources: Sequence[pb.AssetVersion]) -> list[AssetVersion]:
    return [AssetVersion(s.asset, s.partition, s.data_version) for s in sources]


def _time(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, UTC)
