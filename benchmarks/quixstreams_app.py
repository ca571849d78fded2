"""The speed layer's aggregation as an application of quixstreams, for `stream_throughput.py --quixstreams`.

Runs in an environment of its own: `python -m venv DIR && DIR/bin/pip install quixstreams`. The last five actions, counters and
the last action time of each user lie in its RocksDB state, with a changelog topic and its exactly-once guarantee. It has
no archive and nothing in Redis.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from quixstreams import Application, State

KEEP = 5


def update(event: dict[str, Any], state: State) -> None:
    known = state.get("user") or {"last": [], "last_ts": 0, "events": 0}
    known["last"] = [[event["item_id"], event["event_type"], event["ts"]], *known["last"]][:KEEP]
    known["last_ts"] = max(known["last_ts"], event["ts"])
    known["events"] += 1
    state.set("user", known)


def main(brokers: str, topic: str, count: int, folder: str) -> None:
    app = Application(
        broker_address=brokers,
        consumer_group="quixstreams",
        auto_offset_reset="earliest",
        processing_guarantee="exactly-once",
        state_dir=folder,
        loglevel="WARNING",
    )
    done, started = 0, 0.0

    def counted(event: dict[str, Any], state: State) -> None:
        nonlocal done, started
        started = started or time.perf_counter()
        update(event, state)
        done += 1

    frame = app.dataframe(app.topic(topic, value_deserializer="json"))
    frame.update(counted, stateful=True)
    app.run(count=count)
    print(done / (time.perf_counter() - started))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
