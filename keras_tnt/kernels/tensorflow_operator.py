"""The C++ kernels as TensorFlow operations: XLA custom calls in functions with `jit_compile=True`.

In a program that is compiled with XLA, the call is part of it; otherwise XLA compiles it alone.
"""

import functools

import tensorflow as tf
from tensorflow.compiler.tf2xla.python import xla

from keras_tnt import kernels
from keras_tnt.kernels import plain, xla_library


def make(sizes: kernels.Sizes):
    """Returns the function that `runtimes.operator` documents, or `None` without a library."""
    settings = "-isystem", tf.sysconfig.get_include(), "-DREGISTER", *tf.sysconfig.get_link_flags()
    if xla_library.load(sizes, *settings) is None:
        return None

    def call(x, weights, epsilon, keep=None):
        # For variables, tf.custom_gradient requires a gradient function with another signature.
        rest = [tf.convert_to_tensor(weight) for weight in weights]
        if keep is not None:
            rest.append(tf.stop_gradient(keep))
        return forward(sizes, epsilon)(x, *rest)

    return call


@functools.cache
def forward(sizes, epsilon):
    """Returns the compiled forward pass, a function of x, the weights and, optionally, `keep`."""
    target, _ = xla_library.targets(sizes)

    @tf.custom_gradient
    def run(*operands):
        def back(dx):
            numbers = (tf.bitcast(x, tf.float32) for x in kept)
            found = gradient(sizes, epsilon)(dx, *numbers, *operands)
            return *found, *[None] * (len(operands) - len(found))

        shape = operands[0].shape
        shapes = [tf.TensorShape(x) for x in (sizes.result(shape), *sizes.kept(shape))]
        result, *kept = custom_call(target, operands, operands[0], shapes, sizes, epsilon)
        # Bitcast the saved activations to integers, which TensorFlow does not differentiate.
        kept = [tf.bitcast(x, tf.int32) for x in kept]
        return result, back

    # The gradient of a function with jit_compile is compiled, too.
    return tf.function(run, jit_compile=True, autograph=False)


@functools.cache
def gradient(sizes, epsilon):
    """Returns the compiled backward pass: gradients with respect to x and the weights.

    Its arguments are the gradient of the output, the saved activations, and the operands of the
    forward pass. It is itself differentiable, by the reference implementation.
    """
    _, target = xla_library.targets(sizes)
    count, inputs_count = xla_library.kept_count(sizes), xla_library.inputs_count(sizes)

    def in_plain_operations(dx, *operands):
        inputs, keep = operands[:inputs_count], operands[inputs_count:]
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            keep = keep[0] if keep else None
            result = plain.compute(inputs[0], inputs[1:], keep, sizes, epsilon)
        return tape.gradient(result, inputs, output_gradients=dx)

    @tf.custom_gradient
    def run(dx, *kept_and_operands):
        operands = kept_and_operands[count:]

        def back(*upstream):
            inputs, keep = (dx, *operands[:inputs_count]), operands[inputs_count:]
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                results = in_plain_operations(*inputs, *keep)
            of_dx, *found = tape.gradient(results, inputs, output_gradients=upstream)
            return of_dx, *[None] * count, *found, *[None] * len(keep)

        shapes = [operand.shape for operand in operands[:inputs_count]]
        if target is None:
            return in_plain_operations(dx, *operands), back
        given = dx, *kept_and_operands
        return custom_call(target, given, operands[0], shapes, sizes, epsilon), back

    return tf.function(run, jit_compile=True, autograph=False)


def custom_call(target, operands, x, shapes, sizes, epsilon):
    """Builds an XLA custom call of xla.cpp; the batch and patch axes may have unknown sizes.

    Args:
        target: name of the custom call.
        operands: its operands, in the order that xla.cpp documents.
        x: the operand that holds words or tokens.
        shapes: shapes of the results; a size that is unknown is that of the same axis of x.
        sizes: `kernels.Sizes`.
        epsilon: epsilon of the layer norms.

    Returns:
        A list of the results.
    """
    arguments = {f"%operand{i}": tensor_type(y.shape) for i, y in enumerate(operands)}
    results = ", ".join(map(tensor_type, shapes))
    lines, told = [], {}
    if not all(shape.is_fully_defined() for shape in shapes):
        (name,) = (f"%operand{i}" for i, y in enumerate(operands) if y is x)
        lines, told = shapes_told(name, arguments[name], shapes)
    taken = arguments | told
    settings = [f"epsilon = {epsilon:.9e} : f32"]
    for name, value in sizes.attributes().items():
        settings.append(
            f'{name} = "{value}"' if isinstance(value, str) else f"{name} = {value} : i64"
        )
    # This attribute, which JAX sets for polymorphic shapes, makes TensorFlow refine the shapes.
    module = f"""
      module attributes {{jax.uses_shape_polymorphism = true}} {{
        func.func public @main({typed(arguments)}) -> ({results}) {{
          {" ".join(lines)}
          %results:{len(shapes)} = stablehlo.custom_call @{target}({", ".join(taken)}) {{
            api_version = 4 : i32,
            backend_config = {{{", ".join(settings)}}},
            indices_of_shape_operands = dense<{[*range(len(arguments), len(taken))]}>
              : tensor<{len(told)}xi64>
          }} : ({", ".join(taken.values())}) -> ({results})
          return {", ".join(f"%results#{i}" for i in range(len(shapes)))} : {results}
        }}
      }}"""
    return xla.call_module(
        operands,
        version=9,
        module=module,
        Tout=[tf.float32] * len(shapes),
        Sout=shapes,
        platforms=["CPU"],
    )


def shapes_told(x, x_type, shapes):
    """Returns StableHLO that computes the shapes of results from the dynamic shape of x.

    Args:
        x: name of the value.
        x_type: its tensor type.
        shapes: shapes of the results; an unknown size is that of the same axis of x.

    Returns:
        Lines of the program, and a dict from the values that hold a result's shape to their types.
    """
    lines, told = [], {}
    for i, shape in enumerate(shapes):
        value, kind = f"%shape{i}", f"tensor<{len(shape)}xi32>"
        told[value] = kind
        if shape.is_fully_defined():
            lines.append(f"{value} = stablehlo.constant dense<{shape.as_list()}> : {kind}")
            continue
        axes = [f"{value}_{axis}" for axis in range(len(shape))]
        for axis, (name, size) in enumerate(zip(axes, shape.as_list(), strict=True)):
            if size is not None:
                lines.append(f"{name} = stablehlo.constant dense<{size}> : tensor<1xi32>")
                continue
            lines += [
                f"{name}_size = stablehlo.get_dimension_size {x}, dim = {axis} "
                f": ({x_type}) -> tensor<i32>",
                f"{name} = stablehlo.reshape {name}_size : (tensor<i32>) -> tensor<1xi32>",
            ]
        lines.append(
            f"{value} = stablehlo.concatenate {', '.join(axes)}, dim = 0 "
            f": ({', '.join(['tensor<1xi32>'] * len(axes))}) -> {kind}"
        )
    return lines, told


def tensor_type(shape):
    """Returns the StableHLO type of a float32 tensor, such as `tensor<?x16x24xf32>`."""
    sizes = ("?" if size is None else str(size) for size in shape)
    return f"tensor<{'x'.join([*sizes, 'f32'])}>"


def typed(values):
    """Returns a StableHLO argument list, `name: type, ...`, for a dict from names to types."""
    return ", ".join(map(": ".join, values.items()))
