"""By how much words and patches are read in a forward pass, and what the logits make of it.

Nothing is computed here that the model does not compute itself: its layers show what they weigh
words and patches by, and let it be multiplied by gates.
"""

import keras
from keras import ops

from keras_tnt.layers.base import observing_links


def observe(model, images):
    """A forward pass, watched.

    Returns:
        `(logits, weights)`: what the model gives, and a dict from a layer's path to the weights by
        which it reads: the softmax of attention, a one for each word that a patch is made of.
    """
    weights = {}

    def look(layer, values):
        weights[layer.path] = values
        return values

    with observing_links(look):
        logits = model(images, training=False)
    return ops.convert_to_numpy(logits), weights


def gate_gradient_of(model):
    """How the sum of target logits grows with a gate on each link, which multiplies its weight.

    Args:
        model: from images to logits.

    Returns:
        A function (weights, images, chosen) to a dict of float64 arrays, gradient times weight:
        `weights` are what `observe` saw of the images, `chosen` a one for each image's target,
        `(batch, classes)`.
    """

    def target_logits(gates, images, chosen):
        with observing_links(lambda layer, x: x * gates[layer.path]):
            return sum_of_targets(model(images, training=False), chosen)

    gradient = gradient_of(target_logits, model.variables)

    def gate_gradient(weights, images, chosen):
        gates = {path: ops.ones_like(x) for path, x in weights.items()}
        found = gradient(gates, images, chosen)
        return {path: ops.convert_to_numpy(x).astype("float64") for path, x in found.items()}

    return gate_gradient


def sum_of_targets(logits, chosen):
    """The sum over a batch of each image's target logit: its gradient is each image's own."""
    return ops.sum(ops.multiply(ops.cast(logits, "float32"), chosen))


def gradient_of(function, variables):
    """The gradient of a scalar function by its first argument.

    Args:
        function: of a nest of tensors, and of others that it takes as they are.
        variables: all that it reads.

    Returns:
        A function of the same arguments. JAX compiles it, once for each shape.
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
