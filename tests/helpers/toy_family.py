"""A user-defined model family with a custom block, builder, tensor names and preprocessing.

Importing it registers the family for tests; commands use `--plugins=tests.helpers.toy_family`.
"""

import keras

import keras_tnt
from keras_tnt.layers import PatchEmbedding, PositionEmbedding, SelfAttention
from keras_tnt.models import builders
from keras_tnt.models.registry import ImageTransform, Variant

IMAGE = ImageTransform(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3), crop=0.8, crops={48: 1.0})


@keras.saving.register_keras_serializable(package="toy")
class ToyBlock(keras.layers.Layer):
    """Residual self-attention: x + attention(x)."""

    role = "block"

    def __init__(self, heads, **kwargs):
        super().__init__(**kwargs)
        self.heads = heads

    def build(self, input_shape):
        self.attention = SelfAttention(self.heads, dtype=self.dtype_policy, name="attention")
        self.attention.build(input_shape)

    def call(self, x, training=False):
        return x + self.attention(x, training=training)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "heads": self.heads}


@builders.builder
def ToyNet(
    include_top=True,
    include_preprocessing=True,
    weights=None,
    input_tensor=None,
    input_shape=None,
    pooling=None,
    classes=1000,
    classifier_activation="softmax",
    name="toynet",
    *,
    dtype=None,
    class_names=None,
    width=16,
    depth=1,
):
    """Builds a ViT without class token that classifies the mean of its patches."""
    inputs, (height, width_) = builders.image_input(input_tensor, input_shape, 32, 8)
    grid = (height // 8, width_ // 8)
    x = builders.normalize(inputs, "toynet", IMAGE, include_preprocessing, dtype)
    patches = PatchEmbedding(8, width, dtype=dtype, name="embedding")(x)
    patches = PositionEmbedding(grid, dtype=dtype, name="position")(patches)
    for i in range(depth):
        patches = ToyBlock(2, dtype=dtype, name=f"block_{i}")(patches)
    if not include_top:
        return inputs, builders.pool(patches, grid, 0, pooling, dtype)
    mean = builders.pool(patches, grid, 0, "avg", dtype)
    return inputs, builders.classify([mean], classes, classifier_activation, class_names, dtype)


keras_tnt.register_family(
    "toynet",
    ToyNet,
    variants={
        "toynet_tiny": Variant({"width": 16}, image_size=32),
        "toynet_xl2": Variant({"width": 32, "depth": 2}, image_size=48),
    },
    image=IMAGE,
    tensor_names=(
        ("embedding/projection", "stem.conv:patches"),
        ("position/table", "where"),
        ("block_{}/attention/qkv", "layer.{}.q|k|v"),
        ("block_{}/attention/projection", "layer.{}.out"),
        ("head", "fc"),
    ),
    source="This file",
)
