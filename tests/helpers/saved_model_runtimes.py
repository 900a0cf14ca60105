"""Runtimes for SavedModels besides tf.function: TensorFlow's C API and a TF1 Session."""

import ctypes
import os

import numpy as np

# Values of TF_DataType.
FLOAT, STRING = 1, 7


class Tensor(ctypes.Structure):
    """TF_Output: an operation and the index of its output."""

    _fields_ = [("operation", ctypes.c_void_p), ("index", ctypes.c_int)]


class String(ctypes.Structure):
    """TF_TString, an opaque struct for the functions of the library."""

    _fields_ = [("inside", ctypes.c_uint8 * 24)]


class CSession:
    """A SavedModel loaded by `TF_LoadSessionFromSavedModel`, the C function that servers use.

    Args:
        path: path of the SavedModel.
    """

    def __init__(self, path):
        self.library = load_library()
        call = self.library
        self.status = call.TF_NewStatus()
        self.graph = call.TF_NewGraph()
        options, meta_graph = call.TF_NewSessionOptions(), call.TF_NewBuffer()
        tags = (ctypes.c_char_p * 1)(b"serve")
        self.session = call.TF_LoadSessionFromSavedModel(
            options, None, path.encode(), tags, 1, self.graph, meta_graph, self.status
        )
        self.check()
        call.TF_DeleteSessionOptions(options)
        call.TF_DeleteBuffer(meta_graph)

    def check(self):
        if self.library.TF_GetCode(self.status):
            raise RuntimeError(self.library.TF_Message(self.status).decode())

    def run(self, inputs, outputs):
        """Runs the graph from {tensor name: array} to a list of arrays for the output names."""
        call = self.library
        given = (Tensor * len(inputs))(*map(self.find, inputs))
        values = (ctypes.c_void_p * len(inputs))(*map(self.to_tensor, inputs.values()))
        wanted = (Tensor * len(outputs))(*map(self.find, outputs))
        results = (ctypes.c_void_p * len(outputs))()
        call.TF_SessionRun(
            self.session, None, given, values, len(inputs), wanted, results, len(outputs), None, 0,
            None, self.status,
        )  # fmt: skip
        for value in values:
            call.TF_DeleteTensor(value)
        self.check()
        arrays = [self.to_array(result) for result in results]
        for result in results:
            call.TF_DeleteTensor(result)
        return arrays

    def find(self, name):
        operation, _, index = name.partition(":")
        found = self.library.TF_GraphOperationByName(self.graph, operation.encode())
        assert found, f"the graph has no operation {operation}"
        return Tensor(found, int(index))

    def to_tensor(self, array):
        call = self.library
        strings = array.dtype == object
        dims = (ctypes.c_int64 * array.ndim)(*array.shape)
        size = array.size * (ctypes.sizeof(String) if strings else 4)
        kind = STRING if strings else FLOAT
        tensor = call.TF_AllocateTensor(kind, dims, array.ndim, size)
        data = call.TF_TensorData(tensor)
        if strings:
            entries = ctypes.cast(data, ctypes.POINTER(String))
            for i, value in enumerate(array.ravel()):
                call.TF_StringInit(ctypes.byref(entries[i]))
                call.TF_StringCopy(ctypes.byref(entries[i]), value, len(value))
        else:
            ctypes.memmove(data, np.ascontiguousarray(array, "float32").ctypes.data, size)
        return tensor

    def to_array(self, tensor):
        call = self.library
        shape = tuple(call.TF_Dim(tensor, i) for i in range(call.TF_NumDims(tensor)))
        data, count = call.TF_TensorData(tensor), int(np.prod(shape))
        if call.TF_TensorType(tensor) == FLOAT:
            entries = ctypes.cast(data, ctypes.POINTER(ctypes.c_float))
            return np.ctypeslib.as_array(entries, (count,)).copy().reshape(shape)
        entries = ctypes.cast(data, ctypes.POINTER(String))
        values = np.empty(count, object)
        for i in range(count):
            pointer = call.TF_StringGetDataPointer(ctypes.byref(entries[i]))
            length = call.TF_StringGetSize(ctypes.byref(entries[i]))
            values[i] = ctypes.string_at(pointer, length)
        return values.reshape(shape)

    def close(self):
        self.library.TF_CloseSession(self.session, self.status)
        self.library.TF_DeleteSession(self.session, self.status)
        self.library.TF_DeleteGraph(self.graph)
        self.library.TF_DeleteStatus(self.status)


def load_library():
    import tensorflow as tf

    folder = os.path.dirname(tf.__file__)
    ctypes.CDLL(os.path.join(folder, "libtensorflow_framework.so.2"), mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(os.path.join(folder, "libtensorflow_cc.so.2"))
    pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
    signatures = {
        "TF_NewStatus": (pointer, []),
        "TF_NewGraph": (pointer, []),
        "TF_NewSessionOptions": (pointer, []),
        "TF_NewBuffer": (pointer, []),
        "TF_DeleteSessionOptions": (None, [pointer]),
        "TF_DeleteBuffer": (None, [pointer]),
        "TF_DeleteGraph": (None, [pointer]),
        "TF_DeleteStatus": (None, [pointer]),
        "TF_CloseSession": (None, [pointer, pointer]),
        "TF_DeleteSession": (None, [pointer, pointer]),
        "TF_DeleteTensor": (None, [pointer]),
        "TF_GetCode": (number, [pointer]),
        "TF_Message": (ctypes.c_char_p, [pointer]),
        "TF_GraphOperationByName": (pointer, [pointer, ctypes.c_char_p]),
        "TF_AllocateTensor": (pointer, [number, ctypes.POINTER(ctypes.c_int64), number, size]),
        "TF_TensorData": (pointer, [pointer]),
        "TF_TensorType": (number, [pointer]),
        "TF_NumDims": (number, [pointer]),
        "TF_Dim": (ctypes.c_int64, [pointer, number]),
        "TF_StringInit": (None, [pointer]),
        "TF_StringCopy": (None, [pointer, ctypes.c_char_p, size]),
        "TF_StringGetDataPointer": (pointer, [pointer]),
        "TF_StringGetSize": (size, [pointer]),
        "TF_LoadSessionFromSavedModel": (
            pointer,
            [
                pointer,
                pointer,
                ctypes.c_char_p,
                ctypes.POINTER(ctypes.c_char_p),
                number,
                pointer,
                pointer,
                pointer,
            ],
        ),
        "TF_SessionRun": (
            None,
            [
                pointer,
                pointer,
                ctypes.POINTER(Tensor),
                ctypes.POINTER(pointer),
                number,
                ctypes.POINTER(Tensor),
                ctypes.POINTER(pointer),
                number,
                pointer,
                number,
                pointer,
                pointer,
            ],
        ),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class TF1Session:
    """A SavedModel loaded as TF Serving's session loader does, with the same `run`."""

    def __init__(self, path):
        import tensorflow as tf

        self.session = tf.compat.v1.Session(graph=tf.Graph())
        with self.session.graph.as_default():
            tf.compat.v1.saved_model.loader.load(self.session, ["serve"], path)

    def run(self, inputs, outputs):
        return self.session.run(outputs, inputs)

    def close(self):
        self.session.close()


class Servable:
    """A SavedModel with signatures that are called by name, in either runtime.

    Args:
        path: path of the SavedModel.
        runtime: `CSession` or `TF1Session`.
    """

    def __init__(self, path, runtime):
        from tensorflow.core.protobuf import saved_model_pb2

        saved = saved_model_pb2.SavedModel()
        with open(os.path.join(path, "saved_model.pb"), "rb") as file:
            saved.ParseFromString(file.read())
        self.signatures = {
            name: signature
            for name, signature in saved.meta_graphs[0].signature_def.items()
            if not name.startswith("__")
        }
        self.runtime = runtime(path)

    def __call__(self, signature, **inputs):
        signature = self.signatures[signature]
        names = sorted(signature.outputs)
        values = self.runtime.run(
            {signature.inputs[name].name: value for name, value in inputs.items()},
            [signature.outputs[name].name for name in names],
        )
        return dict(zip(names, values, strict=True))

    def close(self):
        self.runtime.close()


def replay(path, servable):
    """Replays a SavedModel's warm-up file and returns the number of calls per signature."""
    import tensorflow as tf
    from tensorflow_serving.apis import prediction_log_pb2

    file = os.path.join(path, "assets.extra", "tf_serving_warmup_requests")
    called = {}
    for record in tf.data.TFRecordDataset(file).as_numpy_iterator():
        log = prediction_log_pb2.PredictionLog.FromString(record)
        kind = log.WhichOneof("log_type")
        request = getattr(log, kind).request
        if kind == "classify_log":
            examples = request.input.example_list.examples
            inputs = {"inputs": np.array([e.SerializeToString() for e in examples], object)}
        else:
            inputs = {name: tf.make_ndarray(value) for name, value in request.inputs.items()}
        name = request.model_spec.signature_name
        servable(name, **inputs)
        called[name] = called.get(name, 0) + 1
    return called
