"""Attention weights of a forward pass, and the gradients of the logits with respect to them.

Links are the weights by which layers read words and patches. The model computes them itself: its
layers expose them, and let them be multiplied by gates.
"""

import keras
from keras import ops

from keras_tnt.layers.base import intercept_attention


def observe(model, images):
    """Runs a forward pass and records its links.

    Args:
        model: a model of this package.
        images: images as the model takes them.

    Returns:
        `(logits, weights)`: the model's output as an array, and a dict from a layer's path to its
        links: the softmax of attention, and ones for the words of `WordsToPatches`.
    """
    weights = {}

    def look(layer, values):
        weights[layer.path] = values
        return values

    with intercept_attention(look):
        logits = model(images, training=False)
    return ops.convert_to_numpy(logits), weights


def gate_gradient_of(model):
    """Returns a function that differentiates the target logits by gates on the links.

    A gate multiplies a link, so that its gradient is gradient times weight.

    Args:
        model: model from images to logits.

    Returns:
        A function (weights, images, chosen) to a dict of float64 arrays: `weights` are those that
        `observe` recorded for the images, `chosen` the one-hot targets, `(batch, classes)`.
    """

    def target_logits(gates, images, chosen):
        with intercept_attention(lambda layer, x: x * gates[layer.path]):
            return sum_of_targets(model(images, training=False), chosen)

    gradient = gradient_of(target_logits, model.variables)

    def gate_gradient(weights, images, chosen):
        gates = {path: ops.ones_like(x) for path, x in weights.items()}
        found = gradient(gates, images, chosen)
        return {path: ops.convert_to_numpy(x).astype("float64") for path, x in found.items()}

    return gate_gradient


def sum_of_targets(logits, chosen):
    """Returns the sum over a batch of target logits, whose gradient is that of each image."""
    return ops.sum(ops.multiply(ops.cast(logits, "float32"), chosen))


def gradient_of(function, variables):
    """Returns the gradient of a scalar function with respect to its first argument.

    Args:
        function: function of a nest of tensors, and of other arguments, which are constants.
        variables: all variables that it reads.

    Returns:
        A function of the same arguments. JAX compiles it once per shape.
    """
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        def gradient(tensors, *others):
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(tensors)
                value = function(tensors, *others)
            return tape.gradient(value, tensors, unconnected_gradients="zero")

    elif keras.backend.backend() == "torch":
        import torch

        def gradient(tensors, *others):
            tensors = keras.tree.map_structure(lambda x: x.detach().requires_grad_(), tensors)
            leaves, value = keras.tree.flatten(tensors), function(tensors, *others)
            found = torch.autograd.grad(value, leaves, materialize_grads=True)
            return keras.tree.pack_sequence_as(tensors, found)

    else:
        import jax

        def stateless(tensors, values, *others):
            with keras.StatelessScope(list(zip(variables, values, strict=True))):
                return function(tensors, *others)

        compiled = jax.jit(jax.grad(stateless))

        def gradient(tensors, *others):
            return compiled(tensors, [v.value for v in variables], *others)

    return gradient
