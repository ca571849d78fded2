"""A model server for tests: PredictionService.Predict by TensorFlow Serving's own generated code, on a SavedModel.

    python model_server.py FOLDER

FOLDER holds a SavedModel; without one a small tower is saved there first, with its weights beside it in `weights.npz`.
It says its port on stdout and is told on stdin, a line each, to be `slow SECONDS`, `wrong` (another shape) or `right`.
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

CONTEXT = ("hour", "weekday", "device", "country", "category")
NUMBERS = 5


def save_tower(folder: Path) -> None:
    """A SavedModel with the signature of the two-tower model: unit(users[user] + mean(history of known items))."""
    random = np.random.default_rng(0)
    weights = {name: random.normal(size=(20, 8)).astype(np.float32) for name in ("users", "history")}
    module = tf.Module()
    module.users, module.history = (tf.Variable(weights[name]) for name in ("users", "history"))
    inputs = {name: tf.TensorSpec((None,), tf.int32, name=name) for name in ("user", *CONTEXT)}
    inputs["history"] = tf.TensorSpec((None, None), tf.int32, name="history")
    inputs["numbers"] = tf.TensorSpec((None, NUMBERS), tf.float32, name="numbers")

    @tf.function(input_signature=[inputs])
    def vectors(given: dict[str, Any]) -> dict[str, Any]:
        present = tf.cast(given["history"] > 0, tf.float32)[:, :, None]
        pooled = tf.reduce_sum(tf.gather(module.history, given["history"]) * present, axis=1)
        total = tf.gather(module.users, given["user"]) + pooled / tf.maximum(tf.reduce_sum(present, axis=1), 1.0)
        return {"vector": tf.math.l2_normalize(total, axis=1)}

    tf.saved_model.save(module, str(folder), signatures={"serving_default": vectors})
    np.savez(folder / "weights.npz", **weights)


class Service(prediction_service_pb2_grpc.PredictionServiceServicer):
    """Answers for the model `two_tower`."""

    def __init__(self, folder: Path) -> None:
        self.seconds = 0.0
        self.wrong = False
        self._loaded = tf.saved_model.load(str(folder))

    def Predict(self, request: predict_pb2.PredictRequest, context: grpc.ServicerContext) -> predict_pb2.PredictResponse:
        spec = request.model_spec
        if spec.name != "two_tower" or spec.version.value not in (0, 3) or spec.version_label not in ("", "stable"):
            context.abort(grpc.StatusCode.NOT_FOUND, "Servable not found for request")
        time.sleep(self.seconds)
        given = {name: tf.constant(tf.make_ndarray(tensor)) for name, tensor in request.inputs.items()}
        outputs = self._loaded.signatures[spec.signature_name](**given)
        response = predict_pb2.PredictResponse(model_spec=spec)
        for name in request.output_filter:
            values = outputs[name].numpy()
            response.outputs[name].CopyFrom(tf.make_tensor_proto(values[:, :-1] if self.wrong else values))
            if len(values) == 1:  # the server writes small tensors value by value
                response.outputs[name].ClearField("tensor_content")
                response.outputs[name].float_val.extend(values.ravel().tolist())
        return response


def main() -> None:
    folder = Path(sys.argv[1])
    if not (folder / "saved_model.pb").exists():
        save_tower(folder)
    service = Service(folder)
    server = grpc.server(ThreadPoolExecutor(4))
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(port, flush=True)
    for line in sys.stdin:
        word, _, rest = line.strip().partition(" ")
        service.seconds = float(rest) if word == "slow" else 0.0
        service.wrong = word == "wrong"
        print("done", flush=True)


if __name__ == "__main__":
    main()
