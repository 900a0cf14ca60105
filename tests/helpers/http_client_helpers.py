"""Runs tritonclient: reads [function, arguments] as JSON lines, writes results or errors."""

import concurrent.futures
import json
import sys
from pathlib import Path

import numpy as np
import tritonclient.grpc
import tritonclient.http
from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import InferenceServerException

KINDS = {"http": tritonclient.http, "grpc": tritonclient.grpc}


def configuration(path):
    """Parses a config.pbtxt with Triton's own protocol buffer, and returns a dict."""
    text = Path(path).read_text(encoding="utf-8")
    message = text_format.Parse(text, model_config_pb2.ModelConfig())
    return json_format.MessageToDict(message, preserving_proto_field_name=True)


def classify(kind, address, model, pictures, version="", together=1):
    """Returns the outputs for image files, as a list if there are `together` > 1 requests."""
    data = np.array([[Path(path).read_bytes()] for path in pictures], object)

    def once(_):
        module = KINDS[kind]
        with module.InferenceServerClient(address) as client:
            tensor = module.InferInput("image_bytes", data.shape, "BYTES")
            tensor.set_data_from_numpy(data)
            result = client.infer(model, [tensor], version)
            classes = result.as_numpy("classes")
            return {
                "classes": [[name.decode() for name in row] for row in classes],
                "scores": result.as_numpy("scores").tolist(),
                "probabilities": result.as_numpy("probabilities").tolist(),
            }

    if together == 1:
        return once(None)
    with concurrent.futures.ThreadPoolExecutor(together) as pool:
        return list(pool.map(once, range(together)))


def statistics(address, model):
    with tritonclient.http.InferenceServerClient(address) as client:
        (found,) = client.get_inference_statistics(model)["model_stats"]
    return found


def main():
    for line in sys.stdin:
        function, arguments = json.loads(line)
        try:
            answer = {"result": globals()[function](**arguments)}
        except (InferenceServerException, text_format.ParseError) as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
