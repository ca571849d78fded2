"""`rec_cache` in several steps, on real Dagster, Spark and Redis: in processes of their own, in one, killed and failing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow as pa
import pytest
import redis as redis_py
from builders import ms
from snapshots import make_manifest, make_snapshot
from waiting import eventually

from recsys_assets.definitions import build_definitions
from recsys_assets.resources import Platform
from recsys_cli.stack import redis_server
from recsys_core import precompute
from recsys_core.bundle import TRENDING_ITEMS
from recsys_core.online import TRENDING_KEY, CachedAnswer, recs_key, write_answers
from recsys_core.popularity import TRENDS_SCHEMA
from recsys_core.precompute import Shard, read_plan, shards_done
from recsys_core.release import Pointer, Releases
from recsys_core.settings import Settings
from recsys_core.tables import ACTIVE_USERS, CLICKS_HOURLY

HOUR, BEFORE = "2026-03-02T10", "2026-03-02T09"
PLAN, REPORT = "rec_cache.rec_cache_plan", "rec_cache.rec_cache_report"
STEPS = ["rec_cache.rec_cache_shards[0]", "rec_cache.rec_cache_shards[1]"]
SNAPSHOT = make_snapshot(items=60, rank=4)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture
def redis(server: str) -> Iterator[redis_py.Redis]:
    with redis_py.Redis.from_url(server) as client:
        client.flushall()
        yield client


def installation(settings: Settings, url: str, users: int, **cache: int) -> Platform:
    """A champion, and an hour with clicks of so many users; its caches are made by two steps."""
    sections = {"redis": {"url": url}, "cache": {"parallel_steps": 2, "shards": 4, **cache}}
    update = {name: getattr(settings, name).model_copy(update=values) for name, values in sections.items()}
    platform = Platform(settings.model_copy(update=update))
    releases: Releases = platform.releases
    releases.write(make_manifest(SNAPSHOT), SNAPSHOT)
    releases.promote(SNAPSHOT.release_id)
    names = [f"user-{n}" for n in range(users)]
    for hour in (BEFORE, HOUR):
        platform.lake.write(CLICKS_HOURLY, hour, pa.table({"user_id": names, "ts": [ms(hour)] * users}))
        platform.lake.write(TRENDING_ITEMS, hour, TRENDS_SCHEMA.empty_table())
    return platform


def run(platform: Platform, instance: dg.DagsterInstance, hour: str = HOUR) -> dg.ExecuteInProcessResult:
    job = build_definitions(platform.settings).resolve_job_def("caches")
    return job.execute_in_process(instance=instance, partition_key=hour, raise_on_error=False, resources={"platform": platform})


def made(result: dg.ExecuteInProcessResult) -> dict[str, Any]:
    (event,) = result.get_asset_materialization_events()
    assert (event.asset_key, event.step_key) == (dg.AssetKey("rec_cache"), REPORT)
    return {name: value.value for name, value in event.materialization.metadata.items()}


def answered(redis: redis_py.Redis) -> set[str]:
    return {key.decode()[len("recs:{") : -1] for key in redis.scan_iter("recs:*")}


pytestmark = pytest.mark.usefixtures("spark")


def test_all_steps_of_one_process_use_one_snapshot_and_no_value_is_stored(
    settings: Settings, server: str, redis: redis_py.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    platform = installation(settings, server, 50)
    loaded = []
    load = platform.releases.load
    monkeypatch.setattr(platform.releases, "load", lambda *args: loaded.append(args) or load(*args))
    with dg.DagsterInstance.ephemeral() as instance:
        result = run(platform, instance)
    assert result.success
    assert {e.step_key for e in result.all_events if e.is_step_success} >= {PLAN, *STEPS, REPORT}
    assert len(loaded) == 1
    assert not [e for e in result.all_events if e.is_handled_output or e.is_loaded_input]
    assert answered(redis) == {f"user-{n}" for n in range(50)}
    assert redis.exists(TRENDING_KEY)
    found = made(result)
    assert (found["active users"], found["users written"], found["users without any item"]) == (50, 50, 0)
    assert found["release_id"] == SNAPSHOT.release_id
    assert found["users a second"] > 0
    assert len(found["samples"].splitlines()) == 2 + 10
    assert "user-" not in str(found), "Dagster's store keeps metadata longer than a user may want"
    checks = {e.check_name: e.passed for e in result.get_asset_check_evaluations()}
    assert checks == dict.fromkeys(checks, True)
    assert len(checks) == 3


def test_an_hour_that_is_made_up_for_later_writes_nothing(settings: Settings, server: str, redis: redis_py.Redis) -> None:
    platform = installation(settings, server, 5)
    with dg.DagsterInstance.ephemeral() as instance:
        assert run(platform, instance).success
        redis.flushall()
        late = run(platform, instance, BEFORE)
    assert late.success
    assert made(late) == {"left to another run": f"the caches are those of {HOUR}"}
    assert not redis.keys()
    assert platform.lake.latest(ACTIVE_USERS) == HOUR


def test_a_run_that_another_one_of_the_hour_overtakes_leaves_the_rest_to_it(
    settings: Settings, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    platform = installation(settings, server, 50)

    def write(client: Any, answers: Any, ttl_seconds: int) -> int:
        champion = Pointer("another release", "", 0.0)
        precompute.plan_caches(platform.lake, HOUR, champion, platform.settings, "another")
        return write_answers(client, answers, ttl_seconds)

    monkeypatch.setattr(precompute, "write_answers", write)
    with dg.DagsterInstance.ephemeral() as instance:
        overtaken = run(platform, instance)
    assert overtaken.success
    assert made(overtaken) == {"left to another run": f"the caches are those of {HOUR}"}
    plan = read_plan(platform.lake)
    assert plan is not None
    assert (plan.run, plan.finished) == ("another", False)


def test_a_step_that_fails_is_retried_with_what_it_had_not_done(
    settings: Settings, server: str, redis: redis_py.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    platform = installation(settings, server, 50)
    written: list[list[str]] = []

    def write(client: Any, answers: Any, ttl_seconds: int) -> int:
        found = list(answers)
        written.append([user for user, _ in found])
        if len(written) == 2:
            raise ConnectionError("Redis went away")
        return write_answers(client, found, ttl_seconds)

    monkeypatch.setattr(precompute, "write_answers", write)
    with dg.DagsterInstance.ephemeral() as instance:
        result = run(platform, instance)
    assert result.success
    assert [e.step_key for e in result.all_events if e.is_step_up_for_retry] == [STEPS[0]]
    assert len(written) == 5
    assert written.count(written[1]) == 2, "the shard that failed, again"
    assert written.count(written[0]) == 1, "the finished one of the same step was left"
    assert answered(redis) == {f"user-{n}" for n in range(50)}


def test_two_processes_fill_all_caches_and_one_that_is_killed_goes_on_where_it_was(
    settings: Settings, server: str, redis: redis_py.Redis, tmp_path: Path
) -> None:
    """The killed step is caught between two shards: Redis takes no writes from the moment at which it has finished one."""
    users = 800
    platform = installation(settings, server, users, shards=16)
    home = tmp_path / "dagster"
    home.mkdir()
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RECSYS_")},
        "DAGSTER_HOME": str(home),
        "RECSYS_HOME": str(settings.home),
        "RECSYS_CONFIG": str(settings.home / "empty.toml"),
        "RECSYS_REDIS__URL": server,
        "RECSYS_DAGSTER__EXECUTOR": "multiprocess",
        "RECSYS_DAGSTER__MAX_PROCESSES": "2",
        "RECSYS_CACHE__PARALLEL_STEPS": "2",
        "RECSYS_CACHE__SHARDS": "16",
        "RECSYS_CACHE__BATCH_USERS": "1",
    }
    command = [sys.executable, "-m", "dagster", "job", "execute", "-m", "recsys_assets.definitions", "-j", "caches"]
    command += ["--tags", f'{{"dagster/partition": "{HOUR}"}}']
    with (home / "log").open("w") as log, dg.DagsterInstance.from_config(str(home)) as instance:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            before = eventually(lambda: first_shards(platform), 120)
            redis.execute_command("CLIENT", "PAUSE", 600_000, "WRITE")
            before = shards_done(platform.lake, read_plan(platform.lake))  # type: ignore[arg-type]
            unfinished = {step for step in (0, 1) if set(range(step, 16, 2)) - set(before)}
            killed = min(unfinished & {shard % 2 for shard in before})
            started = eventually(lambda: processes(instance) if STEPS[killed] in processes(instance) else None, 120)
            os.kill(started[STEPS[killed]], signal.SIGKILL)
            redis.execute_command("CLIENT", "UNPAUSE")
            assert process.wait(180) == 0, (home / "log").read_text()[-5000:]
        finally:
            redis.execute_command("CLIENT", "UNPAUSE")
            process.kill()
            process.wait()
        (record,) = instance.get_run_records()
        events = [e.dagster_event for e in instance.all_logs(record.dagster_run.run_id) if e.dagster_event]
    assert record.dagster_run.is_success
    assert [e.step_key for e in events if e.is_step_up_for_retry] == [STEPS[killed]]
    assert len({*processes_of(events).values()}) >= 4, "a process for each step"
    after = shards_done(platform.lake, read_plan(platform.lake))  # type: ignore[arg-type]
    assert after.items() >= before.items(), "what was finished was not done again"
    assert len(after) == 16
    assert answered(redis) == {f"user-{n}" for n in range(users)}
    values = redis.mget([recs_key(f"user-{n}") for n in range(users)])
    assert {CachedAnswer.decode(value).release_id for value in values} == {SNAPSHOT.release_id}
    (materialized,) = [e for e in events if e.is_step_materialization]
    assert materialized.partition == HOUR
    metadata = materialized.step_materialization_data.materialization.metadata
    assert (metadata["users written"].value, metadata["active users"].value) == (users, users)


def first_shards(platform: Platform) -> dict[int, Shard]:
    plan = read_plan(platform.lake)
    return shards_done(platform.lake, plan) if plan else {}


def processes(instance: dg.DagsterInstance) -> dict[str, int]:
    """The process of each step that has begun."""
    records = instance.get_run_records()
    events = instance.all_logs(records[0].dagster_run.run_id) if records else []
    return processes_of([e.dagster_event for e in events if e.dagster_event])


def processes_of(events: list[dg.DagsterEvent]) -> dict[str, int]:
    started = [e for e in events if e.event_type == dg.DagsterEventType.STEP_WORKER_STARTED and e.step_key]
    return {str(e.step_key): int(e.engine_event_data.metadata["pid"].value) for e in started}
