"""A small broker for trying out: librdkafka's mock cluster, in this process, reachable over TCP by others.

It speaks the Kafka protocol: produce, fetch, consumer groups, commits, transactions. It keeps about 5 MB of each partition
and forgets the oldest beyond that, everything is gone when the process ends, topics come into being on first use with four
partitions and can't be administered, and offsets can't be looked up by time. Use Kafka for anything that matters.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from confluent_kafka import Producer

from recsys_core.stores import open_filesystem, write_atomically

START_SECONDS = 10.0
QUIET = 4
"""Syslog level of librdkafka's own messages: warnings and worse."""


class EmbeddedBroker:
    """A running broker while the block is open. librdkafka picks its port; `address_file` gets the address."""

    def __init__(self, address_file: Path | None = None) -> None:
        self.address_file = address_file
        self.bootstrap_servers = ""
        self._client: Producer | None = None

    def __enter__(self) -> EmbeddedBroker:
        self._client = Producer({"bootstrap.servers": "", "test.mock.num.brokers": 1, "log_level": QUIET})
        brokers = self._client.list_topics(timeout=START_SECONDS).brokers.values()
        self.bootstrap_servers = ",".join(f"{broker.host}:{broker.port}" for broker in brokers)
        if self.address_file is not None:
            fs, path = open_filesystem(str(self.address_file.absolute()))
            write_atomically(fs, path, self.bootstrap_servers.encode())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._client = None
        if self.address_file is not None:
            self.address_file.unlink(missing_ok=True)


def run_broker(ready: Callable[[str], None], address_file: Path | None = None) -> None:
    """Serve until SIGINT or SIGTERM. `ready` is called with the bootstrap address once connections are taken."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with EmbeddedBroker(address_file) as broker:
        ready(broker.bootstrap_servers)
        stop.wait()
