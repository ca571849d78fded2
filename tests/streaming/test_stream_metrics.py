"""Latencies are counted alike whether a handful or a batch of them is observed."""

from __future__ import annotations

import numpy as np
import pytest

from streaming.metrics import LATENCY_SECONDS, LatencyHistogram


def test_a_handful_is_counted_as_a_batch_is() -> None:
    few, many = LatencyHistogram(), LatencyHistogram()
    latencies = [0, 1, 2, 3, 7, 8, 15, 16, 999, 1000, 1001, 300_000, 300_001]
    few.observe_few(latencies)
    many.observe(np.array(latencies))
    (one,), (other,) = few.collect(), many.collect()
    assert one.samples == other.samples
    found = {sample.labels["le"]: sample.value for sample in one.samples if "le" in sample.labels}
    assert found == {
        **{str(edge): sum(latency <= edge * 1000 for latency in latencies) for edge in LATENCY_SECONDS},
        "+Inf": len(latencies),
    }
    assert [s.value for s in one.samples if s.name.endswith("_sum")] == [pytest.approx(sum(latencies) / 1000)]
