"""Latencies are counted alike whether a handful or a batch of them is observed."""

from __future__ import annotations

import socket
from pathlib import Path

import numpy as np
import psutil
import pytest
import requests
from typer.testing import CliRunner
from waiting import eventually

from recsys_cli.main import app
from recsys_cli.processes import free_port
from recsys_core.settings import StreamSettings
from streaming.metrics import LATENCY_SECONDS, LatencyHistogram, StreamMetrics


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


def addresses_of(port: int) -> set[str]:
    """Where this process listens on a port."""
    found = psutil.Process().net_connections("tcp")
    return {c.laddr.ip for c in found if c.status == psutil.CONN_LISTEN and c.laddr.port == port}


def test_metrics_are_for_this_machine_unless_the_settings_say_otherwise() -> None:
    port, open_port = free_port(), free_port()
    StreamMetrics().serve(StreamSettings().metrics_host, port)
    StreamMetrics().serve("0.0.0.0", open_port)
    assert (addresses_of(port), addresses_of(open_port)) == ({"127.0.0.1"}, {"0.0.0.0"})


def test_a_probe_hears_whether_the_loop_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streaming.metrics.SILENT_SECONDS", 0.5)
    metrics, port = StreamMetrics(), free_port()
    metrics.serve("127.0.0.1", port)

    def asked(path: str) -> int:
        with requests.Session() as session:
            session.trust_env = False
            return session.get(f"http://127.0.0.1:{port}{path}", timeout=5).status_code

    metrics.alive()
    assert asked("/live") == 200
    eventually(lambda: asked("/live") == 503)
    assert asked("/metrics") == 200
    metrics.alive()
    assert asked("/live") == 200


def test_a_port_that_is_taken_is_named_with_its_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("RECSYS_STREAM__METRICS_PORT", str(port))
        refused = CliRunner().invoke(app, ["stream", "--home", str(tmp_path)])
    assert refused.exit_code == 2
    assert f"the metrics can't be served on 127.0.0.1:{port}: Address already in use" in refused.output
    assert "stream.metrics_port" in refused.output
    assert "Traceback" not in refused.output
