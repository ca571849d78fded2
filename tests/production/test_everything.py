"""All engines at once: a night and an hour, from clicks in Kafka to an answer that names the release, and then a soak.

pytest tests/production/test_everything.py --minutes 60 --seed 1
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest
from callers import FAILED
from everything import Everything, Server, everything
from rig import Drill, Note, had
from s3fs import S3FileSystem
from soak import BACK, Parts, drills, soak, untrue
from speed_layer import WELL
from stream_world import World

from recsys_core.events import DAY_MS, HOUR_MS, day_key, hour_key, now_ms
from recsys_core.lake import Lake
from recsys_core.landing import Landing
from recsys_core.release import Releases
from recsys_core.simulate import Simulation, SimulationConfig
from recsys_core.tables import ACTIVE_USERS, CLICKS_HOURLY
from serving.client import RecsysClient

SIZE = {"users": 200, "items": 120, "days": 1, "events": 6000}
CLICKS = 400


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Everything]:
    with had(everything(tmp_path_factory.mktemp("everything"), day_key(now_ms() - DAY_MS))) as running:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in running.store.environment.items():
                patch.setenv(name, value)
            S3FileSystem.clear_instance_cache()
            yield running


@pytest.fixture(scope="module")
def stream(platform: Everything) -> Iterator[World]:
    """Two workers."""
    made = World.of(platform.settings())
    made.environment.update(platform.store.environment)
    made.start()
    made.start()
    yield made
    made.close()


@pytest.fixture(scope="module")
def servers(platform: Everything) -> Iterator[list[Server]]:
    """Two servers, not started."""
    made = [Server(platform.environment, platform.home) for _ in range(2)]
    yield made
    for server in made:
        server.kill()


def test_a_night_and_an_hour_end_in_an_answer_that_names_the_release(
    platform: Everything, stream: World, servers: list[Server], note: Note
) -> None:
    lake = Lake(platform.settings().lake_uri)
    yesterday = Simulation(SimulationConfig.model_validate({**SIZE, "end": now_ms() // DAY_MS * DAY_MS}))
    yesterday.write_catalog(lake)
    yesterday.write_landing(Landing(lake))
    platform.job("history", day_key(now_ms() - DAY_MS))
    champion = Releases(platform.settings().releases_uri).champion()
    assert champion is not None

    chance, hour = random.Random(3), now_ms() // HOUR_MS * HOUR_MS - HOUR_MS
    clicks = [stream.event(chance, hour + chance.randrange(45 * 60_000, HOUR_MS)) for _ in range(CLICKS)]
    stream.send(*clicks)
    stream.settle()
    platform.job("hourly", hour_key(hour))

    held = lake.dataset(CLICKS_HOURLY, [hour_key(hour)]).to_table()["event_id"].to_pylist()
    of_hour = {str(click["event_id"]) for click in clicks if int(str(click["ts"])) >= hour}
    assert of_hour
    assert of_hour <= set(held)
    users = lake.dataset(ACTIVE_USERS, [hour_key(hour)]).to_table()["user_id"].to_pylist()
    assert {str(click["user_id"]) for click in clicks} <= set(users)

    servers[0].start()
    with RecsysClient(servers[0].address, timeout=10) as client:
        answers = {user: client.recommend(user) for user in users}
    assert {answer.release_id for answer in answers.values()} == {champion.release_id}
    tiers = [answer.tier for answer in answers.values()]
    assert tiers.count("CACHE") >= 0.95 * len(users), tiers
    assert champion.release_id in platform.recsys("recommend", users[0], "--address", servers[0].address)
    stream.prove()
    note(
        Drill(
            "all of them at once, the lake in S3",
            "a night and an hour, an answer of each of their users",
            "none",
            f"0 of {stream.sent:,} events, 0 of {len(users)} answers",
            "-",
        )
    )


@pytest.mark.timeout(6 * 3600)
def test_a_fault_each_minute_loses_nothing_and_every_answer_is_true(
    platform: Everything, stream: World, servers: list[Server], note: Note, request: pytest.FixtureRequest
) -> None:
    settings = platform.settings()
    lake = Lake(settings.lake_uri)
    (hour, *_) = sorted(lake.keys(ACTIVE_USERS), reverse=True)
    active = lake.dataset(ACTIVE_USERS, [hour]).to_table()["user_id"].to_pylist()
    readers = [user for user in active if not user.startswith(stream.prefix)]
    for server in servers:
        server.kill()
        server.start()
    sent = stream.sent
    minutes, chance = request.config.getoption("--minutes"), random.Random(request.config.getoption("--seed"))
    soaked = soak(Parts(platform, stream, servers), readers, minutes, chance)
    stream.settle()
    stream.prove()

    assert soaked.calls.tiers(0)[FAILED] == 0
    assert untrue(soaked, settings.cache.fresh_seconds) == []
    for one in soaked.struck:
        assert one.visible_after <= BACK["clicks"], one
    for before, after in itertools.pairwise([*soaked.struck, None]):
        assert before is not None
        calm = soaked.calls.tiers(before.ended + BACK["answers"], after.began if after else float("inf"))
        assert calm["CACHE"] >= WELL * calm.total(), (before, calm)
    for drill in drills(soaked):
        note(drill)
    lost = f"0 of {stream.sent - sent:,} events, 0 of {len(soaked.calls.made):,} answers"
    jobs = f"{len(soaked.jobs)} hours and nights, {sum(attempts > 1 for attempts in soaked.jobs.values())} of them tried again"
    note(Drill("all at once", jobs, f"a soak of {minutes:g} minutes, {len(soaked.struck)} faults", lost, "see above"))
