"""What a worker counts, and whether it is alive: served on a port where the settings name one."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, make_wsgi_app
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.exposition import ThreadingWSGIServer

from recsys_core.errors import UserError

LATENCY_SECONDS = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0, 300.0)

SILENT_SECONDS = 120.0
"""Nothing that a worker waits for holds its loop up for so long: not a neighbour that is away, nor a start over."""


class MetricsError(UserError):
    """The metrics can't be served; the message says where, why and what to do."""


class LatencyHistogram:
    """Seconds from the broker's time of a message to its being visible in Redis, counted a batch at a time."""

    def __init__(self) -> None:
        self._edges = np.array(LATENCY_SECONDS) * 1000
        self._edge_list = self._edges.tolist()
        self._counts = np.zeros(len(LATENCY_SECONDS) + 1, np.int64)
        self._sum = 0.0

    def observe(self, milliseconds: np.ndarray) -> None:
        """Count the latencies (ms) of a batch."""
        at = np.searchsorted(self._edges, milliseconds)
        self._counts += np.bincount(at, minlength=len(self._counts))
        self._sum += float(milliseconds.sum()) / 1000

    def observe_few(self, milliseconds: Sequence[int]) -> None:
        """`observe` for a handful."""
        for latency in milliseconds:
            self._counts[bisect_left(self._edge_list, latency)] += 1
        self._sum += sum(milliseconds) / 1000

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """For the registry."""
        names = [*(str(edge) for edge in LATENCY_SECONDS), "+Inf"]
        totals = np.cumsum(self._counts).tolist()
        family = HistogramMetricFamily("recsys_stream_visible_seconds", self.__class__.__doc__ or "")
        family.add_metric([], list(zip(names, totals, strict=True)), self._sum)
        yield family


class StreamMetrics:
    """The metrics of one worker."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._alive_at = time.monotonic()
        self.latency = LatencyHistogram()
        self.registry.register(self.latency)

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"recsys_stream_{name}", text, labels, registry=self.registry)

        def gauge(name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
            return Gauge(f"recsys_stream_{name}", text, labels, registry=self.registry)

        self.messages = counter("messages_total", "Messages taken from the topic and finished")
        self.events = counter("events_total", "Valid events among them")
        self.quick = counter(
            "quick_total", "Messages among them that took the fast path, as they do when the worker has caught up"
        )
        self.dead_letters = counter("dead_letters_total", "Messages that are no event", ("reason",))
        self.dead_letters_refused = counter(
            "dead_letters_refused_total", "Messages among them that the dead-letter topic refuses; the quarantine has them"
        )
        self.fence_hits = counter("fence_hits_total", "Updates of users and trend buckets that had been applied before")
        self.unkeyed = counter("unkeyed_total", "Events without a message key: their user's order is not kept")
        self.redis_retries = counter("redis_retries_total", "Batches tried again because Redis failed")
        self.restarts = counter("restarts_total", "Starts over from what Redis and the archive hold", ("reason",))
        self.archive_files = gauge("archive_files", "Archive files written since the start")
        self.lag = gauge("lag", "Messages between the end of the topic and what is visible", ("partition",))
        self.paused = gauge("paused", "1 while consumption waits for Redis")
        self.batch = gauge("batch_messages", "Messages of the last batch")

    def alive(self) -> None:
        """Say that the worker's loop turns, whatever it waits for."""
        self._alive_at = time.monotonic()

    def serve(self, host: str, port: int) -> None:
        """Answer Prometheus on a port of an address, and probes at `/live`; 0 does nothing.

        `/live` is 200, and 503 when the loop has not turned for SILENT_SECONDS. Raises MetricsError when the port can't be had.
        """
        if not port:
            return
        try:
            server = make_server(host, port, self._answering(), ThreadingWSGIServer, _Handler)
        except OSError as error:
            raise MetricsError(
                f"the metrics can't be served on {host}:{port}: {error.strerror}. "
                "Set another stream.metrics_port (or stream.metrics_host), or 0 for none"
            ) from error
        threading.Thread(target=server.serve_forever, daemon=True, name="metrics").start()

    def _answering(self) -> Any:
        """The WSGI application."""
        metrics = make_wsgi_app(self.registry)

        def answer(request: dict[str, Any], begin: Any) -> Iterable[bytes]:
            if request["PATH_INFO"] != "/live":
                return metrics(request, begin)
            silent = time.monotonic() - self._alive_at
            begin("200 OK" if silent < SILENT_SECONDS else "503 Service Unavailable", [("Content-Type", "text/plain")])
            return [f"the worker's loop turned {silent:.0f} s ago\n".encode()]

        return answer


class _Handler(WSGIRequestHandler):
    """Writes no line for each request."""

    def log_message(self, format: str, *args: object) -> None:
        pass
