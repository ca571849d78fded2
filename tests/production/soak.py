"""Clicks, answers, hours and nights on all engines at once, while each minute one part is killed, frozen, cut off or full."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from brokers import NODES
from callers import FAILED, Calls, calling
from everything import Everything, Server
from load import Stall, clicks, stalls
from rig import Drill
from stream_world import World
from waiting import eventually

from recsys_core.events import DAY_MS, HOUR_MS, day_key, hour_key, hour_keys, key_start_ms, now_ms
from recsys_core.release import Releases

MINUTE = 60.0
HELD = (8.0, 15.0)
"""Seconds for which a fault lasts."""
VISIBLE = 2.0
"""A click that is visible so soon (s) is as it should be."""
BACK = {"answers": 5.0, "clicks": 30.0}
"""Seconds after a fault has ended in which all is as before."""
ATTEMPTS = 3
"""Of a job, as Dagster's schedules have it."""
FOLLOW_SECONDS = 20.0
"""In which servers have taken a release that was promoted."""
FULL = "1mb"


@dataclass(frozen=True)
class Fault:
    """What is done to a part, and how it ends."""

    name: str
    strike: Callable[[], object]
    heal: Callable[[], object]


@dataclass
class Struck:
    """A fault that was: when it began and ended (monotonic s), and what it cost.

    Attributes:
        visible_after: seconds after its end until clicks were visible as before.
        stall: the longest time (s) for which a click was not visible.
    """

    name: str
    began: float
    ended: float = 0.0
    visible_after: float = 0.0
    stall: float = 0.0


@dataclass
class Soaked:
    """What happened.

    Attributes:
        releases: when each was first seen as the champion (monotonic s).
        jobs: attempts that each hour and night took.
    """

    calls: Calls
    struck: list[Struck] = field(default_factory=list)
    releases: dict[str, float] = field(default_factory=dict)
    jobs: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Parts:
    """All that runs, and the faults of each part."""

    platform: Everything
    stream: World
    servers: Sequence[Server]

    def any(self, chance: random.Random) -> Fault:
        """One of them."""
        kind: Callable[[random.Random], Fault] = chance.choice(
            [self.broker, self.redis, self.redis, self.store, self.executor, self.worker, self.server]
        )
        return kind(chance)

    def well(self) -> bool:
        """Whether all copies are there again, so that the next fault hits a part that another one can stand in for."""
        topic = self.stream.settings.kafka.topic
        return self.platform.brokers.in_sync(topic) and self.platform.redis.is_whole()

    def broker(self, chance: random.Random) -> Fault:
        brokers, node = self.platform.brokers, chance.choice(NODES)
        how = chance.choice(["killed", "frozen"])
        strike = brokers.kill if how == "killed" else brokers.freeze
        return Fault(f"a broker {how}", partial(strike, node), partial(brokers.heal, node))

    def redis(self, chance: random.Random) -> Fault:
        cluster = self.platform.redis
        master = chance.choice(cluster.masters())
        how = chance.choice(["killed", "frozen", "cut off", "full"])
        node = cluster.node(master)
        strike, heal = {
            "killed": (partial(cluster.kill, master), partial(cluster.start, master)),
            "frozen": (partial(cluster.signal, master, signal.SIGSTOP), partial(cluster.signal, master, signal.SIGCONT)),
            "cut off": (partial(cluster.cut_off, master), partial(cluster.mend, master)),
            "full": (partial(node.config_set, "maxmemory", FULL), partial(node.config_set, "maxmemory", "0")),
        }[how]
        return Fault(f"a Redis master {how}", strike, heal)

    def store(self, _chance: random.Random) -> Fault:
        return Fault("the object store frozen", self.platform.store.freeze, self.platform.store.thaw)

    def executor(self, chance: random.Random) -> Fault:
        spark, number = self.platform.spark, chance.randrange(2)
        return Fault("a Spark worker killed", partial(spark.kill_worker, number), partial(spark.start_worker, number))

    def worker(self, chance: random.Random) -> Fault:
        stream = self.stream
        worker = chance.choice(stream.workers)
        if chance.random() < 0.5:
            return Fault("a stream worker killed", partial(stream.kill, worker), stream.start)
        frozen = partial(stream.kill, worker, signal.SIGSTOP)
        return Fault("a stream worker frozen", frozen, partial(stream.kill, worker, signal.SIGCONT))

    def server(self, chance: random.Random) -> Fault:
        server = chance.choice(self.servers)
        return Fault("a server killed", server.kill, server.start)


def soak(parts: Parts, users: Sequence[str], minutes: float, chance: random.Random) -> Soaked:
    """Let it all run for some minutes, with a fault in each, and answers asked for some users."""
    address = "ipv4:" + ",".join(server.address for server in parts.servers)
    with clicks(parts.stream), stalls(parts.stream) as stall, calling(address, users) as calls:
        soaked = Soaked(calls)
        with _batch(parts.platform, soaked), _champions(parts.platform, soaked):
            until = time.monotonic() + minutes * MINUTE
            while (begin := time.monotonic()) < until:
                _pass(chance.uniform(0.0, 10.0))
                soaked.struck.append(_strike(parts.any(chance), chance.uniform(*HELD), stall))
                eventually(parts.well, MINUTE)
                _pass(begin + MINUTE - time.monotonic())
    return soaked


def _strike(fault: Fault, seconds: float, stall: Stall) -> Struck:
    stall.seconds = 0.0
    found = Struck(fault.name, time.monotonic())
    fault.strike()
    _pass(seconds)
    fault.heal()
    found.ended = time.monotonic()
    eventually(lambda: stall.now < VISIBLE, MINUTE)
    found.visible_after, found.stall = time.monotonic() - found.ended, stall.seconds
    return found


@contextmanager
def _batch(platform: Everything, soaked: Soaked) -> Iterator[None]:
    """The hours of a day, one after the other as fast as they are made, then its night, and again."""
    stop = threading.Event()
    day = day_key(now_ms() - DAY_MS)
    begin = key_start_ms(day)
    hours = [hour for hour in hour_keys(begin, begin + DAY_MS) if hour < hour_key(now_ms() - HOUR_MS)]

    def work() -> None:
        while not stop.is_set():
            for what, key in [*(("hourly", hour) for hour in hours[-6:]), ("nightly", day)]:
                if stop.is_set():
                    return
                name = f"{what} {key}, {len(soaked.jobs)}"
                for attempt in range(1, ATTEMPTS + 1):
                    soaked.jobs[name] = attempt
                    try:
                        platform.job(what, key)
                        break
                    except AssertionError:
                        if attempt == ATTEMPTS:
                            raise

    with _thread(work, stop):
        yield


@contextmanager
def _champions(platform: Everything, soaked: Soaked) -> Iterator[None]:
    """When which release was promoted."""
    stop = threading.Event()
    releases = Releases(platform.settings().releases_uri)

    def watch() -> None:
        while not stop.is_set():
            try:
                champion = releases.champion()
            except OSError:
                champion = None
            if champion:
                soaked.releases.setdefault(champion.release_id, time.monotonic())
            stop.wait(0.5)

    with _thread(watch, stop):
        yield


@contextmanager
def _thread(work: Callable[[], None], stop: threading.Event) -> Iterator[None]:
    """Work beside the block, until it ends; what it raises goes on."""
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(work)
        try:
            yield
        finally:
            stop.set()
            done.result()


def _pass(seconds: float) -> None:
    if seconds > 0:
        time.sleep(seconds)


def untrue(soaked: Soaked, fresh_seconds: float) -> list[str]:
    """Answers that say of themselves what is not so, in words."""
    found = []
    order = sorted(soaked.releases, key=lambda release: soaked.releases[release])
    for call in soaked.calls.made:
        if call.tier == FAILED:
            continue
        promoted = sum(at <= call.at + call.seconds + FOLLOW_SECONDS for at in soaked.releases.values())
        taken = sum(at + FOLLOW_SECONDS <= call.at for at in soaked.releases.values())
        # A cached answer may be of the release before.
        possible = order[:promoted] if call.tier == "CACHE" else order[max(taken - 1, 0) : promoted]
        if call.release_id not in possible:
            found.append(f"{call.tier} by {call.release_id}, when it could be by {', '.join(possible)}")
        elif call.age < -1.0 or (call.tier == "CACHE" and call.age > fresh_seconds + 1.0):
            found.append(f"{call.tier} of {call.age:.0f} s")
    return found


def drills(soaked: Soaked) -> Iterator[Drill]:
    """A line for each kind of fault: what it cost at worst."""
    for name in sorted({one.name for one in soaked.struck}):
        alike = [one for one in soaked.struck if one.name == name]
        tiers = [soaked.calls.tiers(one.began, one.ended + BACK["answers"]) for one in alike]
        below = max(1 - some["CACHE"] / some.total() for some in tiers)
        stall, after = max(one.stall for one in alike), max(one.visible_after for one in alike)
        said = f"{below:.0%} of answers below CACHE at most; clicks visible after {stall:.1f} s, {after:.1f} s after its end"
        yield Drill("all at once", "clicks, answers, hours, nights", f"{name}, {len(alike)} x", "0", said)
