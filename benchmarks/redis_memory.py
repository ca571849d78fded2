"""Memory of users in Redis: the live record after some events, then with what the nightly job adds.

    python benchmarks/redis_memory.py [--users 200000]

Item ids have 7 characters. Bytes are `used_memory` divided by users, so keys, expiry and allocator are in them.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import redis

from recsys_cli.stack import redis_server
from recsys_core.events import EVENT_SCHEMA, now_ms
from recsys_core.live import UPDATE, Batch, UserWriter, user_updates
from recsys_core.online import LAST_ACTIONS, UserRecord, write_records
from recsys_core.redis_client import run_calls
from recsys_core.settings import load_settings

EVENTS_A_USER = 5
AT_ONCE = 10_000


def batches(users: int) -> Iterator[Batch]:
    """Five events for each user."""
    now = now_ms()
    for start in range(0, users, AT_ONCE):
        n = min(AT_ONCE, users - start) * EVENTS_A_USER
        number = np.arange(n)
        columns = {
            "event_id": [f"e{at}" for at in number],
            "user_id": [f"u{start + at // EVENTS_A_USER:07d}" for at in number],
            "item_id": [f"i{at * 7919 % 1_000_000:06d}" for at in number],
            "event_type": ["view"] * n,
            "ts": now + number % EVENTS_A_USER,
        }
        table = pa.table({name: columns.get(name, pa.nulls(n)) for name in EVENT_SCHEMA.names}, schema=EVENT_SCHEMA)
        yield Batch(table, np.zeros(n, np.int64), start * EVENTS_A_USER + number)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=200_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, redis_server(Path(folder)) as url, redis.Redis.from_url(url) as store:
        store.config_set("maxmemory", 0)
        settings = load_settings(Path(folder))
        before = store.info("memory")["used_memory"]

        def tell(what: str) -> None:
            used = store.info("memory")["used_memory"] - before
            print(
                f"{what}: {used / options.users:.0f} bytes a user, {used / options.users / 1000:.2f} GB a million users",
                flush=True,
            )

        writer = UserWriter(store, settings)
        for batch in batches(options.users):
            updates = user_updates(batch, LAST_ACTIONS, 1_800_000)
            run_calls(store, writer.calls(updates, {0: "0abcdef0.0"}, now_ms()), [UPDATE])
        tell(f"live record of {EVENTS_A_USER} actions")
        factor = np.ones(64, np.float32)
        for seen in (50, 200):
            items = tuple(f"i{at:06d}" for at in range(seen))
            for start in range(0, options.users, 2000):
                some = range(start, min(start + 2000, options.users))
                records = ((f"u{at:07d}", UserRecord(seen=items, als_version="0123456789abcdef", als=factor)) for at in some)
                write_records(store, records, 86_400)
            tell(f"with a factor of rank 64 and {seen} items had")


if __name__ == "__main__":
    main()
