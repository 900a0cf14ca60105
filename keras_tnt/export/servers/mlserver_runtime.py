"""MLServer runtime for a model of keras_tnt: encoded images to class names.

MLServer's Python needs Pillow, ONNX and ONNX Runtime; with a C++ compiler it is faster. The modules
of keras_tnt that it imports are next to this file, as they were when the model was exported.
"""

import asyncio
import base64
import binascii
import concurrent.futures
import os
import sys

from mlserver import MLModel, types
from mlserver.codecs import NumpyCodec, StringCodec
from mlserver.errors import InferenceError

FOLDER = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, FOLDER)

from keras_tnt.export.pictures import PictureModel  # noqa: E402


class PictureRuntime(MLModel):
    """Model that MLServer loads, as `model-settings.json` names it."""

    worker = None

    async def load(self):
        """Opens the model in this file's folder, and returns True for readiness."""
        self.model = PictureModel(FOLDER)
        # One call at a time, outside the event loop, which answers health checks.
        self.worker = concurrent.futures.ThreadPoolExecutor(1)
        return True

    async def unload(self):
        """Stops the worker thread, and returns True for success."""
        if self.worker:  # `None` if MLServer computes in another process
            self.worker.shutdown()
        return True

    async def predict(self, payload):
        """Answers an inference request of the V2 protocol in the worker thread."""
        loop = asyncio.get_running_loop()
        outputs = await loop.run_in_executor(self.worker, self.classify, payload)
        return types.InferenceResponse(
            model_name=self.name,
            model_version=self.version,
            outputs=[encoded(name, value) for name, value in outputs.items()],
        )

    def classify(self, payload):
        """Returns the outputs by name; raises an `InferenceError` for unreadable images."""
        try:
            return self.model.run(self.model.read(pictures(payload)))
        except (ValueError, MemoryError) as error:
            raise InferenceError(str(error)) from error


def pictures(payload):
    """Returns the encoded images of a request: bytes, or base64 if a `content_type` says so."""
    found = [entry for entry in payload.inputs if entry.name == "image_bytes"]
    if len(found) != 1:
        names = ", ".join(entry.name for entry in payload.inputs)
        raise ValueError(f"The input must be `image_bytes`. Received: {names}")
    data = found[0].data.root
    data = data if isinstance(data, list) else [data]
    told = [parameters.content_type for parameters in (payload.parameters, found[0].parameters)
            if parameters is not None]  # fmt: skip
    if "base64" not in told:
        return [entry if isinstance(entry, bytes) else str(entry).encode() for entry in data]
    try:
        return [base64.b64decode(entry, validate=True) for entry in data]
    except (binascii.Error, TypeError) as error:
        raise ValueError(f"`image_bytes` is no base64: {error}") from error


def encoded(name, value):
    """Encodes an output array as a tensor of the V2 protocol."""
    if value.dtype != object:
        return NumpyCodec.encode_output(name, value)
    flat = StringCodec.encode_output(
        name, [text.decode() for text in value.ravel()], use_bytes=False
    )
    flat.shape = list(value.shape)
    return flat
