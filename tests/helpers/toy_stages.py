"""A two-stage family: a stem without a patch size, a merge, class tokens in stage 2 only.

Its blocks have no grid: `keras_tnt.anatomy` infers it from their number of tokens.
"""

import keras

import keras_tnt
from keras_tnt.layers import ClassToken
from keras_tnt.models import builders
from keras_tnt.models.registry import ImageTransform, Variant
from tests.helpers.toy_family import ToyBlock

IMAGE = ImageTransform(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), crop=0.75)


def squares(x, side, dim, role, **names):
    """Applies a convolution that merges `side` x `side` pixels or patches into one.

    Args:
        x: tensor (batch, rows, columns, channels).
        side: kernel size and stride.
        dim: output channels.
        role: role of the layer.
        **names: further arguments of `Conv2D`.

    Returns:
        Tensor (batch, rows // side, columns // side, dim).
    """
    layer = keras.layers.Conv2D(dim, side, strides=side, data_format="channels_last", **names)
    layer.part = role  # the name of the attribute in release 0.1
    return layer(x)


@builders.builder
def StageNet(
    include_top=True,
    include_preprocessing=True,
    weights=None,
    input_tensor=None,
    input_shape=None,
    pooling=None,
    classes=1000,
    classifier_activation="softmax",
    name="stagenet",
    *,
    dtype=None,
    class_names=None,
    dim=8,
    distilled=False,
):
    """Builds a model with 4x4-pixel patches in stage 1, and 8x8 and class tokens in stage 2."""
    inputs, (height, width) = builders.image_input(input_tensor, input_shape, 32, 8)
    common = {"dtype": dtype}
    x = builders.normalize(inputs, "stagenet", IMAGE, include_preprocessing, dtype)
    x = squares(x, 4, dim, "stem", name="roots", **common)
    x = keras.layers.Reshape((height * width // 16, dim), name="flat", **common)(x)
    x = ToyBlock(2, name="low", **common)(x)
    x = keras.layers.Reshape((height // 4, width // 4, dim), name="unflat", **common)(x)
    x = squares(x, 2, 2 * dim, "merge", name="join", **common)
    x = keras.layers.Reshape((height * width // 64, 2 * dim), name="flat_again", **common)(x)
    if distilled:
        x = ClassToken(name="distillation_token", **common)(x)
    x = ClassToken(name="class_token", **common)(x)
    x = ToyBlock(4, name="high", **common)(x)
    tokens = 2 if distilled else 1
    if not include_top:
        return inputs, builders.pool(x, (height // 8, width // 8), tokens, pooling, dtype)
    vectors = builders.read_tokens(x, tokens, dtype)
    return inputs, builders.classify(vectors, classes, classifier_activation, class_names, dtype)


keras_tnt.register_family(
    "stagenet", StageNet, variants={"stagenet_small": Variant({"dim": 8}, 32)}, image=IMAGE
)
