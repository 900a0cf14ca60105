"""The evaluation transform as a TensorFlow graph, with the model that it is for."""

import functools

import tensorflow as tf

import keras_tnt
from keras_tnt.export.image import load_images


@functools.cache
def model_and_graph(shape):
    model = keras_tnt.TNT(
        input_shape=shape, classes=7, outer_dim=16, inner_dim=8, depth=1, outer_heads=2,
        inner_heads=2,
    )  # fmt: skip
    covered = keras_tnt.anatomy(model).image.covered_size()
    graph = tf.function(
        lambda encoded: load_images(encoded, shape[:2], covered, shape[2]),
        input_signature=[tf.TensorSpec((None,), tf.string)],
        autograph=False,
    )
    return model, graph
