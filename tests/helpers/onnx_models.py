"""Tiny models to export, and ONNX files in plain ONNX Runtime."""

import numpy as np

import keras_tnt

TINY = {
    "input_shape": (32, 32, 3),
    "classes": 7,
    "outer_dim": 16,
    "inner_dim": 8,
    "depth": 1,
    "outer_heads": 2,
    "inner_heads": 2,
}
OTHER = {"input_shape": (32, 32, 3), "classes": 7, "embed_dim": 16}
# Models with their number of supported inner transformers: words come in multiples of 16.
MODELS = {
    "tnt": (keras_tnt.TNT, {**TINY, "depth": 2}, 2),
    "bias": (keras_tnt.TNT, {**TINY, "inner_heads": 4, "qkv_bias": True, "distilled": True}, 1),
    "few_words": (keras_tnt.TNT, {**TINY, "inner_stride": 8}, 0),
    "deit": (keras_tnt.DeiT, {**OTHER, "depth": 1, "num_heads": 2}, 0),
}


def images_of(model, batch):
    shape = (batch, *model.input_shape[1:])
    return np.random.default_rng(1).uniform(0, 255, shape).astype("float32")


def randomize(model):
    """Sets weights none of which is 0 or 1, because ONNX files omit operations without effect."""
    random = np.random.default_rng(0)
    for variable in model.trainable_variables:
        variable.assign(random.normal(size=variable.shape) * 0.3)


def run_onnx(path, images, *names):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(list(names), {"images": images})


def metadata_of(path):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.get_modelmeta().custom_metadata_map


def exported(path, make, options, **settings):
    model = make(**options)
    randomize(model)
    images = np.concatenate([images_of(model, 4)] * 10)
    return keras_tnt.export.onnx(model, path, **settings), images
