"""What the process counts and measures: plain numbers while it serves, Prometheus's format when it is asked.

The numbers of several processes on one port are added up by their supervisor.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector

BOUNDS = (0.0001, 0.00025, 0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
"""Upper bounds of the histograms' buckets in seconds."""
TIERS = ("CACHE", "REALTIME", "REALTIME_ALS_ONLY", "STALE_CACHE", "POPULAR")
EVENTS = {
    "redis_failures": "reads and writes that Redis failed, refused or did not answer in time",
    "redis_skipped": "reads and writes not tried because Redis does not answer",
    "corrupt_values": "values in Redis that could not be read",
    "late_rankings": "computed answers that came too late",
    "failed_rankings": "computed answers that failed",
    "ranking_skipped": "answers not computed because ranking is too slow",
    "unexpected_failures": "faults of the server itself",
    "dropped_writes": "answers not written to the cache because too many writes were under way",
    "filters_without_items": "filters that no item of the release passes, such as an unknown category or attribute",
    "dropped_reports": "reports to the supervisor that it did not take in time",
    "late_scores": "two-tower scores that came too late or not at all",
    "shed": "calls refused because too many were under way",
    "refused_releases": "releases that were not taken",
    "release_store_failures": "looks at the store of the releases that it did not answer as it should",
    "swaps": "releases taken into service",
}


@dataclass
class Histogram:
    """Durations by bucket; the last bucket has no upper bound."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))
    total: float = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.total += seconds

    def cumulative(self) -> list[tuple[str, float]]:
        """The buckets as Prometheus wants them."""
        buckets, below = [], 0
        for bound, count in zip((*BOUNDS, None), self.counts, strict=True):
            below += count
            buckets.append(("+Inf" if bound is None else repr(bound), float(below)))
        return buckets


class Metrics:
    """The numbers of one process.

    Attributes:
        events: answers by tier and what went wrong, by name.
        calls: ended calls by method and status.
        latencies: of calls by method.
        steps: durations inside of calls by step: redis, rank, two_tower, write.
        gauges: functions that tell a number of the moment, by name.
        info: functions that tell a text of the moment, by name.
    """

    def __init__(self) -> None:
        self.events: Counter[str] = Counter()
        self.calls: Counter[tuple[str, str]] = Counter()
        self.latencies: dict[str, Histogram] = {}
        self.steps = {name: Histogram() for name in ("redis", "rank", "two_tower", "write")}
        self.gauges: dict[str, Callable[[], float]] = {}
        self.info: dict[str, Callable[[], str]] = {}
        self.started_at = time.time()

    def latency(self, method: str) -> Histogram:
        """The histogram of a method."""
        return self.latencies.setdefault(method, Histogram())

    def snapshot(self) -> dict[str, Any]:
        """The numbers as JSON can hold them. Prometheus asks in a thread, while calls add names that were not there."""
        return {
            "events": dict(self.events),
            "calls": [[method, status, count] for (method, status), count in self.calls.copy().items()],
            "latencies": {name: [h.counts, h.total] for name, h in self.latencies.copy().items()},
            "steps": {name: [h.counts, h.total] for name, h in self.steps.items()},
            "gauges": {name: tell() for name, tell in self.gauges.items()},
            "info": {name: tell() for name, tell in self.info.items()},
        }


class PrometheusCollector(Collector):
    """Renders the snapshots of one or several processes as one set of families."""

    def __init__(self, snapshots: Callable[[], Sequence[Mapping[str, Any]]]) -> None:
        self._snapshots = snapshots

    def collect(self) -> Iterator[Any]:
        snapshots = list(self._snapshots())
        events: Counter[str] = Counter()
        calls: Counter[tuple[str, str]] = Counter()
        for snapshot in snapshots:
            events.update(snapshot["events"])
            calls.update({(method, status): count for method, status, count in snapshot["calls"]})
        requests = CounterMetricFamily("recsys_requests", "ended calls", labels=["method", "status"])
        for (method, status), count in sorted(calls.items()):
            requests.add_metric([method, status], count)
        yield requests
        answers = CounterMetricFamily("recsys_answers", "answers for one user", labels=["tier"])
        for tier in TIERS:
            answers.add_metric([tier], events[tier])
        yield answers
        for name, meaning in EVENTS.items():
            yield CounterMetricFamily(f"recsys_{name}", meaning, value=events[name])
        yield _histograms("recsys_request_seconds", "duration of calls", "method", [s["latencies"] for s in snapshots])
        yield _histograms("recsys_step_seconds", "duration of steps inside of calls", "step", [s["steps"] for s in snapshots])
        yield from _gauges([s["gauges"] for s in snapshots])
        yield GaugeMetricFamily("recsys_processes", "serving processes", value=len(snapshots))
        releases = {s["info"].get("release", "") for s in snapshots}
        info = InfoMetricFamily("recsys_release", "the release in service", labels=["release_id"])
        for release in sorted(releases - {""}):
            info.add_metric([release], {})
        yield info


def _histograms(name: str, meaning: str, label: str, of_processes: Iterable[Mapping[str, Any]]) -> HistogramMetricFamily:
    family = HistogramMetricFamily(name, meaning, labels=[label])
    merged: dict[str, Histogram] = {}
    for histograms in of_processes:
        for key, (counts, total) in histograms.items():
            into = merged.setdefault(key, Histogram())
            into.counts = [a + b for a, b in zip(into.counts, counts, strict=True)]
            into.total += total
    for key, histogram in sorted(merged.items()):
        family.add_metric([key], histogram.cumulative(), histogram.total)
    return family


def _gauges(of_processes: Sequence[Mapping[str, float]]) -> Iterator[GaugeMetricFamily]:
    """Ages and states are the worst of the processes, all others are sums."""
    names = sorted({name for gauges in of_processes for name in gauges})
    for name in names:
        values = [gauges[name] for gauges in of_processes if name in gauges]
        merged = sum(values) if name.startswith("calls_") else max(values)
        yield GaugeMetricFamily(f"recsys_{name}", name.replace("_", " "), value=merged)


def serve_metrics(host: str, port: int, snapshots: Callable[[], Sequence[Mapping[str, Any]]]) -> None:
    """Answer Prometheus on a port, from a thread. Raises OSError, which names the port and its setting, when it is taken."""
    from prometheus_client import start_http_server

    try:
        start_http_server(port, host, registry(snapshots))
    except OSError as error:
        reason = f"is something else there? serving.metrics_port chooses another one ({error})"
        raise OSError(f"can't serve metrics on {host}:{port}, {reason}") from error


def registry(snapshots: Callable[[], Sequence[Mapping[str, Any]]]) -> CollectorRegistry:
    """A registry of only these numbers."""
    made = CollectorRegistry(auto_describe=False)
    made.register(PrometheusCollector(snapshots))
    return made
