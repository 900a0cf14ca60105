"""Cost of a forward pass, counted in the backend's program."""

import math

import keras

from keras_tnt.models.anatomy import anatomy


def multiply_accumulates(model):
    """Returns the multiply-accumulates of matrix products and convolutions for one image.

    Args:
        model: Keras model of one input. If it accepts images of any size, the native size counts.

    Returns:
        An integer; the papers call it FLOPs.

    Example:
        >>> keras_tnt.inspection.multiply_accumulates(keras_tnt.DeiTSmall(weights=None))
        4608338304
    """
    count = {"tensorflow": tensorflow_flops, "jax": jax_flops, "torch": torch_flops}
    shape = model.input_shape[1:]
    if None in shape:
        shape = anatomy(model).image.native_shape
    return count[keras.backend.backend()](model, (1, *shape)) // 2


def tensorflow_flops(model, shape):
    """Returns the FLOPs of the MatMul, BatchMatMulV2 and Conv2D operations in a traced graph."""
    import tensorflow as tf

    function = tf.function(lambda x: model(x, training=False), autograph=False)
    signature = tf.TensorSpec(shape, model.inputs[0].dtype)
    total = 0
    for operation in function.get_concrete_function(signature).graph.get_operations():
        if operation.type in ("MatMul", "BatchMatMulV2"):
            first = "transpose_a" if operation.type == "MatMul" else "adj_x"
            inner = operation.inputs[0].shape[-2 if operation.get_attr(first) else -1]
        elif operation.type == "Conv2D":
            inner = math.prod(operation.inputs[1].shape[:-1])
        else:
            continue
        total += 2 * inner * operation.outputs[0].shape.num_elements()
    return total


def jax_flops(model, shape):
    """Returns the FLOPs of a model's jaxpr for a batch of this shape."""
    import jax

    def forward(values, image):
        with keras.StatelessScope(list(zip(model.variables, values, strict=True))):
            return model(image, training=False)

    values = [v.value for v in model.variables]
    image = jax.ShapeDtypeStruct(shape, model.inputs[0].dtype)
    return jaxpr_flops(jax.make_jaxpr(forward)(values, image).jaxpr)


def jaxpr_flops(jaxpr):
    """Returns the FLOPs of matrix products and convolutions in a jaxpr, including nested ones."""
    total = 0
    for equation in jaxpr.eqns:
        shapes = [variable.aval.shape for variable in equation.invars]
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            inner = math.prod(shapes[0][axis] for axis in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            output_axis = equation.params["dimension_numbers"].rhs_spec[0]
            inner = math.prod(shapes[1]) // shapes[1][output_axis]
        else:
            for inside in equation.params.values():
                if hasattr(inside, "jaxpr"):
                    total += jaxpr_flops(inside.jaxpr)
            continue
        total += 2 * inner * math.prod(equation.outvars[0].aval.shape)
    return total


def torch_flops(model, shape):
    """Returns the FLOPs that torch's `FlopCounterMode` counts in a forward pass."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(keras.ops.zeros(shape, model.inputs[0].dtype), training=False)
    return counter.get_total_flops()
