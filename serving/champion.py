"""The release in service: follows the pointer file, loads and verifies in the background, swaps one reference."""

from __future__ import annotations

import asyncio
import copy
import logging
import os
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from recsys_core.index import one_faiss_thread
from recsys_core.online import AnswerEncoder, CachedAnswer, TrendingValue, UserRecord, users_of
from recsys_core.ranking import Ranked, Snapshot, Trend, Users, rank
from recsys_core.release import CHAMPION, Manifest, Pointer, ReleaseError, Releases, StoreAway
from recsys_core.settings import Settings
from serving.filters import ItemFilters
from serving.metrics import Metrics
from serving.tensorflow_serving import ModelServer, RemoteTower
from serving.validation import MAX_EXCLUDED

log = logging.getLogger(__name__)

RETRY_SECONDS = 30.0
"""A refused release is looked at again after so long: its files may have been repaired."""
NO_TRENDS = TrendingValue(0, "", {})
AWAY = "the store"
"""In the place of a release's id: no release is at fault."""


class NotReady(LookupError):
    """There is no release to answer from."""


@dataclass(frozen=True)
class Loaded:
    """A verified release with what is derived from it. Everything in it belongs together.

    Attributes:
        release: its id, encoded.
        filters: masks over its items.
        with_unavailable: the same snapshot for answers that may hold items that are not available.
        trend: of the moment, over the snapshot's items.
        trend_at: when the trend was counted, ms since 1970; 0 when none is known.
        nobody: a user of whom nothing is known, one row.
        popular: the answer for nobody in particular, one row, long enough for any count and exclusions.
        popular_answer: the same, encoded.
    """

    pointer: Pointer
    manifest: Manifest
    snapshot: Snapshot
    release: bytes
    filters: ItemFilters = field(repr=False)
    encoder: AnswerEncoder = field(repr=False)
    loaded_at: float
    trend: Trend = field(repr=False)
    trend_at: int
    nobody: Users = field(repr=False)
    popular: Ranked = field(repr=False)
    popular_answer: CachedAnswer = field(repr=False)

    @cached_property
    def withdrawn(self) -> frozenset[str]:
        """Releases that were rolled back: none of their answers is served any more."""
        return frozenset(self.pointer.withdrawn)

    @cached_property
    def with_unavailable(self) -> Snapshot:
        everything = copy.copy(self.snapshot)
        for derived in ("by_popularity", "servable"):
            everything.__dict__.pop(derived, None)
        everything.__dict__["available"] = np.ones(everything.items.num_rows, bool)
        return everything


@dataclass(frozen=True)
class Refused:
    """A release that the pointer named and that is not served."""

    release_id: str
    reason: str
    refused_at: float


class Champion:
    """Keeps `current` at the release that the pointer names.

    Attributes:
        current: the release in service; a call takes the reference once and keeps it to its end.
        refused: the last release that was not taken.
    """

    def __init__(self, releases: Releases, settings: Settings, metrics: Metrics | None = None) -> None:
        self.current: Loaded | None = None
        self.refused: Refused | None = None
        self._releases = releases
        self._settings = settings
        self._trending = NO_TRENDS
        self._refused_pointer: Pointer | None = None
        self._trouble: tuple[str, str] | None = None
        self._retry_at = 0.0
        self._thread = ThreadPoolExecutor(1, "release", initializer=_as_background)
        self._local = settings.home.absolute() / "serving" / "releases"
        self._metrics = metrics or Metrics()
        scorer = settings.tensorflow_serving
        self._model_server = ModelServer(scorer, self._metrics) if scorer.address else None
        self._building = asyncio.Lock()

    def get(self) -> Loaded:
        """The release in service. Raises NotReady that says why there is none."""
        if self.current is not None:
            return self.current
        if self._trouble is not None:
            raise NotReady(f"no release is in service: {self._trouble[1]}")
        if self.refused is not None and self._refused_pointer is not None:
            raise NotReady(f"no release is in service: {self.refused.reason}")
        raise NotReady("no release has been promoted yet")

    async def follow(self, on_swap: Callable[[], Awaitable[None]]) -> None:
        """Look at the pointer for ever; `on_swap` is called after each new release."""
        while True:
            if await self.look():
                await on_swap()
            await asyncio.sleep(self._settings.serving.pointer_poll_seconds)

    async def look(self) -> bool:
        """Load the release that the pointer names if it is another one. Returns whether it is now in service."""
        async with self._building:
            loop = asyncio.get_running_loop()
            pointer: Pointer | None = None
            try:
                pointer = await loop.run_in_executor(self._thread, self._releases.champion)
                if pointer is None or not self._is_wanted(pointer):
                    self._answered(pointer)
                    return False
                new = await loop.run_in_executor(self._thread, self._load, pointer, self._trending)
            except StoreAway as error:
                self._metrics.events["release_store_failures"] += 1
                self._tell(AWAY, str(error))
                return False
            except ReleaseError as error:
                self._refuse(pointer, str(error))
                return False
            except Exception as error:  # noqa: BLE001
                self._refuse(pointer, f"{type(error).__name__}: {error}", error)
                return False
            self.current = new
            self._answered(pointer)
            self._metrics.events["swaps"] += 1
            log.info("release %s is in service, %d items", new.snapshot.release_id, new.snapshot.items.num_rows)
            return True

    def _is_wanted(self, pointer: Pointer) -> bool:
        if self.current is not None and pointer == self.current.pointer:
            return False
        return pointer != self._refused_pointer or time.monotonic() >= self._retry_at

    def _answered(self, pointer: Pointer | None) -> None:
        """The store has answered, and what it points to is served unless it is the one that was refused."""
        if self._trouble is not None and self._trouble[0] == AWAY:
            log.info("the store of the releases answers again")
            self._trouble = None
        if pointer is None or pointer != self._refused_pointer:
            self._trouble = self._refused_pointer = None

    def _refuse(self, pointer: Pointer | None, reason: str, fault: Exception | None = None) -> None:
        """Keep the old release. `fault` is what should not have happened, for the log."""
        name = pointer.release_id if pointer else CHAMPION
        if self._tell(name, reason, fault):
            self._metrics.events["refused_releases"] += 1
            self.refused = Refused(name, reason, time.time())
        self._refused_pointer = pointer
        self._retry_at = time.monotonic() + RETRY_SECONDS

    def _tell(self, name: str, reason: str, fault: Exception | None = None) -> bool:
        """Say once what is wrong, until it is something else or over. Returns whether it was said.

        A store that is away is one state, whatever its messages say: many hold the number of a request.
        """
        trouble = (name, reason)
        if self._trouble == trouble or (self._trouble is not None and self._trouble[0] == name == AWAY):
            return False
        kept = f"{self.current.snapshot.release_id} stays in service" if self.current else "nothing is in service"
        log.error("%s; %s", reason, kept, exc_info=fault)
        self._trouble = trouble
        return True

    def _load(self, pointer: Pointer, trending: TrendingValue) -> Loaded:
        kept = {pointer.release_id} | ({self.current.snapshot.release_id} if self.current else set())
        manifest, snapshot = self._releases.load(pointer.release_id, pointer.manifest_sha256, self._local)
        snapshot = scored_by(self._model_server, snapshot)
        loaded = derive(pointer, manifest, snapshot, trending, self._settings)
        _warm(loaded, self._settings)
        self._releases.forget(self._local, kept)
        return loaded

    async def set_trend(self, trending: TrendingValue) -> None:
        """Use other trend scores from now on."""
        async with self._building:
            self._trending = trending
            old = self.current
            if old is None:
                return
            self.current = await asyncio.get_running_loop().run_in_executor(
                self._thread, with_trend, old, trending, self._settings
            )

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self._model_server is not None:
            self._model_server.close()


def scored_by(server: ModelServer | None, snapshot: Snapshot) -> Snapshot:
    """The snapshot with its user vectors computed by a model server, where there is one and the release has the model."""
    if server is None or snapshot.tower is None:
        return snapshot
    other = copy.copy(snapshot)
    object.__setattr__(other, "tower", RemoteTower(snapshot.tower, server))
    return other


def derive(
    pointer: Pointer,
    manifest: Manifest,
    snapshot: Snapshot,
    trending: TrendingValue,
    settings: Settings,
) -> Loaded:
    """A release with everything that is made of it."""
    encoder = AnswerEncoder(snapshot.release_id, snapshot.item_ids)
    nobody = users_of(snapshot, [UserRecord()], snapshot.ranking)
    trend, popular, answer = _popular(snapshot, encoder, nobody, trending, settings)
    return Loaded(
        pointer=pointer,
        manifest=manifest,
        snapshot=snapshot,
        release=snapshot.release_id.encode(),
        filters=ItemFilters(snapshot),
        encoder=encoder,
        loaded_at=time.time(),
        trend=trend,
        trend_at=trending.computed_at,
        nobody=nobody,
        popular=popular,
        popular_answer=answer,
    )


def with_trend(old: Loaded, trending: TrendingValue, settings: Settings) -> Loaded:
    """The same release with the trend of another moment."""
    trend, popular, answer = _popular(old.snapshot, old.encoder, old.nobody, trending, settings)
    return replace(old, trend=trend, trend_at=trending.computed_at, popular=popular, popular_answer=answer)


def _popular(
    snapshot: Snapshot, encoder: AnswerEncoder, nobody: Users, trending: TrendingValue, settings: Settings
) -> tuple[Trend, Ranked, CachedAnswer]:
    """The trend over the snapshot's items, and the answer for nobody in particular."""
    trend, ranking = Trend.of(snapshot, trending.scores), snapshot.ranking
    wanted = settings.serving.max_items + ranking.max_consumed + MAX_EXCLUDED
    popular = rank(snapshot, trend, nobody, min(wanted, snapshot.items.num_rows), ranking)
    [value] = encoder.encode(popular.positions, popular.scores, time.time_ns() // 1_000_000)
    return trend, popular, CachedAnswer.decode(value)


def _warm(loaded: Loaded, settings: Settings) -> None:
    """Touch what the first requests will need."""
    snapshot = loaded.snapshot
    item = snapshot.item_ids[0]
    users = users_of(snapshot, [UserRecord.with_items([item, item], 1, 2, last=((item, "view", 0),))], snapshot.ranking)
    everything = np.ones(snapshot.items.num_rows, bool)
    for allowed in (None, everything):
        rank(snapshot, loaded.trend, users, settings.cache.items, snapshot.ranking, allowed)
    loaded.filters.prepare()


def _as_background() -> None:
    """One FAISS thread, and the lowest claim on the processor: calls come first while a release is loaded."""
    one_faiss_thread()
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
