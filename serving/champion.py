"""The release in service: follows the pointer file, loads and verifies in the background, swaps one reference."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np

from recsys_core.online import AnswerEncoder, CachedAnswer, UserRecord, users_of
from recsys_core.ranking import Ranked, Scores, Snapshot, Trend, Users, rank
from recsys_core.release import CHAMPION, Manifest, Pointer, ReleaseError, Releases
from recsys_core.settings import Settings
from serving.validation import MAX_EXCLUDED

log = logging.getLogger(__name__)

RETRY_SECONDS = 30.0
"""A refused release is looked at again after so long: its files may have been repaired."""


class NotReady(LookupError):
    """There is no release to answer from."""


@dataclass(frozen=True)
class Loaded:
    """A verified release with what is derived from it. Everything in it belongs together.

    Attributes:
        trend: of the moment, over the snapshot's items.
        popular: the answer for nobody in particular, one row, long enough for any count and exclusions.
        popular_answer: the same, encoded.
    """

    pointer: Pointer
    manifest: Manifest
    snapshot: Snapshot
    encoder: AnswerEncoder = field(repr=False)
    loaded_at: float
    trend: Trend = field(repr=False)
    popular: Ranked = field(repr=False)
    popular_answer: CachedAnswer = field(repr=False)


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

    def __init__(self, releases: Releases, settings: Settings) -> None:
        self.current: Loaded | None = None
        self.refused: Refused | None = None
        self._releases = releases
        self._settings = settings
        self._scores: Mapping[str, Scores] = {}
        self._refused_pointer: Pointer | None = None
        self._retry_at = 0.0
        self._thread = ThreadPoolExecutor(1, "release", initializer=one_faiss_thread)
        self._building = asyncio.Lock()

    def get(self) -> Loaded:
        """The release in service. Raises NotReady that says why there is none."""
        if self.current is not None:
            return self.current
        if self.refused is not None:
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
                    return False
                new = await loop.run_in_executor(self._thread, self._load, pointer, self._scores)
            except (ReleaseError, OSError) as error:
                self._refuse(pointer, str(error))
                return False
            except Exception as error:
                log.exception("release %s could not be loaded", pointer.release_id if pointer else "?")
                self._refuse(pointer, f"{type(error).__name__}: {error}")
                return False
            self.current = new
            self._refused_pointer = None
            log.info("release %s is in service, %d items", new.snapshot.release_id, new.snapshot.items.num_rows)
            return True

    def _is_wanted(self, pointer: Pointer) -> bool:
        if self.current is not None and pointer == self.current.pointer:
            return False
        return pointer != self._refused_pointer or time.monotonic() >= self._retry_at

    def _refuse(self, pointer: Pointer | None, reason: str) -> None:
        """Keep the old release; say it once for each reason."""
        name = pointer.release_id if pointer else CHAMPION
        if self.refused is None or (self.refused.release_id, self.refused.reason) != (name, reason):
            kept = f"{self.current.snapshot.release_id} stays in service" if self.current else "nothing is in service"
            log.error("%s; %s", reason, kept)
            self.refused = Refused(name, reason, time.time())
        self._refused_pointer = pointer
        self._retry_at = time.monotonic() + RETRY_SECONDS

    def _load(self, pointer: Pointer, scores: Mapping[str, Scores]) -> Loaded:
        manifest, snapshot = self._releases.load(pointer.release_id, pointer.manifest_sha256)
        trend, popular, answer, encoder = derive(snapshot, scores, self._settings)
        _warm(snapshot, trend, self._settings)
        return Loaded(pointer, manifest, snapshot, encoder, time.time(), trend, popular, answer)

    async def set_trend(self, scores: Mapping[str, Scores]) -> None:
        """Use other trend scores, by item id, from now on."""
        async with self._building:
            self._scores = scores
            old = self.current
            if old is None:
                return
            trend, popular, answer, _ = await asyncio.get_running_loop().run_in_executor(
                self._thread, derive, old.snapshot, scores, self._settings, old.encoder
            )
            self.current = replace(old, trend=trend, popular=popular, popular_answer=answer)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


def derive(
    snapshot: Snapshot, scores: Mapping[str, Scores], settings: Settings, encoder: AnswerEncoder | None = None
) -> tuple[Trend, Ranked, CachedAnswer, AnswerEncoder]:
    """The trend over the snapshot's items, and the answer for nobody in particular."""
    encoder = encoder or AnswerEncoder(snapshot.release_id, snapshot.item_ids)
    trend = Trend.of(snapshot, scores)
    wanted = settings.serving.max_items + settings.ranking.max_consumed + MAX_EXCLUDED
    popular = rank(snapshot, trend, nobody(snapshot), min(wanted, snapshot.items.num_rows), snapshot.ranking)
    [value] = encoder.encode(popular.positions, popular.scores, time.time_ns() // 1_000_000)
    return trend, popular, CachedAnswer.decode(value), encoder


def nobody(snapshot: Snapshot) -> Users:
    """One user of whom nothing is known."""
    return users_of(snapshot, [UserRecord()], snapshot.ranking)


def _warm(snapshot: Snapshot, trend: Trend, settings: Settings) -> None:
    """Touch what the first requests will need."""
    users = users_of(snapshot, [UserRecord(last=((snapshot.item_ids[0], "view", 0),))], snapshot.ranking)
    everything = np.ones(snapshot.items.num_rows, bool)
    for allowed in (None, everything):
        rank(snapshot, trend, users, settings.cache.items, snapshot.ranking, allowed)
    snapshot.in_categories(["warm-up"])


def one_faiss_thread() -> None:
    """OpenMP keeps its thread count for each thread: one of a pool must not take all cores for one query."""
    import faiss

    faiss.omp_set_num_threads(1)
