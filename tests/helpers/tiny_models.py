"""Tiny models of each family."""

import keras

import keras_tnt
from tests.helpers.checks import normal

BUILDERS = {
    "deit": keras_tnt.DeiT,
    "deit_distilled": keras_tnt.DeiT,
    "cait": keras_tnt.CaiT,
    "pyramid_tnt": keras_tnt.PyramidTNT,
}
TINY = {
    "deit": {"embed_dim": 16, "depth": 2, "num_heads": 2},
    "deit_distilled": {"embed_dim": 16, "depth": 2, "num_heads": 2, "distilled": True},
    "cait": {
        "embed_dim": 16,
        "depth": 1,
        "num_heads": 2,
        "class_attention_depth": 1,
        "layer_scale": 0.5,
    },
    "pyramid_tnt": {
        "depths": (2, 1),
        "outer_dims": (16, 16),
        "inner_dims": (4, 4),
        "outer_heads": (2, 2),
        "inner_heads": (2, 2),
        "reductions": (2, 1),
    },
}


def tiny_of(family, size=(32, 48), **arguments):
    """Returns a tiny model of a family on images of a size."""
    shape = (*size, 3) if keras.config.image_data_format() == "channels_last" else (3, *size)
    return BUILDERS[family](**{"input_shape": shape, "classes": 3, **TINY[family], **arguments})


def tiny_tnt(size=(32, 32), channels=3, **arguments):
    """Returns a TNT of two blocks on 2x2 patches, unless `arguments` change that."""
    shape = (*size, channels)
    if keras.config.image_data_format() == "channels_first":
        shape = (channels, *size)
    architecture = {
        "input_shape": shape,
        "classes": 3,
        "depth": 2,
        "outer_dim": 16,
        "inner_dim": 8,
        "outer_heads": 2,
        "inner_heads": 2,
    }
    return keras_tnt.TNT(**{**architecture, **arguments})


def tiny_block(family, **arguments):
    """Returns a model of one block, of two in DeiT, on 32x32 images."""
    if family == "tnt":
        return tiny_tnt(depth=1, **arguments)
    return tiny_of(family, (32, 32), **arguments)


def randomize(model):
    """Sets weights of a scale at which each affects the output, and returns the model."""
    for i, variable in enumerate(model.trainable_variables):
        variable.assign(0.3 * normal(variable.shape, seed=i))
    return model
