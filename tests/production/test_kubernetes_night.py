"""A night and an hour on Kubernetes, and an answer from what they made: every step a pod, Spark's executors pods as well.

The last clicks of the day go through three brokers and a worker of the stream, which is a pod too. The lake and the releases
are in S3, the records and caches in a Redis Cluster with replicas, Dagster and MLflow on PostgreSQL.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from brokers import three_brokers
from control_plane import ControlPlane
from dagster_api import DagsterApi
from databases import PASSWORDS, Postgres, postgres_server
from deployment import read_yaml
from helm_chart import WEB_PORT
from installation import ROLLOUT_SECONDS, Installation
from kube_api import Object
from node import NodeSpec, nodes
from object_store import BUCKET, S3Server
from pod_images import PodImage
from recsys_home import QUICK_SPARK
from redis_cluster import cluster
from rig import Drill, Note, had
from stream_world import World as Stream
from waiting import eventually

from recsys_core.events import HOUR_MS, key_start_ms, now_ms
from recsys_core.kafka_config import SILENT
from recsys_core.lake import Lake
from recsys_core.landing import Landing
from recsys_core.release import Releases
from recsys_core.settings import load_settings
from recsys_core.simulate import Simulation, SimulationConfig
from recsys_core.tables import CLICKS_HOURLY
from serving.client import RecsysClient

DAY, NEXT_DAY = "2026-01-01", "2026-01-02"
LAST_HOUR = f"{DAY}T23"
SIZE = {"seed": 7, "users": 200, "items": 120, "days": 1, "events": 6000, "end": key_start_ms(NEXT_DAY)}
SMALL = {
    "RECSYS_ALS__RANK": "16",
    "RECSYS_ALS__ITERATIONS": "3",
    "RECSYS_ALS__HALF_LIVES_DAYS": "[0, 1]",
    "RECSYS_CACHE__SHARDS": "2",
    "RECSYS_CACHE__PARALLEL_STEPS": "1",
    "RECSYS_DAGSTER__AUTOMATION": "false",
    "RECSYS_PARTITIONS__START": DAY,
    "RECSYS_PARTITIONS__END": NEXT_DAY,
    "RECSYS_GATE__MAX_LATENCY_MS": "2000",
    "RECSYS_SPARK__SHUFFLE_PARTITIONS": "2",
}
CONF = {
    **QUICK_SPARK,
    "spark.ui.enabled": "false",
    "spark.kubernetes.executor.request.cores": "100m",
    "spark.kubernetes.allocation.batch.delay": "200ms",
}
EXECUTORS = {
    '"spark.executor.cores" = "4"': '"spark.executor.cores" = "2"',
    '"spark.executor.memory" = "8g"': '"spark.executor.memory" = "700m"',
    '"spark.dynamicAllocation.maxExecutors" = "20"': '"spark.dynamicAllocation.maxExecutors" = "1"',
    'driver_memory = "4g"': 'driver_memory = "1g"',
    "[spark.conf]": "[spark.conf]\n" + "\n".join(f"{json.dumps(name)} = {json.dumps(value)}" for name, value in CONF.items()),
}
"""Of the settings of the manifests: executors that fit this machine."""
CLICKS = 400
"""Of the last hour, which come through Kafka."""
STREAM = {"RECSYS_STREAM__ARCHIVE_SECONDS": "5"}
NIGHT_SECONDS = 1500
"""A run's patience; on two cores that have nothing else to do it takes a few minutes."""


@dataclass(frozen=True)
class World:
    """An installation with a day of clicks in its landing zone, and what sends it more of them."""

    installed: Installation
    dagster: DagsterApi
    stream: Stream


@pytest.fixture(scope="module")
def world(
    plane: ControlPlane,
    images: dict[str, PodImage],
    store: S3Server,
    open_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[World]:
    with ExitStack() as held:
        postgres = held.enter_context(had(postgres_server()))
        redis = held.enter_context(cluster(tmp_path_factory.mktemp("redis"), replicated=True)).nodes
        brokers = held.enter_context(had(three_brokers(tmp_path_factory.mktemp("kafka")))).bootstrap_servers
        running = held.enter_context(had(nodes(plane, [NodeSpec("node")], images, open_folder)))
        lake = Lake(f"s3://{BUCKET}/lake")
        made = Simulation(SimulationConfig.model_validate(SIZE))
        made.write_catalog(lake)
        made.write_landing(Landing(lake))
        installed = Installation(plane, running, open_folder)
        reached = {
            "RECSYS_REDIS__MODE": "cluster",
            "RECSYS_REDIS__NODES": json.dumps(redis),
            "RECSYS_KAFKA__BOOTSTRAP_SERVERS": brokers,
        }
        installed.prepare(
            {**store.environment, **reached},
            recsys_secrets=SMALL,
            recsys_stream_secrets=STREAM,
            dagster_postgresql_secret={"postgresql-password": PASSWORDS["DAGSTER_PG_PASSWORD"]},
        )
        installed.apply("small", [{**service("mlflow"), **CLUSTER_IP}], EXECUTORS)
        installed.kubectl("apply", "-f", "-", stdin=json.dumps(mlflow(postgres)))
        installed.install_dagster(values(postgres))
        (address,) = running.addresses(component="dagster-webserver")
        dagster = DagsterApi(f"http://{address}:{WEB_PORT}", "recsys")
        eventually(dagster.is_loaded)
        sender = load_settings(
            tmp_path_factory.mktemp("sender"),
            kafka={"bootstrap_servers": brokers, "partitions": 12, "replication": 3, "conf": {"log_level": str(SILENT)}},
            redis={"mode": "cluster", "nodes": redis},
            lake={"uri": lake.uri},
        )
        yield World(installed, dagster, Stream.of(sender))


def service(name: str) -> Object:
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}}


CLUSTER_IP = {
    "spec": {"type": "ClusterIP", "externalName": None, "selector": {"app": "mlflow"}, "ports": [{"port": 5000}]},
}


def mlflow(postgres: Postgres) -> Object:
    """The model registry as a pod of its image, on the database that deploy/compose/databases.sh makes."""
    password = PASSWORDS["MLFLOW_PG_PASSWORD"]
    variables = {
        "MLFLOW_BACKEND_STORE_URI": f"postgresql+psycopg2://mlflow:{password}@127.0.0.1:{postgres.port}/mlflow",
        "MLFLOW_WORKERS": "1",
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "mlflow", "labels": {"app": "mlflow"}},
        "spec": {
            "containers": [
                {
                    "name": "mlflow",
                    "image": "recsys/mlflow:0.1.0",
                    "env": [{"name": name, "value": value} for name, value in variables.items()],
                }
            ]
        },
    }


def values(postgres: Postgres) -> dict[str, Any]:
    found: dict[str, Any] = read_yaml("k8s", "dagster-values.yaml")
    found["postgresql"] |= {"postgresqlHost": "127.0.0.1", "service": {"port": postgres.port}}
    found["dagsterWebserver"]["replicaCount"] = 1
    return found


def test_a_night_and_an_hour_make_what_is_served(world: World, note: Note) -> None:
    chance, begin = random.Random(3), key_start_ms(LAST_HOUR)
    clicks = [world.stream.event(chance, begin + chance.randrange(45 * 60_000, HOUR_MS)) for _ in range(CLICKS)]
    world.stream.send(*clicks)
    world.installed.rolled_out("statefulset/stream")
    world.stream.settle(seconds=ROLLOUT_SECONDS)
    world.stream.prove(trends_since_ms=now_ms())
    began = time.monotonic()
    made = world.dagster.launch("hourly", span=(f"{DAY}T00", LAST_HOUR), assets=["clicks_hourly"])
    world.dagster.succeeds(made, NIGHT_SECONDS)
    night = world.dagster.launch("nightly", DAY)
    world.dagster.succeeds(night, NIGHT_SECONDS)
    hour = world.dagster.launch("hourly", LAST_HOUR)
    world.dagster.succeeds(hour, NIGHT_SECONDS)
    seconds = time.monotonic() - began
    lake = Lake(world.stream.settings.lake_uri)
    held = set(lake.dataset(CLICKS_HOURLY, [LAST_HOUR]).to_table()["event_id"].to_pylist())
    assert {str(click["event_id"]) for click in clicks} <= held
    champion = Releases(f"s3://{BUCKET}/releases").champion()
    assert champion is not None
    world.installed.rolled_out("deployment/serving")
    (address,) = world.installed.nodes.addresses(**{"app.kubernetes.io/name": "serving"})
    with RecsysClient(f"{address}:50051", timeout=30) as client:
        answers = [client.recommend(user) for user in ("u000001", str(clicks[-1]["user_id"]))]
    assert {(answer.release_id, answer.tier, len(answer)) for answer in answers} == {(champion.release_id, "CACHE", 10)}
    steps = steps_of(world)
    eventually(lambda: all(pod["status"]["phase"] == "Succeeded" for pod in steps_of(world)))
    engines = "Kubernetes, S3, Redis Cluster, three brokers, PostgreSQL"
    ran = f"a night and an hour, {len(steps)} steps and a worker of the stream as pods"
    note(Drill(engines, ran, "none", f"0 steps, 0 of {CLICKS} events", f"{seconds:.0f} s, then CACHE"))


def steps_of(world: World) -> list[Object]:
    """The pods of all steps of all runs."""
    return world.installed.items("pods", labelSelector="app.kubernetes.io/component=step_worker")
