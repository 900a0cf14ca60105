"""Model of keras_tnt for Triton's Python backend: encoded images to class names.

The server's Python needs NumPy, Pillow, ONNX and ONNX Runtime; with a C++ compiler it is faster.
The modules of keras_tnt that it imports are next to this file, as they were when the model was
exported.
"""

import base64
import binascii
import json
import os
import sys

import numpy
import triton_python_backend_utils as triton

FOLDER = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, FOLDER)

from keras_tnt.export.pictures import PictureModel  # noqa: E402


class TritonPythonModel:
    """Model that Triton's Python backend creates, by this name, for each instance."""

    def initialize(self, args):
        """Opens the model in this file's folder; `args` is not used."""
        self.model = PictureModel(FOLDER)

    def execute(self, requests):
        """Answers requests as one batch; a request with unreadable images gets an error."""
        answers, images = [], []
        for request in requests:
            try:
                images.append(self.model.read(pictures(request)))
                answers.append(None)
            except (ValueError, MemoryError) as error:
                error = triton.TritonError(str(error), triton.TritonError.INVALID_ARG)
                answers.append(triton.InferenceResponse(error=error))
        outputs = self.model.run(numpy.concatenate(images)) if images else {}
        start = 0
        for place, answer in enumerate(answers):
            if answer is None:
                end = start + len(images.pop(0))
                tensors = [triton.Tensor(name, v[start:end]) for name, v in outputs.items()]
                answers[place], start = triton.InferenceResponse(tensors), end
        return answers


def pictures(request):
    """Returns the encoded images of a request: bytes, or base64 if its `content_type` says so."""
    found = triton.get_input_tensor_by_name(request, "image_bytes").as_numpy().ravel().tolist()
    if json.loads(request.parameters() or "{}").get("content_type") != "base64":
        return found
    try:
        return [base64.b64decode(text, validate=True) for text in found]
    except binascii.Error as error:
        raise ValueError(f"`image_bytes` is no base64: {error}") from error
