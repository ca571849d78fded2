"""The Spark session's configuration, and the progress of Spark jobs."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from recsys_core import progress
from recsys_core.executors import equip_executors
from recsys_core.masking import masked
from recsys_core.settings import Settings
from recsys_core.spark_s3 import s3_conf

STOP_SECONDS = 30
LOCAL_SHUFFLE, CLUSTER_SHUFFLE = 4, 200
"""Partitions of a shuffle where the settings leave it open. Spark joins small ones, and splits none."""

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def is_local(master: str) -> bool:
    """Whether a master address means Spark inside this process. `local-cluster[…]` starts processes of its own."""
    return master == "local" or master.startswith("local[")


def spark_conf(settings: Settings) -> dict[str, str]:
    """Spark properties of the settings; `[spark.conf]` has the last word."""
    spark = settings.spark
    conf = {
        "spark.master": spark.master,
        "spark.app.name": spark.app_name,
        "spark.driver.memory": spark.driver_memory,
        "spark.sql.shuffle.partitions": str(
            spark.shuffle_partitions or (LOCAL_SHUFFLE if is_local(spark.master) else CLUSTER_SHUFFLE)
        ),
        "spark.sql.session.timeZone": "UTC",
        "spark.sql.sources.partitionColumnTypeInference.enabled": "false",
        "spark.sql.parquet.compression.codec": "zstd",
        "spark.ui.showConsoleProgress": "false",
        "spark.hadoop.mapreduce.fileoutputcommitter.marksuccessfuljobs": "false",
    }
    if is_local(spark.master):
        work = settings.home.absolute() / "spark"
        conf |= {
            "spark.driver.host": "127.0.0.1",
            "spark.driver.bindAddress": "127.0.0.1",
            "spark.ui.enabled": "false",
            # Less work beside the tasks than G1's on few cores.
            "spark.driver.extraJavaOptions": "-XX:+UseParallelGC",
            # Many small files are listed faster here than by a Spark job.
            "spark.sql.sources.parallelPartitionDiscovery.threshold": "100000",
            "spark.local.dir": str(work / "tmp"),
            "spark.sql.warehouse.dir": str(work / "warehouse"),
            "spark.log.level": "ERROR",
        }
    return conf | s3_conf(settings.lake_uri) | spark.conf


def prepare_environment(settings: Settings) -> None:
    """What Spark takes from this process's environment, before it starts.

    Python workers of a local Spark are this interpreter, which has what they import. Those of a cluster are the one that
    `spark.pyspark.python` names, which Spark itself reads only where a program is handed to `spark-submit`.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if is_local(settings.spark.master):
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    elif python := settings.spark.conf.get("spark.pyspark.python"):
        os.environ["PYSPARK_PYTHON"] = python
    _start_without_secrets(spark_conf(settings))


def _start_without_secrets(conf: Mapping[str, str]) -> None:
    """Start the JVM where properties are secret: it gets its properties as arguments, which every user of the machine can read.

    The session hands it all of them again, over its own connection.
    """
    from pyspark import SparkConf, SparkContext

    told = {name: value for name, value in conf.items() if masked(value, name) == value}
    if len(told) < len(conf) and SparkContext._gateway is None:
        SparkContext._ensure_initialized(conf=SparkConf(loadDefaults=False).setAll(list(told.items())))


def session(settings: Settings) -> SparkSession:
    """The process's Spark session, started when there is none. Raises ExecutorsUnfit."""
    from pyspark import SparkContext
    from pyspark.sql import SparkSession

    is_new = SparkContext._active_spark_context is None
    prepare_environment(settings)
    builder = SparkSession.builder
    for name, value in spark_conf(settings).items():
        builder = builder.config(name, value)
    started = builder.getOrCreate()
    if is_new and not is_local(settings.spark.master):
        try:
            equip_executors(started, settings.home.absolute() / "spark")
        except BaseException:
            started.stop()
            raise
    return started


def stop_session() -> None:
    """Stop this process's Spark, if it runs, and wait until its JVM and Python workers are gone."""
    from pyspark import SparkContext

    context, gateway = SparkContext._active_spark_context, SparkContext._gateway
    if context is not None:
        context.stop()
    if gateway is not None:
        jvm = gateway.proc
        gateway.shutdown()
        SparkContext._gateway = SparkContext._jvm = None
        jvm.stdin.close()
        jvm.wait(STOP_SECONDS)


@contextmanager
def stage_progress(spark: SparkSession, description: str, every_seconds: float = 0.5) -> Iterator[None]:
    """Report finished and known tasks of the Spark jobs that the block runs, as one bar."""
    group = f"{description}-{threading.get_ident()}"
    spark.sparkContext.setJobGroup(group, description)
    tracker = spark.sparkContext.statusTracker()
    stopped = threading.Event()

    def counts() -> tuple[int, int]:
        done = total = 0
        for job in tracker.getJobIdsForGroup(group):
            info = tracker.getJobInfo(job)
            for stage in info.stageIds if info else ():
                known = tracker.getStageInfo(stage)
                if known:
                    done += known.numCompletedTasks
                    total += known.numTasks
        return done, total

    def watch(bar: progress.Task) -> None:
        while not stopped.wait(every_seconds):
            bar.update(*counts())

    with progress.task(description) as bar:
        watcher = threading.Thread(target=watch, args=(bar,), daemon=True, name="spark-progress")
        watcher.start()
        try:
            yield
        finally:
            stopped.set()
            watcher.join()
            done, total = counts()
            bar.update(max(done, total), total)
            spark.sparkContext.setLocalProperty("spark.jobGroup.id", None)  # type: ignore[arg-type]
