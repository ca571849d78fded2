"""A TensorFlow Serving for tests: PredictionService.Predict with its own generated code, on a real SavedModel.

    python model_server.py SAVED_MODEL_FOLDER

It announces its port on stdout and is told on stdin, a line each, to be `slow SECONDS`, `wrong` (another shape) or `right`.
"""

from __future__ import annotations

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor


def main() -> None:
    import grpc
    import tensorflow as tf
    from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

    loaded = tf.saved_model.load(sys.argv[1])
    state = {"seconds": 0.0, "wrong": False}

    class Service(prediction_service_pb2_grpc.PredictionServiceServicer):
        def Predict(self, request: predict_pb2.PredictRequest, context: grpc.ServicerContext) -> predict_pb2.PredictResponse:  # noqa: N802
            if request.model_spec.name != "two_tower":
                context.abort(grpc.StatusCode.NOT_FOUND, f"Servable not found for request: {request.model_spec.name}")
            if state["seconds"]:
                time.sleep(state["seconds"])
            signature = loaded.signatures[request.model_spec.signature_name]
            inputs = {name: tf.constant(tf.make_ndarray(tensor)) for name, tensor in request.inputs.items()}
            outputs = signature(**inputs)
            response = predict_pb2.PredictResponse(model_spec=request.model_spec)
            for name in request.output_filter or outputs:
                values = outputs[name].numpy()
                values = values[:, :-1] if state["wrong"] else values
                proto = tf.make_tensor_proto(values)
                as_field = tf.compat.v1.make_tensor_proto(values)
                as_field.ClearField("tensor_content")
                as_field.float_val.extend(values.ravel().tolist())
                response.outputs[name].CopyFrom(as_field if len(values) == 1 else proto)
            return response

    server = grpc.server(ThreadPoolExecutor(4))
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(port, flush=True)
    for line in sys.stdin:
        word, _, rest = line.strip().partition(" ")
        state["seconds"] = float(rest) if word == "slow" else 0.0
        state["wrong"] = word == "wrong"
        print("done", flush=True)
    threading.Event().wait(0)


if __name__ == "__main__":
    main()
