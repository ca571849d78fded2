"""What assets work with. Resources alone know hosts, paths and how sessions are made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import dagster as dg

from recsys_core.als import choose_engine
from recsys_core.lake import Lake
from recsys_core.landing import Landing
from recsys_core.redis_client import client
from recsys_core.release import Releases
from recsys_core.settings import Settings
from recsys_core.spark import spark_conf

if TYPE_CHECKING:
    from dagster_pyspark import LazyPySparkResource
    from pyspark.sql import SparkSession


class Platform:
    """The lake, the landing zone, the releases, Redis and Spark of one installation.

    Spark starts at the first use: an asset that needs none pays nothing for it.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.lake = Lake(settings.lake_uri, settings.lake.keep_versions)
        self.landing = Landing(self.lake)
        self.releases = Releases(settings.releases_uri)

    @cached_property
    def _lazy_spark(self) -> LazyPySparkResource:
        from dagster_pyspark import LazyPySparkResource

        return LazyPySparkResource(spark_config=spark_conf(self.settings))

    def spark(self) -> SparkSession:
        """The Spark session of this process."""
        return self._lazy_spark.spark_session

    @property
    def als_engine(self) -> str:
        return choose_engine(self.settings.als, self.settings.spark.master)

    @contextmanager
    def redis(self) -> Iterator[Any]:
        """A Redis client, closed at the end."""
        connected = client(self.settings.redis)
        try:
            yield connected
        finally:
            connected.close()


PlatformResource = dg.ResourceParam[Platform]
