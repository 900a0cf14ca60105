"""A copy of a model that multiplies in bfloat16 where that is safe and long enough to gain from."""

import keras

from keras_tnt.layers.attention import Attention
from keras_tnt.layers.blocks import MLP, TNTBlock
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

    Norms, softmax, residuals, words, stem and heads stay in float32.

    Args:
        model: for which `check_in_float32` passes.
    """
    copy = keras.models.clone_model(model, recursive=True)
    copy.set_weights(model.get_weights())
    for layer in layers_to_change(copy):
        layer.dtype_policy = POLICY
    return copy


def kernels_to_change(model: keras.Model) -> list[keras.Variable]:
    """The matrices that `in_bfloat16` has multiplied in bfloat16."""
    dense = [x for x in layers_to_change(model) if isinstance(x, keras.layers.Dense)]
    return [layer.kernel for layer in dense]


def layers_to_change(model):
    """The layers of attention and MLP over patches, and the projections of words to patches."""
    layers = list(model._flatten_layers())
    # Words are C++ in float32, or so small that converting takes longer than it saves.
    words = {
        id(layer)
        for block in layers
        if isinstance(block, TNTBlock)
        for layer in block.inner._flatten_layers()
    }
    found = []
    for layer in layers:
        if isinstance(layer, Attention | MLP) and id(layer) not in words:
            found += layer._flatten_layers()
        elif type(layer) is WordsToPatches:  # whose projection a norm follows
            found.append(layer.projection)
    return found
