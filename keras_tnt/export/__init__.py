"""Export to SavedModel, ONNX, LiteRT, OpenVINO and Triton; every written file is verified."""

from keras_tnt.export.edge import litert, openvino
from keras_tnt.export.onnx_file import onnx
from keras_tnt.export.onnx_runtime import onnx_session
from keras_tnt.export.openvino_runtime import openvino_session
from keras_tnt.export.servable import saved_model
from keras_tnt.export.triton_repository import triton
