"""Fake TF Serving: its REST and gRPC API on the loopback interface, over TF1 Sessions.

It serves the highest version in each model directory and implements the part of TF Serving's
protocol that savedmodels/client.py uses, without batching or reloading.
"""

import base64
import concurrent.futures
import contextlib
import http.server
import json
import os
import re
import threading
import time

import grpc
import numpy as np
import tensorflow as tf
from google.protobuf import json_format
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

from tests.helpers.saved_model_runtimes import Servable, TF1Session

CLASSIFY = "tensorflow/serving/classify"


class Refusal(Exception):
    """An error of the protocol: gRPC's status code and a message."""

    def __init__(self, code, message):
        super().__init__(message)
        self.code = code


class Models:
    """The models behind both APIs.

    Args:
        directories: dict of directories of versions, by model name.
        delay: additional seconds of each call. Defaults to 0.
    """

    def __init__(self, directories, delay=0.0):
        self.delay = delay
        self.models = {}
        for name, directory in directories.items():
            version = max(int(entry) for entry in os.listdir(directory) if entry.isdigit())
            path = os.path.join(directory, str(version))
            self.models[name] = (version, Servable(path, TF1Session))

    def find(self, name, version=None):
        if name not in self.models:
            raise Refusal(grpc.StatusCode.NOT_FOUND, f"Servable not found for request: {name}")
        served, servable = self.models[name]
        if version not in (None, served):
            raise Refusal(
                grpc.StatusCode.NOT_FOUND, f"Servable not found for request: {name} {version}"
            )
        return served, servable

    def run(self, servable, signature, inputs, method=None):
        time.sleep(self.delay)
        if signature not in servable.signatures:
            raise Refusal(
                grpc.StatusCode.INVALID_ARGUMENT, f"Serving signature key {signature} not found."
            )
        definition = servable.signatures[signature]
        if method and definition.method_name != method:
            raise Refusal(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"Expected {method} signature method_name: {definition.method_name}",
            )
        if set(inputs) != set(definition.inputs):
            raise Refusal(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"input must be {sorted(definition.inputs)}, is {sorted(inputs)}",
            )
        try:
            return servable(signature, **inputs)
        except tf.errors.InvalidArgumentError as error:
            raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, error.message) from error

    def classify(self, servable, signature, examples):
        serialized = np.array([example.SerializeToString() for example in examples], object)
        outputs = self.run(servable, signature, {"inputs": serialized}, CLASSIFY)
        for name in ("classes", "scores"):
            if outputs[name].ndim != 2 or len(outputs[name]) != len(examples):
                raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, f"Expected {name} per example")
        return outputs["classes"], outputs["scores"]

    def metadata(self, name, version):
        served, servable = self.find(name, version)
        response = get_model_metadata_pb2.GetModelMetadataResponse()
        response.model_spec.name = name
        response.model_spec.version.value = served
        signatures = get_model_metadata_pb2.SignatureDefMap()
        for key, definition in servable.signatures.items():
            signatures.signature_def[key].CopyFrom(definition)
        response.metadata["signature_def"].Pack(signatures)
        return response

    def status(self, name, version):
        served, _ = self.find(name, version)
        response = get_model_status_pb2.GetModelStatusResponse()
        entry = response.model_version_status.add(version=served)
        entry.state = get_model_status_pb2.ModelVersionStatus.AVAILABLE
        return response


class Grpc(
    prediction_service_pb2_grpc.PredictionServiceServicer,
    model_service_pb2_grpc.ModelServiceServicer,
):
    def __init__(self, models):
        self.models = models

    def Predict(self, request, context):
        def answer(version, servable):
            inputs = {name: tf.make_ndarray(value) for name, value in request.inputs.items()}
            signature = request.model_spec.signature_name or "serving_default"
            outputs = self.models.run(servable, signature, inputs)
            response = predict_pb2.PredictResponse()
            for name in request.output_filter or outputs:
                response.outputs[name].CopyFrom(tf.make_tensor_proto(outputs[name]))
            return response

        return self.answer(request, context, answer)

    def Classify(self, request, context):
        def answer(version, servable):
            rows = self.models.classify(
                servable, request.model_spec.signature_name, request.input.example_list.examples
            )
            response = classification_pb2.ClassificationResponse()
            for names, scores in zip(*rows, strict=True):
                row = response.result.classifications.add()
                for name, score in zip(names, scores, strict=True):
                    row.classes.add(label=name, score=score)
            return response

        return self.answer(request, context, answer)

    def GetModelMetadata(self, request, context):
        return self.answer(
            request, context, lambda v, _: self.models.metadata(request.model_spec.name, v)
        )

    def GetModelStatus(self, request, context):
        return self.answer(
            request, context, lambda v, _: self.models.status(request.model_spec.name, v)
        )

    def answer(self, request, context, function):
        spec = request.model_spec
        version = spec.version.value if spec.HasField("version") else None
        try:
            return function(*self.models.find(spec.name, version))
        except Refusal as refusal:
            context.abort(refusal.code, str(refusal))


class Rest(http.server.BaseHTTPRequestHandler):
    models = None

    def do_GET(self):
        found = re.fullmatch(r"/v1/models/([^/:]+)(?:/versions/(\d+))?(/metadata)?", self.path)
        self.answer(lambda: self.tell(found))

    def do_POST(self):
        found = re.fullmatch(
            r"/v1/models/([^/:]+)(?:/versions/(\d+))?:(predict|classify)", self.path
        )
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(lambda: self.compute(found, json.loads(body)))

    def tell(self, found):
        if not found:
            raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, f"Malformed request: GET {self.path}")
        name, version = found[1], found[2] and int(found[2])
        response = (self.models.metadata if found[3] else self.models.status)(name, version)
        values = json_format.MessageToDict(
            response, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        for entry in values.get("model_version_status", ()):
            entry.setdefault("status", {"error_code": "OK", "error_message": ""})
        return values

    def compute(self, found, body):
        if not found:
            raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, f"Malformed request: POST {self.path}")
        _, servable = self.models.find(found[1], found[2] and int(found[2]))
        signature = body.get("signature_name", "serving_default")
        if found[3] == "classify":
            examples = []
            for fields in body["examples"]:
                example = tf.train.Example()
                for name, value in fields.items():
                    example.features.feature[name].bytes_list.value.append(decoded(value))
                examples.append(example)
            rows = zip(*self.models.classify(servable, signature, examples), strict=True)
            return {
                "results": [
                    [[name.decode(), float(s)] for name, s in zip(names, scores, strict=True)]
                    for names, scores in rows
                ]
            }
        instances = [{k: decoded(v) for k, v in i.items()} for i in body["instances"]]
        inputs = {
            name: np.array([i[name] for i in instances], object if strings(instances) else "f4")
            for name in instances[0]
        }
        outputs = self.models.run(servable, signature, inputs)
        plain = {name: jsonable(value) for name, value in outputs.items()}
        return {
            "predictions": [
                {name: value[i] for name, value in plain.items()} for i in range(len(instances))
            ]
        }

    def answer(self, function):
        status = 200
        try:
            answer = function()
        except Refusal as refusal:
            status = 404 if refusal.code == grpc.StatusCode.NOT_FOUND else 400
            answer = {"error": str(refusal)}
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        with contextlib.suppress(ConnectionError):  # the client may have timed out
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def decoded(value):
    return base64.b64decode(value["b64"]) if isinstance(value, dict) else value


def strings(instances):
    return any(isinstance(value, bytes) for value in instances[0].values())


def jsonable(array):
    if array.dtype == object:
        return [[value.decode() for value in row] for row in array]
    return array.tolist()


class Double:
    """Context manager that serves both APIs; `rest` and `grpc` are the ports."""

    def __init__(self, directories, delay=0.0):
        models = Models(directories, delay)
        handler = type("Handler", (Rest,), {"models": models})
        self.http = http.server.ThreadingHTTPServer(("localhost", 0), handler)
        self.rest = self.http.server_address[1]
        self.server = grpc.server(
            concurrent.futures.ThreadPoolExecutor(4),
            options=[("grpc.max_receive_message_length", -1)],
        )
        servicer = Grpc(models)
        prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(servicer, self.server)
        model_service_pb2_grpc.add_ModelServiceServicer_to_server(servicer, self.server)
        self.grpc = self.server.add_insecure_port("localhost:0")

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.server.start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()
        self.server.stop(None).wait()
