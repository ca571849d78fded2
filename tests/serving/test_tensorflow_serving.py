"""User vectors from a model server in a process of its own: right ones in time, else none, and soon no more waiting."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
from worlds import eventually

from recsys_core.settings import TensorFlowServingSettings
from serving import tfserving_pb2 as tf_pb
from serving.metrics import Metrics
from serving.tensorflow_serving import ModelServer, RemoteTower, WrongAnswer, array

PROGRAM = Path(__file__).with_name("model_server.py")
CONTEXT = ("hour", "weekday", "device", "country", "category")


class LocalTower:
    """The part of a user tower that stays in the serving process: it encodes inputs, which here are encoded already."""

    version = "made-up"
    dimension = 8

    def encode(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return inputs


class Process:
    """A model server and how it is told to behave."""

    def __init__(self, folder: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(PROGRAM), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"},
        )
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())
        self.weights = dict(np.load(folder / "weights.npz"))

    def tell(self, what: str) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        self._process.stdout.readline()

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    made = Process(tmp_path_factory.mktemp("model"))
    yield made
    made.kill()


@pytest.fixture
def model(process: Process) -> Iterator[Process]:
    process.tell("right")
    return process


def tower(port: int, metrics: Metrics, timeout_ms: int = 60_000, **settings: object) -> tuple[RemoteTower, ModelServer]:
    chosen = TensorFlowServingSettings(address=f"127.0.0.1:{port}", timeout_ms=timeout_ms, **settings)  # type: ignore[arg-type]
    server = ModelServer(chosen, metrics)
    return RemoteTower(LocalTower(), server), server


def inputs(rows: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(rows)
    encoded = {name: np.zeros(rows, np.int32) for name in CONTEXT}
    encoded["user"] = random.integers(0, 20, rows).astype(np.int32)
    encoded["history"] = random.integers(0, 20, (rows, 6)).astype(np.int32)
    encoded["numbers"] = random.normal(size=(rows, 5)).astype(np.float32)
    return encoded


def expected(weights: dict[str, np.ndarray], encoded: dict[str, np.ndarray]) -> np.ndarray:
    present = (encoded["history"] > 0)[..., None]
    pooled = (weights["history"][encoded["history"]] * present).sum(axis=1) / np.maximum(present.sum(axis=1), 1)
    total = weights["users"][encoded["user"]] + pooled
    return total / np.linalg.norm(total, axis=1, keepdims=True)


@pytest.mark.parametrize("rows", [1, 2, 50])
@pytest.mark.parametrize("chosen", [{}, {"version": 3}, {"label": "stable"}])
def test_the_vectors_are_those_of_the_model(model: Process, rows: int, chosen: dict[str, object]) -> None:
    remote, _ = tower(model.port, Metrics(), **chosen)
    encoded = inputs(rows)
    np.testing.assert_allclose(remote.vectors(encoded), expected(model.weights, encoded), atol=1e-5)


def none_at_all(remote: RemoteTower) -> bool:
    return not remote.vectors(inputs(3)).any()


def test_a_slow_model_is_not_waited_for_and_then_left_out(model: Process) -> None:
    metrics = Metrics()
    remote, server = tower(model.port, metrics, timeout_ms=60_000)
    assert not none_at_all(remote)
    hasty, hasty_server = tower(model.port, metrics, timeout_ms=50)
    model.tell("slow 1")
    assert all(none_at_all(hasty) for _ in range(3))
    assert hasty_server.breaker.open
    calls = sum(metrics.steps["two_tower"].counts)
    assert none_at_all(hasty)
    assert sum(metrics.steps["two_tower"].counts) == calls, "it was not called"
    assert metrics.events["late_scores"] == 12
    model.tell("right")
    assert not none_at_all(remote)
    assert not server.breaker.open


@pytest.mark.parametrize("chosen", [{"model": "other"}, {"version": 9}, {"label": "canary"}])
def test_a_model_that_is_not_there_gives_nothing(model: Process, chosen: dict[str, object]) -> None:
    remote, server = tower(model.port, Metrics(), **chosen)
    assert none_at_all(remote)
    assert server.breaker.open


def test_vectors_of_another_shape_are_refused(model: Process, caplog: pytest.LogCaptureFixture) -> None:
    remote, _ = tower(model.port, Metrics())
    model.tell("wrong")
    assert none_at_all(remote)
    assert "tensor of shape (3, 7)" in caplog.text


class Anything:
    """A gRPC server that answers every call as a test says."""

    def __init__(self) -> None:
        self.answer: Callable[[grpc.ServicerContext], bytes] = lambda _: b""
        self._server = grpc.server(ThreadPoolExecutor(4))
        handler = grpc.unary_unary_rpc_method_handler(lambda _, context: self.answer(context))
        handlers = grpc.method_handlers_generic_handler("tensorflow.serving.PredictionService", {"Predict": handler})
        self._server.add_generic_rpc_handlers((handlers,))
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    def stop(self) -> None:
        self._server.stop(None).wait()


def right_answer(rows: int = 3, columns: int = 8, **changed: object) -> bytes:
    """The encoded answer of a model that gives ones, with some fields of its tensor changed."""
    shape = tf_pb.TensorShape(dim=[tf_pb.TensorShape.Dim(size=size) for size in (rows, columns)])
    fields = {"dtype": tf_pb.DT_FLOAT, "shape": shape, "content": np.ones((rows, columns), "<f4").tobytes(), **changed}
    return bytes(tf_pb.PredictResponse(outputs={"vector": tf_pb.Tensor(**fields)}).SerializeToString())


def refusing(code: grpc.StatusCode) -> Callable[[grpc.ServicerContext], bytes]:
    return lambda context: context.abort(code, "no")  # type: ignore[return-value]


def hanging(_: grpc.ServicerContext) -> bytes:
    time.sleep(1)
    return right_answer()


FAULTS: dict[str, Callable[[grpc.ServicerContext], bytes]] = {
    "hangs": hanging,
    **{code.name: refusing(code) for code in grpc.StatusCode if code is not grpc.StatusCode.OK},
    "bytes that are no message": lambda _: b"\xff" * 9,
    "nothing": lambda _: b"",
    "another output": lambda _: tf_pb.PredictResponse(outputs={"other": tf_pb.Tensor()}).SerializeToString(),
    "another type": lambda _: right_answer(dtype=tf_pb.DT_INT32),
    "no shape": lambda _: right_answer(shape=tf_pb.TensorShape()),
    "a row less": lambda _: right_answer(rows=2),
    "too little content": lambda _: right_answer(content=b"\0" * 8),
    "half a number": lambda _: right_answer(content=b"\0" * 95),
    "no content": lambda _: right_answer(content=b""),
    "NaN": lambda _: right_answer(content=np.full(24, np.nan, "<f4").tobytes()),
    "infinity": lambda _: right_answer(content=np.full(24, np.inf, "<f4").tobytes()),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_hangs_refuses_or_answers_nonsense_gives_nothing_in_time_and_is_used_once_it_works(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.breaker.PAUSE_SECONDS", 0.1)
    model, metrics = Anything(), Metrics()
    remote, server = tower(model.port, metrics, timeout_ms=200)
    try:
        model.answer = lambda _: right_answer()
        eventually(lambda: not none_at_all(remote))
        late = metrics.events["late_scores"]
        model.answer = FAULTS[fault]
        began = time.monotonic()
        assert all(none_at_all(remote) for _ in range(20))
        assert time.monotonic() - began < 5, "three timeouts at most are waited for"
        assert metrics.events["late_scores"] == late + 60
        assert server.breaker.open
        model.answer = lambda _: right_answer()
        eventually(lambda: not none_at_all(remote))
        assert not server.breaker.open
        server.close()
        assert none_at_all(remote), "while the process ends"
    finally:
        model.stop()


def test_bytes_that_are_no_vectors_are_refused() -> None:
    shape = tf_pb.TensorShape(dim=[tf_pb.TensorShape.Dim(size=1)] * 2)
    with pytest.raises(WrongAnswer, match="3 bytes"):
        array(tf_pb.Tensor(dtype=tf_pb.DT_FLOAT, shape=shape, content=b"123"), (1, 1))


def test_an_absent_server_gives_nothing_and_one_that_comes_is_used() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        remote, server = tower(nobody.getsockname()[1], Metrics(), timeout_ms=500)
        assert none_at_all(remote)
    eventually(lambda: none_at_all(remote) and server.breaker.open)


def test_the_serving_process_needs_no_tensorflow() -> None:
    code = "import sys, serving.tensorflow_serving; print('tensorflow' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "False"
