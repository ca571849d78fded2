"""`recsys backfill` and `recsys replay` as a person runs them: a command, its output, what it leaves behind."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pyarrow as pa
import pytest
from builders import write_interactions
from nights import prepare_night, small
from rich.console import Console

from recsys_cli import history
from recsys_cli.backfill import PROCESS, tell_who_is_before
from recsys_cli.stack import prepare_dagster_home, redis_server
from recsys_core.bundle import ALS_FACTORS, POPULAR_ITEMS, TRENDING_ITEMS
from recsys_core.lake import Lake
from recsys_core.landing import QUARANTINE_SCHEMA, Landing
from recsys_core.registry import Registry
from recsys_core.settings import Settings


@dg.job
def idle() -> None:
    """A job without any step."""


DAYS = ("2026-03-01", "2026-03-02")
TOML = """
[partitions]
start = 2026-02-01
end = 2026-03-05
[als]
rank = 4
regularization = 0.1
"""


@pytest.fixture
def home(mlflow_settings: Settings) -> Path:
    """Two nights, each with its clicks at ten o'clock."""
    lake = Lake(mlflow_settings.lake_uri)
    for day in DAYS:
        prepare_night(lake, day, small(mlflow_settings))
    (mlflow_settings.home / "recsys.toml").write_text(TOML)
    return mlflow_settings.home


def recsys(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("RECSYS_", "DAGSTER_"))}
    return subprocess.run(
        [sys.executable, "-m", "recsys_cli.main", *arguments, "--home", str(home)],
        env={**own, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_a_range_of_days_is_made_again_one_run_a_day_and_dagster_knows(home: Path, mlflow_settings: Settings) -> None:
    lake = Lake(mlflow_settings.lake_uri)
    before = {day: lake.get(ALS_FACTORS, day).version for day in DAYS}
    done = recsys(home, "backfill", "als_factors", *DAYS)
    assert done.returncode == 0, done.stdout + done.stderr
    for day in DAYS:
        assert f"als_factors {day}: made" in done.stdout
        assert lake.get(ALS_FACTORS, day).version != before[day]
    assert {run.info.run_name for run in Registry(mlflow_settings).runs()} == {f"als_factors {day}" for day in DAYS}


def test_hours_are_made_and_a_failed_one_gives_exit_code_1(home: Path, mlflow_settings: Settings) -> None:
    lake = Lake(mlflow_settings.lake_uri)
    done = recsys(home, "backfill", "trending_items", f"{DAYS[0]}T10", f"{DAYS[0]}T12")
    assert done.returncode == 0, done.stdout + done.stderr
    assert lake.keys(TRENDING_ITEMS) == [f"{DAYS[0]}T{hour}" for hour in (10, 11, 12)]
    assert lake.get(TRENDING_ITEMS, f"{DAYS[0]}T12").rows
    failed = recsys(home, "backfill", "item_index", "2026-03-02", "2026-03-03")
    assert failed.returncode == 1, "there are no factors of the third"
    assert "item_index 2026-03-02: made" in failed.stdout
    log = home / "run" / "backfill-item_index.log"
    assert "item_index 2026-03-03: FAILED" in failed.stdout
    assert "has no partition 2026-03-03" in failed.stdout.replace("\n", " ")
    assert f"the whole log: {log}" in failed.stdout.replace("\n", " ")
    assert "MissingPartition" in log.read_text()
    assert (home / "run" / "backfill-trending_items.log").is_file(), "each asset has a log, so that backfills side by side do"


@pytest.mark.parametrize(
    ("process", "told"), [("gone", "was killed"), ("alive", "waiting: run"), ("elsewhere", "waiting: run")]
)
def test_a_full_pool_is_told_and_what_a_killed_run_held_is_freed(process: str, told: str, tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    pid = os.getpid() if process == "alive" else ended.pid
    host = "elsewhere" if process == "elsewhere" else socket.gethostname()
    shown = Console(file=io.StringIO(), width=200)
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        run = instance.create_run_for_job(idle, tags={PROCESS: f"{host}:{pid}"})
        instance.event_log_storage.set_concurrency_slots("spark", 1)
        tell_who_is_before(instance, "spark", shown)
        assert shown.file.getvalue() == "", "nobody is before"
        instance.event_log_storage.claim_concurrency_slot("spark", run.run_id, "step")
        tell_who_is_before(instance, "spark", shown)
        assert told in shown.file.getvalue()
        assert run.run_id in shown.file.getvalue()
        held = instance.event_log_storage.get_concurrency_info("spark").active_run_ids
        assert held == (set() if process == "gone" else {run.run_id})


def test_an_asset_or_a_partition_that_is_not_there_is_one_line(home: Path) -> None:
    unknown = recsys(home, "backfill", "nothing", *DAYS)
    assert unknown.returncode == 2
    assert "no asset 'nothing' with partitions; there are als_factors, champion" in unknown.stderr
    outside = recsys(home, "backfill", POPULAR_ITEMS, "2025-01-01", "2025-01-02")
    assert outside.returncode == 2
    assert "popular_items has no partition '2025-01-01'" in outside.stderr


def test_a_day_is_replayed_beside_what_users_then_did(home: Path) -> None:
    shown = recsys(home, "replay", "--day", DAYS[1], "--user", "u0", "--count", "3")
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert f"{DAYS[1]} from the data before it" in shown.stdout
    assert "u0" in shown.stdout
    assert "Without two_tower: answers come from ALS alone" in shown.stdout
    refused = recsys(home, "replay", "--day", "2026-02-01")
    assert refused.returncode == 2
    assert "there are no clicks in the 90 days before 2026-02-01" in refused.stderr


@pytest.fixture
def redis_url(tmp_path: Path) -> Iterator[str]:
    with redis_server(tmp_path / "redis") as url:
        yield url


def forget(settings: Settings, redis_url: str, user: str) -> tuple[int, str]:
    """Exit code and output."""
    at = settings.model_copy(update={"redis": settings.redis.model_copy(update={"url": redis_url})})
    shown = Console(file=io.StringIO(), width=200)
    code = history.forget(at, user, shown)
    assert isinstance(shown.file, io.StringIO)
    return code, shown.file.getvalue()


@pytest.fixture
def own_dagster_home(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAGSTER_HOME", str(prepare_dagster_home(settings.home)))


def test_forgetting_somebody_whom_nobody_knows_says_so(mlflow_settings: Settings, redis_url: str) -> None:
    home = mlflow_settings.home
    write_interactions(Lake(mlflow_settings.lake_uri), DAYS[0], [("u7", "i1", 1.0)])
    (home / "recsys.toml").write_text(f'{TOML}\n[redis]\nurl = "{redis_url}"\n')
    done = recsys(home, "forget", "nosuchuser")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "There is no trace of this user in " in done.stdout
    assert "was not searched" not in done.stdout
    assert "were fitted with this user" not in done.stdout
    assert "Kafka's topics clickstream.events and clickstream.dead-letter: messages stay for 168 hours" in done.stdout


@pytest.mark.usefixtures("own_dagster_home")
def test_forgetting_tells_what_went_what_is_left_to_look_at_and_what_could_not_be_searched(
    settings: Settings, redis_url: str
) -> None:
    lake = Lake(settings.lake_uri)
    rows = [
        {"origin": "a", "row": 1, "reason": "bad", "content": content}
        for content in ('{"user_id":"u7"}', "u7,i1,view", '{"user_id":"u8","note":"u7"}')
    ]
    write_interactions(lake, DAYS[0], [("u7", "i1", 1.0), ("u8", "i1", 1.0)])
    Landing(lake).write_quarantine("shop", "a", pa.Table.from_pylist(rows, schema=QUARANTINE_SCHEMA))
    half = lake.path("landing", "app", "half.parquet")
    lake.fs.makedirs(lake.path("landing", "app"))
    lake.fs.pipe_file(half, b"PAR1")
    code, shown = forget(settings, redis_url, "u7")
    assert code == 1
    assert "landing/app/half.parquet was not searched" in shown
    assert "Look at: quarantine (rows that name no user by a field)" in shown
    assert "interactions" in shown
    lake.fs.rm_file(half)
    code, shown = forget(settings, redis_url, "u7")
    assert (code, "There is no trace of this user" in shown) == (0, True)


@pytest.mark.usefixtures("own_dagster_home")
def test_a_run_under_way_is_named_because_it_may_write_what_it_has_read(settings: Settings, redis_url: str) -> None:
    with dg.DagsterInstance.get() as instance:
        instance.create_run_for_job(idle, status=dg.DagsterRunStatus.STARTED)
    code, shown = forget(settings, redis_url, "nosuchuser")
    assert code == 1
    assert "What runs write that were under way was not searched: 1 of idle began before the removal" in shown


@pytest.mark.usefixtures("own_dagster_home")
def test_without_redis_forgetting_names_it_in_a_line(settings: Settings) -> None:
    code, shown = forget(settings, "redis://127.0.0.1:1", "nosuchuser")
    assert code == 1
    assert "Redis was not searched: ConnectionError" in shown
