"""A simulated day on a Dagster instance: schedules and sensors evaluated by a clock that is set, their runs carried out.

python day.py HOME, with the variables of test_day.py. A process of its own, because the partitions are read from the
settings when the graph is imported. Prints what happened as JSON.

The day begins at two in the morning, after a first release was made of the day before, and ends with the night after it:

    hours 01 … 00   one tick each; the daemon is away from 10:00 to 11:10
    hour 04         some of its events land at 08:20
    hour 07         its run's process dies
    hour 19         a bot's events land; they are taken back at 02:00, before the second attempt of the night
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow as pa
import pyarrow.compute as pc

from recsys_assets.definitions import build_definitions
from recsys_assets.resources import Platform
from recsys_core.events import DAY_MS, HOUR_MS, MINUTE_MS, hour_key, key_start_ms
from recsys_core.lake import Lake
from recsys_core.landing import Landing
from recsys_core.settings import Settings, load_settings
from recsys_core.simulate import Simulation, SimulationConfig
from recsys_sensors.runs import PARTITION, RANGE_END, RANGE_START

BEFORE, DAY, AFTER = "2026-01-01", "2026-01-02", "2026-01-03"
LATE, CRASHED, BOT = f"{DAY}T04", f"{DAY}T07", f"{DAY}T19"
SENSORS = ("missed_hours", "missed_nights", "late_hours", "champion_promoted", "stream_observed", "alerts")
SOURCE = "shop"


class Hook(BaseHTTPRequestHandler):
    """A webhook that keeps what it is sent, and fails the first time."""

    received: list[str] = []  # noqa: RUF012
    failures = 1

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if Hook.failures:
            Hook.failures -= 1
            self.send_response(503)
        else:
            Hook.received.append(body["text"])
            self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Silent."""


@contextmanager
def webhook() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


class Day:
    """The instance, the clock, and what lands."""

    def __init__(self, settings: Settings, instance: dg.DagsterInstance) -> None:
        self.settings, self.instance = settings, instance
        self.now = key_start_ms(f"{DAY}T02")
        self.platform = Platform(settings, lambda: self.now)
        self.definitions = build_definitions(settings)
        self.repository = self.definitions.get_repository_def()
        self.cursors: dict[str, str | None] = {}
        self.run_keys: set[str] = set()
        self.crash: set[str] = {CRASHED}
        self.runs: list[list[Any]] = []
        self.caches: list[list[str]] = []
        self.lake = Lake(settings.lake_uri)
        self.landing = Landing(self.lake)

    # -- what lands -------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        made = Simulation(
            SimulationConfig(
                users=150, items=100, days=3, events=10_500, end=key_start_ms(AFTER) + DAY_MS, late_rate=0, duplicate_rate=0
            )
        )
        made.write_catalog(self.lake)
        self.batches = {hour_key(batch.arrival_ms): batch.events for batch in made.batches()}
        late = self.batches[LATE]
        self.late = late.slice(0, 20)
        self.batches[LATE] = late.slice(20)
        for hour, events in self.batches.items():
            if hour < f"{DAY}T02":
                self.landing.write_events(SOURCE, hour, events)
        self.execute("hourly", {RANGE_START: f"{BEFORE}T00", RANGE_END: f"{DAY}T00"}, ["clicks_hourly"])
        if not self.execute("nightly", {PARTITION: BEFORE}):
            raise SystemExit("the night before the day failed")
        self.execute("hourly", {PARTITION: f"{DAY}T00"}, ["trending_items", "rec_cache"])
        self.first_champion = self.champion()

    def land(self, hour: str) -> None:
        events = self.batches.get(hour)
        if events is not None:
            self.landing.write_events(SOURCE, hour, of_a_bot(events) if hour == BOT else events)

    def champion(self) -> str:
        pointer = self.platform.releases.champion()
        return pointer.release_id if pointer else ""

    # -- what Dagster does ------------------------------------------------------------------------------------

    def execute(self, job: str, tags: dict[str, str], assets: list[str] | None = None) -> bool:
        """Carry out a run as the daemon's launcher would."""
        definition = self.definitions.resolve_job_def(job)
        keys = [dg.AssetKey(name) for name in assets] if assets else None
        where = tags.get(PARTITION) or f"{tags[RANGE_START]} … {tags[RANGE_END]}"
        if job == "hourly" and where in self.crash:
            self.crash.discard(where)
            run = self.instance.create_run_for_job(definition, tags=tags, status=dg.DagsterRunStatus.STARTED)
            self.instance.report_run_failed(run, "the run's process is gone")
            self.runs.append([clock(self.now), job, where, "crashed"])
            return False
        own = {name: value for name, value in tags.items() if name in (RANGE_START, RANGE_END)}
        done = definition.execute_in_process(
            instance=self.instance,
            partition_key=tags.get(PARTITION),
            asset_selection=keys,
            tags=own,
            raise_on_error=False,
        )
        self.runs.append([clock(self.now), job, where, "done" if done.success else "failed"])
        if done.success and dg.AssetKey("rec_cache") in {e.asset_key for e in done.get_asset_materialization_events()}:
            self.caches.append([clock(self.now), where])
        return bool(done.success)

    def schedule(self, name: str) -> None:
        moment = datetime.fromtimestamp(self.now / 1000, UTC)
        schedule = self.repository.get_schedule_def(name)
        with dg.build_schedule_context(self.instance, moment, repository_def=self.repository) as context:
            self.carry_out(schedule.evaluate_tick(context).run_requests, schedule.job_name)

    def sensors(self) -> None:
        for name in SENSORS:
            sensor = self.repository.get_sensor_def(name)
            context = dg.build_sensor_context(
                self.instance,
                cursor=self.cursors.get(name),
                repository_def=self.repository,
                resources={"platform": self.platform},
                sensor_name=name,
            )
            with context:
                found = sensor.evaluate_tick(context)
            self.cursors[name] = found.cursor
            for event in found.asset_events:
                self.instance.report_runless_asset_event(event)
            self.carry_out(found.run_requests, "")

    def carry_out(self, requests: Any, job: str) -> None:
        for request in requests or ():
            if request.run_key not in self.run_keys:
                self.run_keys.add(request.run_key)
                assets = [key.to_user_string() for key in request.asset_selection or ()]
                tags = {**request.tags, **({PARTITION: request.partition_key} if request.partition_key else {})}
                self.execute(request.job_name or job, tags, assets or None)

    # -- the day ----------------------------------------------------------------------------------------------

    def live(self) -> None:
        """Five minutes at a time until a quarter to three in the morning."""
        self.sensors()
        self.during = ""
        while self.now < key_start_ms(f"{AFTER}T02") + 45 * MINUTE_MS:
            self.now += 5 * MINUTE_MS
            minute = self.now // MINUTE_MS % 60
            hour = hour_key(self.now - HOUR_MS)
            if minute == 0:
                self.land(hour)
            if clock(self.now) == f"{DAY}T08:20":
                self.landing.write_events(SOURCE, f"{LATE}-late", self.late)
            if clock(self.now) == f"{AFTER}T02:00":
                self.during = self.champion()
                self.landing.write_events(SOURCE, BOT, self.batches[BOT])
            if f"{DAY}T10:00" <= clock(self.now) < f"{DAY}T11:10":
                continue
            if minute == 5:
                self.schedule("hourly_schedule")
            if clock(self.now)[11:] == "01:10":
                self.schedule("nightly_schedule")
            if minute % 10 == 0:
                self.sensors()

    def report(self) -> dict[str, Any]:
        hours = [hour_key(ms) for ms in range(key_start_ms(DAY), key_start_ms(DAY) + DAY_MS, HOUR_MS)]
        clicks = self.lake.dataset("clicks_hourly", hours).to_table(columns=["event_id"])["event_id"].to_pylist()
        landed = pa.concat_tables([self.late, *(self.batches[hour] for hour in hours if hour in self.batches)])
        of_day = landed.filter(
            pc.and_(pc.greater_equal(landed["ts"], key_start_ms(DAY)), pc.less(landed["ts"], key_start_ms(AFTER)))
        )
        return {
            "runs": self.runs,
            "caches": self.caches,
            "made": {
                asset: sorted(self.instance.get_materialized_partitions(dg.AssetKey(asset)))
                for asset in ("clicks_hourly", "trending_items", "rec_cache", "interactions", "release", "online_features")
            },
            "clicks": len(clicks),
            "distinct clicks": len(set(clicks)),
            "landed": len(set(of_day["event_id"].to_pylist())),
            "champions": [self.first_champion, self.during, self.champion()],
            "alerts": Hook.received,
        }


def of_a_bot(events: pa.Table) -> pa.Table:
    at = events.schema.get_field_index("user_id")
    return events.set_column(at, events.schema.field("user_id"), pa.array(["bot"] * events.num_rows))


def clock(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M")


def main(home: Path) -> None:
    with webhook() as url, dg.DagsterInstance.ephemeral() as instance:
        settings = load_settings(home, alerts={"webhook_url": url})
        day = Day(settings, instance)
        day.prepare()
        day.live()
        print(json.dumps(day.report()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
