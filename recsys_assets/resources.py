"""What assets work with. Resources alone know hosts, paths and how sessions are made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from recsys_core.als import choose_engine
from recsys_core.events import now_ms
from recsys_core.lake import Lake
from recsys_core.landing import Landing
from recsys_core.ranking import Snapshot
from recsys_core.redis_client import client
from recsys_core.registry import Registry
from recsys_core.release import Releases
from recsys_core.settings import Settings
from recsys_core.spark import session

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


class Platform:
    """The lake, the landing zone, the releases, the registry, Redis and Spark of one installation.

    Spark and MLflow start at the first use: an asset that needs none pays nothing for it. `now_ms` is the clock that sensors
    go by.
    """

    def __init__(self, settings: Settings, clock: Callable[[], int] = now_ms) -> None:
        self.settings = settings
        self.now_ms = clock
        self.lake = Lake(settings.lake_uri, settings.lake.keep_versions)
        self.landing = Landing(self.lake)
        self.releases = Releases(settings.releases_uri)
        self.registry = Registry(settings)
        self._loaded: tuple[str, Snapshot] | None = None

    def spark(self) -> SparkSession:
        """The Spark session of this process."""
        return session(self.settings)

    @property
    def als_engine(self) -> str:
        return choose_engine(self.settings.als, self.settings.spark.master)

    def release_uri(self, release_id: str) -> str:
        return f"{self.settings.releases_uri}/{release_id}"

    @property
    def release_copies(self) -> Path:
        """Folder of this machine with the releases' files as they are mapped into memory."""
        return self.settings.home.absolute() / "precompute" / "releases"

    def snapshot(self, release_id: str, manifest_sha256: str) -> Snapshot:
        """A verified release, mapped into memory so that processes share its pages; the process keeps the last one.

        Raises ReleaseError.
        """
        if self._loaded is None or self._loaded[0] != manifest_sha256:
            self._loaded = None
            _, snapshot = self.releases.load(release_id, manifest_sha256, self.release_copies)
            self._loaded = manifest_sha256, snapshot
        return self._loaded[1]

    @contextmanager
    def redis(self, **options: Any) -> Iterator[Any]:
        """A Redis client, closed at the end. `options` are those of its connections, such as `socket_timeout`."""
        connected = client(self.settings.redis, **options)
        try:
            yield connected
        finally:
            connected.close()


PlatformResource = dg.ResourceParam[Platform]
