"""A copy of a model that multiplies in bfloat16 where that is safe and long enough to gain from."""

import keras

from keras_tnt.layers import fused
from keras_tnt.layers.attention import Attention
from keras_tnt.layers.base import default_device
from keras_tnt.layers.blocks import MLP, TNTBlock, TransformerBlock
from keras_tnt.layers.embedding import WordsToPatches

POLICY = "mixed_bfloat16"


def check_in_float32(model: keras.Model) -> None:
    """Raise a ValueError for a model that cannot be told to compute in bfloat16."""
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
    """A copy, with weights of its own, whose attention and MLP over patches are in bfloat16.

    Norms, softmax, residuals, stem and heads stay in float32, and words, but on a CPU with C++ for
    them in bfloat16.

    Args:
        model: for which `check_in_float32` passes.
    """
    copy = keras.models.clone_model(model, recursive=True)
    copy.set_weights(model.get_weights())
    for layer in layers_to_change(copy):
        layer.dtype_policy = POLICY
    return copy


def kernels_to_change(model: keras.Model) -> list[keras.Variable]:
    """The matrices that `in_bfloat16` has multiplied in bfloat16, but those that C++ converts."""
    parts = [layer for layer in model._flatten_layers() if is_native(layer)]
    packed = {id(layer) for part in parts for layer in part._flatten_layers()}
    return [
        layer.kernel
        for layer in layers_to_change(model)
        if isinstance(layer, keras.layers.Dense) and id(layer) not in packed
    ]


def layers_to_change(model):
    """The layers of attention and MLP over patches, and the projections of words to patches.

    Those over words too where C++ is to compute them; anything else takes longer to convert words
    than it saves.
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
        elif type(layer) is WordsToPatches:  # whose projection a norm follows
            found.append(layer.projection)
    return found


def is_native(layer):
    """Whether there is C++ for a layer that is to multiply in bfloat16."""
    if isinstance(layer, TransformerBlock):
        sizes = fused.sizes_of(layer, layer.get_build_config()["input_shape"], half=True)
    elif type(layer) is WordsToPatches:
        sizes = fused.patch_sizes_of(layer, layer.projection.kernel.shape[0], half=True)
    else:
        return False
    return sizes is not None and default_device() == "cpu"
