"""Dashboards and alerts: what Grafana and Prometheus load, over metrics that the processes have."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from deployment import DEPLOY, program, read_yaml

import serving.metrics
import streaming.metrics

BOARDS = sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))
SUFFIXES = ("_total", "_bucket", "_sum", "_count", "_info")


def panels() -> Iterator[tuple[str, dict[str, Any]]]:
    for file in BOARDS:
        for panel in json.loads(file.read_text())["panels"]:
            yield file.stem, panel


def expressions() -> list[str]:
    """All queries of the dashboards and of the alerts."""
    shown = [target["expr"] for _, panel in panels() for target in panel["targets"]]
    return shown + [rule["expr"] for group in read_yaml("prometheus", "alerts.yaml")["groups"] for rule in group["rules"]]


def names(prefix: str) -> set[str]:
    """The metrics of the queries whose name starts so, without what a type adds to it."""
    used = {name for expression in expressions() for name in re.findall(r"\brecsys_\w+", expression)}
    stream = {name for name in used if name.startswith("recsys_stream_")}
    found = stream if prefix == "recsys_stream_" else used - stream
    return {re.sub(f"({'|'.join(SUFFIXES)})$", "", name) for name in found}


def test_each_dashboard_is_whole_and_its_panels_do_not_overlap() -> None:
    assert [file.stem for file in BOARDS] == ["serving", "stream"]
    for file in BOARDS:
        board = json.loads(file.read_text())
        assert board["uid"] == file.stem
        ids = [panel["id"] for panel in board["panels"]]
        assert len(set(ids)) == len(ids)
        cells = [
            (x, y)
            for panel in board["panels"]
            for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
            for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
        ]
        assert len(set(cells)) == len(cells), file
        assert max(x for x, _ in cells) < 24, file


def test_panels_ask_the_data_source_that_is_provisioned() -> None:
    (source,) = read_yaml("grafana", "provisioning", "datasources", "prometheus.yaml")["datasources"]
    for board, panel in panels():
        assert panel["datasource"]["uid"] == source["uid"], (board, panel["title"])
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {source["uid"]}, (board, panel["title"])
    services = read_yaml("compose.yaml")["services"]
    assert re.fullmatch(r"http://(\w+):9090", source["url"]).group(1) in services  # type: ignore[union-attr]
    (provider,) = read_yaml("grafana", "provisioning", "dashboards", "recsys.yaml")["providers"]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in services["grafana"]["volumes"]


def test_dashboards_and_alerts_ask_for_metrics_of_the_server() -> None:
    one = {"events": {}, "calls": [["m", "OK", 1]], "latencies": {}, "steps": {}, "info": {"release": "r"}}
    gauges = (
        "calls_under_way",
        "calls_waiting",
        "redis_circuit_open",
        "ranking_circuit_open",
        "release_age_seconds",
        "release_items",
    )
    registry = serving.metrics.registry(lambda: [{**one, "gauges": dict.fromkeys(gauges, 0.0)}])
    assert names("recsys_") <= {family.name for family in registry.collect()}
    source = (Path(serving.metrics.__file__).parent / "server.py").read_text()
    assert [gauge for gauge in gauges if f'"{gauge}"' not in source] == []


def test_dashboards_and_alerts_ask_for_metrics_of_the_speed_layer() -> None:
    assert names("recsys_stream_") <= {family.name for family in streaming.metrics.StreamMetrics().registry.collect()}


def test_an_alert_says_whom_it_wakes_and_what_is_lost() -> None:
    rules = [rule for group in read_yaml("prometheus", "alerts.yaml")["groups"] for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        assert rule["labels"]["severity"] in ("page", "ticket"), rule["alert"]
        assert rule["annotations"]["summary"].endswith("."), rule["alert"]


def test_prometheus_scrapes_what_runs() -> None:
    config = read_yaml("prometheus", "prometheus.yaml")
    services = read_yaml("compose.yaml")["services"]
    for job in config["scrape_configs"]:
        for discovered in job.get("dns_sd_configs", ()):
            assert set(discovered["names"]) <= set(services)
    assert config["rule_files"] == ["/etc/prometheus/alerts.yaml"]


def test_promtool_finds_nothing() -> None:
    promtool = program("promtool")
    if promtool is None:
        pytest.skip("no promtool here: go install github.com/prometheus/prometheus/cmd/promtool@latest")
    found = subprocess.run(
        [promtool, "check", "rules", "alerts.yaml"], cwd=DEPLOY / "prometheus", capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout + found.stderr
