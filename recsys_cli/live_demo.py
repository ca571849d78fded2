"""The end of the demo: a user clicks three times, and the next answer is another one."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console

from recsys_cli.console import table
from recsys_cli.kafka import broker_server
from recsys_cli.processes import StackError, running, wait_until
from recsys_cli.stack import RECSYS
from recsys_core.settings import HOME_VARIABLE, Settings

if TYPE_CHECKING:
    from serving.client import Recommendation, RecsysClient

CLICKS = 3
SHOWN = 5
VISIBLE_SECONDS = 30.0
WORKER_SECONDS = 60.0


@contextmanager
def speed_layer(settings: Settings) -> Iterator[str]:
    """Run a broker and a worker of the speed layer while the block runs and yield the broker's address."""
    from recsys_core.heartbeat import HEARTBEATS_KEY
    from recsys_core.redis_client import client

    home = settings.home.absolute()
    with broker_server(settings) as brokers, client(settings.redis) as redis:
        environment = {HOME_VARIABLE: str(home), "RECSYS_KAFKA__BOOTSTRAP_SERVERS": brokers}
        redis.delete(HEARTBEATS_KEY)
        with running("stream", home, [*RECSYS, "stream"], environment) as check:
            wait_until(lambda: _has_partitions(redis), "the speed layer", WORKER_SECONDS, check)
            yield brokers


def _has_partitions(redis: Any) -> bool:
    from recsys_core.heartbeat import read_heartbeats

    return any(beat.lag >= 0 for beat in read_heartbeats(redis))


def click_live(address: str, settings: Settings, console: Console) -> None:
    """Ask for a user, click the first item and two of another kind through Kafka, ask again, and show what changed.

    Raises StackError when the clicks do not come through.
    """
    from recsys_core.catalog import read_catalog
    from recsys_core.lake import Lake
    from recsys_core.redis_client import client
    from serving.client import RecsysClient

    catalog = read_catalog(Lake(settings.lake_uri))
    titles = dict(zip(catalog["item_id"].to_pylist(), catalog["title"].to_pylist(), strict=True))
    categories = dict(zip(catalog["item_id"].to_pylist(), catalog["category"].to_pylist(), strict=True))
    with speed_layer(settings) as brokers, client(settings.redis) as redis, RecsysClient(address, timeout=5.0) as server:
        user = _someone(settings)
        before = server.recommend(user, SHOWN)
        items = [before.items[0].item_id, *_others(server, before, categories)][:CLICKS]
        seconds = _click(brokers, settings, redis, user, items)
        after = server.recommend(user, SHOWN)

    def named(ids: Sequence[str]) -> str:
        return "\n".join(titles.get(item) or item for item in ids)

    rows: list[dict[str, object]] = [
        {"": "before", "is recommended": named([i.item_id for i in before]), "tier": before.tier},
        {"": "clicks", "is recommended": named(items), "tier": f"seen in Redis after {1000 * seconds:.0f} ms"},
        {"": "after", "is recommended": named([i.item_id for i in after]), "tier": after.tier},
    ]
    console.print(table(f"User {user} clicks; the answer after that took {after.milliseconds:.1f} ms", rows))


def _someone(settings: Settings) -> str:
    from recsys_core.lake import Lake
    from recsys_core.tables import ACTIVE_USERS

    lake = Lake(settings.lake_uri)
    hour = lake.latest(ACTIVE_USERS)
    active = lake.dataset(ACTIVE_USERS, [hour]) if hour else None
    if active is None:
        raise StackError("the demo has no active users to click for")
    return str(active.head(1, columns=["user_id"])["user_id"][0].as_py())


def _others(server: RecsysClient, before: Recommendation, categories: Mapping[str, str | None]) -> list[str]:
    """Items like each other of a category that the answer has none of, where what is popular has one."""
    shown = {item.item_id for item in before}
    known = {categories.get(item) for item in shown}
    popular = [item.item_id for item in server.recommend("someone-new", 100)]
    first = next((item for item in popular if categories.get(item) not in known), popular[-1])
    similar = [item.item_id for item in server.similar_items(first, 50) if item.item_id not in shown]
    return [first, *similar]


def _click(brokers: str, settings: Settings, redis: Any, user: str, items: Sequence[str]) -> float:
    """Send clicks and wait until the user's record has them. Returns the seconds from sending the last one."""
    from confluent_kafka import Producer

    from recsys_core.events import now_ms
    from recsys_core.kafka_config import client_config
    from recsys_core.online import read_records
    from streaming.producer import encode

    kafka = settings.kafka.model_copy(update={"bootstrap_servers": brokers})
    producer = Producer(client_config(kafka, linger_ms=0))
    producer.list_topics(settings.kafka.topic, timeout=10)
    for at, item in enumerate(items):
        now = now_ms()
        event = {"event_id": f"live-{now}-{at}", "user_id": user, "item_id": item, "event_type": "click", "ts": now}
        producer.produce(settings.kafka.topic, encode(event), user.encode())
        sent = time.perf_counter()
        producer.flush(10)
    deadline = sent + VISIBLE_SECONDS
    while not set(items) <= {item for item, _, _ in read_records(redis, [user])[0].last}:
        if time.perf_counter() > deadline:
            raise StackError(f"the clicks were not in Redis after {VISIBLE_SECONDS:.0f} s; see run/stream.log in the home")
        time.sleep(0.0005)
    return time.perf_counter() - sent
