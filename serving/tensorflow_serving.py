"""Two-tower scores from TensorFlow Serving: PredictionService.Predict with a deadline and a circuit breaker.

The user tower of the release encodes the inputs, the model server computes the vectors. Where it is absent, slow, or answers
what does not fit, users have no two-tower vector and their answers are REALTIME_ALS_ONLY.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

import grpc
import numpy as np

from recsys_core.settings import TensorFlowServingSettings
from recsys_core.tower import TowerInputs, TowerSpec, UserTower
from serving import tfserving_pb2 as tf_pb
from serving.breaker import Breaker
from serving.metrics import Metrics

log = logging.getLogger(__name__)

PREDICT = "/tensorflow.serving.PredictionService/Predict"
OUTPUT = "vector"
DTYPES = {np.dtype(np.float32): tf_pb.DT_FLOAT, np.dtype(np.int32): tf_pb.DT_INT32}


class WrongAnswer(ValueError):
    """The model server's answer is not what the signature promises."""


class ModelServer:
    """One model of a TensorFlow Serving. May be called by several threads.

    Attributes:
        breaker: of the server.
    """

    def __init__(self, settings: TensorFlowServingSettings, metrics: Metrics) -> None:
        self.breaker = Breaker("TensorFlow Serving")
        self._seconds = settings.timeout_ms / 1000
        self._metrics = metrics
        self._channel = grpc.insecure_channel(settings.address, options=[("grpc.enable_http_proxy", 0)])
        self._call = self._channel.unary_unary(
            PREDICT,
            request_serializer=tf_pb.PredictRequest.SerializeToString,
            response_deserializer=tf_pb.PredictResponse.FromString,
        )
        self._model = tf_pb.ModelSpec(name=settings.model, signature_name=settings.signature)
        if settings.label:
            self._model.version_label = settings.label
        elif settings.version:
            self._model.version.value = settings.version

    def predict(self, inputs: Mapping[str, np.ndarray], rows: int, columns: int) -> np.ndarray | None:
        """The output for `inputs`, float32 (rows, columns); None, counted and logged, when there is none in time."""
        if not self.breaker.allows():
            self._metrics.events["late_scores"] += rows
            return None
        request = tf_pb.PredictRequest(model_spec=self._model, output_filter=[OUTPUT])
        for name, values in inputs.items():
            request.inputs[name].CopyFrom(tensor(values))
        started = time.perf_counter()
        try:
            response = self._call(request, timeout=self._seconds)
            vectors = array(response.outputs[OUTPUT], (rows, columns))
        except grpc.RpcError as error:
            self._failed(rows, _meaning(error))
            return None
        except ValueError as error:  # a WrongAnswer, or what gRPC says of a channel that is closed
            self._failed(rows, error)
            return None
        finally:
            self._metrics.steps["two_tower"].observe(time.perf_counter() - started)
        self.breaker.succeeded()
        return vectors

    def _failed(self, rows: int, error: Exception) -> None:
        self._metrics.events["late_scores"] += rows
        self.breaker.failed(error)

    def close(self) -> None:
        self._channel.close()


class RemoteTower:
    """The user tower of a release whose vectors a model server computes."""

    def __init__(self, tower: UserTower, server: ModelServer) -> None:
        self._tower = tower
        self._server = server

    @property
    def spec(self) -> TowerSpec:
        return self._tower.spec

    @property
    def version(self) -> str:
        return self._tower.version

    @property
    def dimension(self) -> int:
        return self._tower.dimension

    def vectors(self, inputs: TowerInputs) -> np.ndarray:
        """float32 (b, d), rows of zeros where nothing is known or the server does not answer."""
        encoded = self._tower.encode(inputs)
        rows = len(encoded["user"])
        vectors = self._server.predict(encoded, rows, self.dimension)
        return np.zeros((rows, self.dimension), np.float32) if vectors is None else vectors


def tensor(values: np.ndarray) -> tf_pb.Tensor:
    """A NumPy array of float32 or int32 as a tensor."""
    shape = tf_pb.TensorShape(dim=[tf_pb.TensorShape.Dim(size=size) for size in values.shape])
    little = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    return tf_pb.Tensor(dtype=DTYPES[values.dtype], shape=shape, content=little.tobytes())


def array(found: tf_pb.Tensor, shape: tuple[int, int]) -> np.ndarray:
    """The float32 array of a tensor. Raises WrongAnswer when it is not of that shape or not finite."""
    given = tuple(dim.size for dim in found.shape.dim)
    if found.dtype != tf_pb.DT_FLOAT or given != shape:
        raise WrongAnswer(f"the model gave a tensor of shape {given} and type {found.dtype}, expected float32 {shape}")
    if len(found.content) % 4:
        raise WrongAnswer(f"the model gave {len(found.content)} bytes, which are no whole number of float32")
    values = np.frombuffer(found.content, "<f4") if found.content else np.asarray(found.float_val, np.float32)
    if values.size == 1 and shape[0] * shape[1] > 1:
        values = np.repeat(values, shape[0] * shape[1])
    if values.size != shape[0] * shape[1] or not np.isfinite(values).all():
        raise WrongAnswer(f"the model gave {values.size} values or some that are not finite, expected {shape[0] * shape[1]}")
    return values.reshape(shape).astype(np.float32)


def _meaning(error: grpc.RpcError) -> Exception:
    """A late answer as TimeoutError, which the breaker bears some of; every other failure as it is."""
    code = error.code()
    said = f"{code.name if code else 'no status'}: {error.details()}"
    return TimeoutError(said) if code is grpc.StatusCode.DEADLINE_EXCEEDED else ConnectionError(said)
