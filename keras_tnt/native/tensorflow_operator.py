"""The parts of TNT's block as operations of TensorFlow: XLA's custom calls.

XLA compiles what is around them if it compiles the program, and the calls alone if it does not.
"""

import functools

import tensorflow as tf
from tensorflow.compiler.tf2xla.python import xla

from keras_tnt import native
from keras_tnt.native import plain, xla_library


def make(sizes: native.Sizes):
    """The function that `runtimes.operator` describes; None where there is no library for it."""
    settings = "-isystem", tf.sysconfig.get_include(), "-DREGISTER", *tf.sysconfig.get_link_flags()
    if xla_library.load(sizes, *settings) is None:
        return None

    def call(x, weights, epsilon, keep=None):
        # Of variables a function with a gradient of its own would have to tell.
        rest = [tf.convert_to_tensor(weight) for weight in weights]
        if keep is not None:
            rest.append(tf.stop_gradient(keep))
        return forward(sizes, epsilon)(x, *rest)

    return call


@functools.cache
def forward(sizes, epsilon):
    """The function from words or tokens, the weights and `keep` to words or tokens."""
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
        # By integers TensorFlow does not differentiate.
        kept = [tf.bitcast(x, tf.int32) for x in kept]
        return result, back

    # TensorFlow compiles its gradient alike.
    return tf.function(run, jit_compile=True, autograph=False)


@functools.cache
def gradient(sizes, epsilon):
    """The function to the gradients by words or tokens and by the weights.

    It takes what the result is propagated back of, what the forward pass kept, and its operands.
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
    """A custom call of xla.cpp as an operation; the numbers of images and patches may be unknown.

    Args:
        target: its name.
        operands: what xla.cpp says.
        x: that of the operands which is words or tokens.
        shapes: of the results; what is unknown of them is that axis of x.
        sizes: `native.Sizes`.
        epsilon: of the norms.

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
    # TensorFlow refines the shapes of a program that JAX would have made for any.
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
    """How a program is told the shapes of results, where those of its arguments are unknown.

    Returns:
        Lines of the program, and a dict from its values that hold a result's shape to their types.
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
    sizes = ("?" if size is None else str(size) for size in shape)
    return f"tensor<{'x'.join([*sizes, 'f32'])}>"


def typed(values):
    return ", ".join(map(": ".join, values.items()))
