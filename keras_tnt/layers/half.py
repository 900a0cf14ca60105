"""Conversion of models to bfloat16 matrix products in their large layers."""

import keras

from keras_tnt.layers import fused
from keras_tnt.layers.attention import Attention
from keras_tnt.layers.base import default_device
from keras_tnt.layers.blocks import MLP, TNTBlock, TransformerBlock
from keras_tnt.layers.embedding import WordsToPatches

POLICY = "mixed_bfloat16"


def check_in_float32(model: keras.Model) -> None:
    """Checks that a model can be converted to bfloat16.

    Args:
        model: the model.

    Raises:
        ValueError: if it has layers of another dtype policy than float32, or no layer to convert.
    """
    layers = model._flatten_layers(include_self=False)
    others = {layer.dtype_policy.name for layer in layers} - {"float32"}
    if others:
        raise ValueError(
            "`precision='bfloat16'` is for models in float32, which it leaves as they are. "
            f"'{model.name}' has layers of the dtype policy {', '.join(sorted(others))}."
        )
    if not layers_to_change(model):
        raise ValueError(
            "`precision='bfloat16'` is for attention and MLP of keras_tnt's layers. "
            f"'{model.name}' has none."
        )


def in_bfloat16(model: keras.Model) -> keras.Model:
    """Clones a model with bfloat16 attention, MLP and word-to-patch projections.

    Norms, softmax, residuals, stem and heads stay in float32. Word layers do too, unless the
    bfloat16 CPU kernel supports them. The clone does not share weights with the model.

    Args:
        model: a model that passes `check_in_float32`.
    """
    copy = keras.models.clone_model(model, recursive=True)
    copy.set_weights(model.get_weights())
    for layer in layers_to_change(copy):
        layer.dtype_policy = POLICY
    return copy


def kernels_to_change(model: keras.Model) -> list[keras.Variable]:
    """Returns the kernels that Keras casts to bfloat16; the C++ kernels convert the others."""
    parts = [layer for layer in model._flatten_layers() if is_native(layer)]
    packed = {id(layer) for part in parts for layer in part._flatten_layers()}
    return [
        layer.kernel
        for layer in layers_to_change(model)
        if isinstance(layer, keras.layers.Dense) and id(layer) not in packed
    ]


def layers_to_change(model):
    """Returns attention and MLP layers over patches, with sublayers, and word-to-patch projections.

    Word layers are included only if the C++ kernel computes them; otherwise the conversion of words
    takes longer than it saves.
    """
    layers = list(model._flatten_layers())
    words = {
        id(layer)
        for block in layers
        if isinstance(block, TNTBlock) and not is_native(block.inner)
        for layer in block.inner._flatten_layers()
    }
    found = []
    for layer in layers:
        if isinstance(layer, Attention | MLP) and id(layer) not in words:
            found += layer._flatten_layers()
        elif type(layer) is WordsToPatches:  # A norm follows its projection.
            found.append(layer.projection)
    return found


def is_native(layer):
    """Returns whether the C++ kernel computes a layer in bfloat16."""
    if isinstance(layer, TransformerBlock):
        sizes = fused.sizes_of(layer, layer.get_build_config()["input_shape"], half=True)
    elif type(layer) is WordsToPatches:
        sizes = fused.patch_sizes_of(layer, layer.projection.kernel.shape[0], half=True)
    else:
        return False
    return sizes is not None and default_device() == "cpu"
