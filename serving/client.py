"""A typed client of the recommendation service.

with RecsysClient("127.0.0.1:50051") as client:
    for item in client.recommend("user-1", count=5):
        print(item.item_id, item.score)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

import grpc

from serving import recsys_pb2 as pb
from serving.recsys_pb2_grpc import RecommenderStub

PARTS = ("als", "two_tower", "session", "trend", "popular")
MAX_RESPONSE_BYTES = 256 * 1024 * 1024

T = TypeVar("T")


class RecsysError(Exception):
    """A call failed. `status` is the gRPC status's name, `message` what the server says."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status
        self.message = message


class ScoredItem(NamedTuple):
    """One item. A recommendation has `parts`, title and category on `explain`; similar items have titles always."""

    item_id: str
    score: float
    parts: dict[str, float] | None = None
    title: str = ""
    category: str = ""


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
    """

    items: list[ScoredItem]
    tier: str
    release_id: str
    computed_at: datetime
    milliseconds: float
    weights: dict[str, float] | None = None
    sources: list[AssetVersion] = field(default_factory=list)

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


class RecsysClient:
    """Calls one server over one channel; may be shared by threads. Every method raises RecsysError."""

    def __init__(self, address: str, timeout: float = 1.0) -> None:
        """`timeout` is the deadline of a call in seconds."""
        self.address = address
        self.timeout = timeout
        options = [("grpc.max_receive_message_length", MAX_RESPONSE_BYTES), ("grpc.enable_http_proxy", 0)]
        self._channel = grpc.insecure_channel(address, options=options)
        self._stub = RecommenderStub(self._channel)

    def recommend(
        self,
        user_id: str,
        count: int = 10,
        *,
        categories: Sequence[str] = (),
        exclude: Sequence[str] = (),
        current_item: str = "",
        explain: bool = False,
    ) -> Recommendation:
        """The best `count` items for a user.

        Args:
            categories: only items of these or below them.
            exclude: item ids not to be returned.
            current_item: the item that the user looks at now.
            explain: compute the answer anew, with the parts of each score, titles and sources.
        """
        request = _request(pb.RecommendRequest, count, categories, exclude, current_item, explain=explain, user_id=user_id)
        response, milliseconds = self._call(self._stub.Recommend, request)
        return _recommendation(response, milliseconds)

    def recommend_batch(
        self,
        user_ids: Sequence[str],
        count: int = 10,
        *,
        categories: Sequence[str] = (),
        exclude: Sequence[str] = (),
        current_item: str = "",
        explain: bool = False,
    ) -> list[Recommendation]:
        """Answers in the order of the users; the options are those of `recommend`, shared by all."""
        request = _request(
            pb.RecommendBatchRequest, count, categories, exclude, current_item, explain=explain, user_ids=user_ids
        )
        response, milliseconds = self._call(self._stub.RecommendBatch, request)
        return [_recommendation(r, milliseconds) for r in response.responses]

    def similar_items(
        self, item_id: str, count: int = 10, *, categories: Sequence[str] = (), exclude: Sequence[str] = ()
    ) -> SimilarItems:
        """The items nearest to an item."""
        request = pb.SimilarItemsRequest(item_id=item_id, count=count, categories=categories, exclude_item_ids=exclude)
        response, milliseconds = self._call(self._stub.SimilarItems, request)
        items = [ScoredItem(i.item_id, i.similarity, None, i.title, i.category) for i in response.items]
        return SimilarItems(items, response.release_id, milliseconds)

    def get_release(self) -> Release:
        """The release in service."""
        response, _ = self._call(self._stub.GetRelease, pb.GetReleaseRequest())
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

    def wait_until_ready(self, timeout: float) -> None:
        """Wait for the server to accept the connection, `timeout` seconds at most."""
        try:
            grpc.channel_ready_future(self._channel).result(timeout)
        except grpc.FutureTimeoutError as error:
            raise RecsysError("UNAVAILABLE", f"{self.address} does not answer after {timeout} s") from error

    def _call(self, method: Callable[..., T], request: Any) -> tuple[T, float]:
        started = time.perf_counter()
        try:
            response = method(request, timeout=self.timeout)
        except grpc.RpcError as error:
            raise RecsysError(error.code().name, error.details()) from error
        return response, (time.perf_counter() - started) * 1000

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _request(kind: Any, count: int, categories: Sequence[str], exclude: Sequence[str], current_item: str, **fields: Any) -> Any:
    context = pb.Context(current_item_id=current_item) if current_item else None
    return kind(count=count, categories=categories, exclude_item_ids=exclude, context=context, **fields)


def _recommendation(response: pb.RecommendResponse, milliseconds: float) -> Recommendation:
    explanation = response.explanation if response.HasField("explanation") else None
    return Recommendation(
        items=[
            ScoredItem(i.item_id, i.score, _parts(i.parts) if i.HasField("parts") else None, i.title, i.category)
            for i in response.items
        ],
        tier=pb.Tier.Name(response.tier),
        release_id=response.release_id,
        computed_at=_time(response.computed_at_ms),
        milliseconds=milliseconds,
        weights=_parts(explanation.weights) if explanation else None,
        sources=_sources(explanation.sources) if explanation else [],
    )


def _parts(parts: pb.Parts) -> dict[str, float]:
    return {name: getattr(parts, name) for name in PARTS}


def _sources(sources: Sequence[pb.AssetVersion]) -> list[AssetVersion]:
    return [AssetVersion(s.asset, s.partition, s.data_version) for s in sources]


def _time(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, UTC)
