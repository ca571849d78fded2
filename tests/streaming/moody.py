"""Neighbours of a worker that fail on command: a lake, and Kafka's client."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any, ClassVar

import fsspec
from confluent_kafka import Consumer, KafkaError, KafkaException
from fsspec.implementations.memory import MemoryFileSystem


class StoreError(Exception):
    """What a store raises that is no OSError, as botocore's errors are."""


class MoodyLake(MemoryFileSystem):  # type: ignore[misc]
    """A store in memory that may raise an error or hang at whatever it is asked."""

    protocol = ("moody",)
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    failure: ClassVar[type[Exception] | None] = None
    answers: ClassVar[threading.Event] = threading.Event()

    @classmethod
    def recover(cls) -> None:
        cls.failure = None
        cls.answers.set()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(MemoryFileSystem._strip_protocol(path.replace("moody://", "memory://")))


def _moody(name: str) -> Callable[..., Any]:
    method = getattr(MemoryFileSystem, name)

    def call(self: MoodyLake, *args: Any, **kwargs: Any) -> Any:
        MoodyLake.answers.wait()
        if MoodyLake.failure is not None:
            raise MoodyLake.failure("a test wants it")
        return method(self, *args, **kwargs)

    return call


for asked in ("ls", "info", "pipe_file", "cat_file", "makedirs", "_open", "rm_file"):
    setattr(MoodyLake, asked, _moody(asked))
fsspec.register_implementation("moody", MoodyLake, clobber=True)


class MoodyConsumer(Consumer):
    """A consumer any of whose methods fails now and then, with any of the errors that brokers and the client have."""

    chance: ClassVar[random.Random] = random.Random(0)
    failures: ClassVar[int] = 0
    share: ClassVar[float] = 0.0


ERRORS = (
    KafkaError._DESTROY_BROKER,
    KafkaError._TRANSPORT,
    KafkaError._TIMED_OUT,
    KafkaError._STATE,
    KafkaError._ALL_BROKERS_DOWN,
    KafkaError.NOT_COORDINATOR,
    KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
    KafkaError.NOT_LEADER_FOR_PARTITION,
    KafkaError.REBALANCE_IN_PROGRESS,
    KafkaError.ILLEGAL_GENERATION,
    KafkaError.UNKNOWN_MEMBER_ID,
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
)
ASKED = {
    "poll": 0.02,
    "consume": 0.05,
    "committed": 0.3,
    "get_watermark_offsets": 0.05,
    "incremental_assign": 0.3,
    "incremental_unassign": 0.3,
    "assign": 0.3,
    "commit": 0.3,
    "pause": 0.3,
    "resume": 0.3,
    "assignment": 0.3,
    "subscribe": 0.3,
    "close": 0.3,
}


def _failing(name: str, share: float) -> Callable[..., Any]:
    def call(self: MoodyConsumer, *args: Any, **kwargs: Any) -> Any:
        method = getattr(super(MoodyConsumer, self), name)
        if MoodyConsumer.chance.random() < share * MoodyConsumer.share:
            MoodyConsumer.failures += 1
            if name == "close":
                method(*args, **kwargs)
            raise MoodyConsumer.chance.choice(
                [KafkaException(KafkaError(MoodyConsumer.chance.choice(ERRORS), "a test wants it")), RuntimeError("closed")]
            )
        return method(*args, **kwargs)

    return call


for asked, share in ASKED.items():
    setattr(MoodyConsumer, asked, _failing(asked, share))
