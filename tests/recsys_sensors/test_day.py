"""A day of the platform by itself: 24 hours and a night, with late events, a bot, a crash and an outage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from day import AFTER, BEFORE, BOT, CRASHED, DAY, LATE
from recsys_home import QUICK_SPARK_VARIABLE

from recsys_cli.stack import redis_server
from recsys_core.events import HOUR_MS, hour_key, key_start_ms

pytestmark = pytest.mark.timeout(1500)

HOURS = [hour_key(key_start_ms(f"{DAY}T01") + n * HOUR_MS) for n in range(24)]
FRESH_HOURS, TTL_HOURS = 1, 24


@pytest.fixture(scope="module")
def day(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    home = tmp_path_factory.mktemp("day") / "home"
    home.mkdir()
    (home / "empty.toml").touch()
    with redis_server(home) as url:
        own = {
            "RECSYS_HOME": str(home),
            "RECSYS_CONFIG": str(home / "empty.toml"),
            "RECSYS_REDIS__URL": url,
            "RECSYS_PARTITIONS__START": BEFORE,
            "RECSYS_PARTITIONS__END": "2026-01-05",
            "RECSYS_SPARK__MASTER": "local[1]",
            "RECSYS_SPARK__SHUFFLE_PARTITIONS": "1",
            **QUICK_SPARK_VARIABLE,
            "RECSYS_SPARK__DRIVER_MEMORY": "1g",
            "RECSYS_TWO_TOWER__DIMENSION": "8",
            "RECSYS_TWO_TOWER__HIDDEN": "[8]",
            "RECSYS_TWO_TOWER__HISTORY": "5",
            "RECSYS_TWO_TOWER__EPOCHS": "1",
            "RECSYS_ALS__RANK": "8",
            "RECSYS_ALS__ITERATIONS": "2",
            "DAGSTER_HOME": str(home),
        }
        ran = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("day.py")), str(home)],
            env={**os.environ, **own},
            capture_output=True,
            text=True,
            timeout=1400,
        )
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-6000:]
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def runs_of(day: dict[str, Any], job: str, where: str) -> list[str]:
    return [outcome for _, name, partition, outcome in day["runs"] if (name, partition) == (job, where)]


def test_at_the_end_every_hour_and_the_night_are_there(day: dict[str, Any]) -> None:
    for asset in ("clicks_hourly", "trending_items", "rec_cache"):
        assert set(HOURS) <= set(day["made"][asset]), asset
    for asset in ("interactions", "release", "online_features"):
        assert day["made"][asset] == [BEFORE, DAY]


def test_every_event_that_landed_is_there_once(day: dict[str, Any]) -> None:
    assert day["clicks"] == day["distinct clicks"] == day["landed"] > 2000


def test_an_hour_is_made_once_unless_something_happened_to_it(day: dict[str, Any]) -> None:
    for hour in HOURS:
        assert runs_of(day, "hourly", hour) == (["crashed", "done"] if hour == CRASHED else ["done"]), hour
    assert runs_of(day, "late_hours", LATE) == ["done"]
    assert runs_of(day, "late_hours", BOT) == ["done"]
    assert len([run for run in day["runs"] if run[1] == "late_hours"]) == 2


def test_the_outage_and_the_crash_are_made_up_for_within_the_hour(day: dict[str, Any]) -> None:
    done = {where: at for at, job, where, outcome in day["runs"] if job == "hourly" and outcome == "done"}
    assert done[f"{DAY}T09"] <= f"{DAY}T11:20"
    assert done[CRASHED] <= f"{DAY}T08:30"


def test_the_bad_batch_reached_no_model_and_the_night_was_done_once_it_was_mended(day: dict[str, Any]) -> None:
    before, during, after = day["champions"]
    assert before == during != after
    assert after.startswith(DAY)
    assert runs_of(day, "nightly", DAY) == ["failed", "done"]


def test_the_caches_were_never_older_than_the_ladder_says(day: dict[str, Any]) -> None:
    moments = [datetime.fromisoformat(at) for at, _ in day["caches"]]
    ages = [(later - earlier).total_seconds() / 3600 for earlier, later in pairwise(moments)]
    assert max(ages) < 3 < TTL_HOURS
    older_than_fresh = [age for age in ages if age > FRESH_HOURS]
    assert len(older_than_fresh) <= 2, "after the crash and during the outage"
    nights = [at for at, job, *_ in day["runs"] if job == "nightly" and at > f"{AFTER}T00:00"]
    assert [at for at, _ in day["caches"] if at > max(nights)] or day["caches"][-1][0] >= max(nights)


def test_the_caches_never_go_back_to_an_older_hour(day: dict[str, Any]) -> None:
    hours = [hour for _, hour in day["caches"]]
    assert hours == sorted(hours)
    assert hours[-1] == f"{AFTER}T01"


def test_alerts_were_sent_once_each(day: dict[str, Any]) -> None:
    titles = [text.splitlines()[0] for text in day["alerts"]]
    assert sorted(titles) == [
        "Check failed: clicks_hourly: users_are_many",
        "Check failed: interactions: window_is_sound",
        f"Run of hourly {CRASHED} failed",
    ]
    window = next(text for text in day["alerts"] if "window_is_sound" in text)
    assert BOT in window
    assert "users_are_many" in window
