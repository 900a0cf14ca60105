"""The inner transformer as operations of TensorFlow: XLA's custom calls.

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

    def call(words, weights, epsilon, keep=None):
        # Of variables a function with a gradient of its own would have to tell.
        rest = [tf.convert_to_tensor(weight) for weight in weights]
        if keep is not None:
            rest.append(tf.stop_gradient(keep))
        return forward(sizes, epsilon)(words, *rest)

    return call


@functools.cache
def forward(sizes, epsilon):
    """The function from words and weights, and `keep`, to words."""
    count = len(native.Weights._fields)

    @tf.custom_gradient
    def run(words, *rest):
        def back(dwords):
            of_words, sums = gradient(sizes, epsilon)(words, dwords, *rest)
            of_weights = xla_library.apart(sums, rest[:count])
            return of_words, *of_weights, *[None] * (len(rest) - count)

        (result,) = custom_call(xla_library.FORWARD, (words, *rest), sizes, epsilon)
        return result, back

    # TensorFlow compiles its gradient alike.
    return tf.function(run, jit_compile=True, autograph=False)


@functools.cache
def gradient(sizes, epsilon):
    """The function to the gradient by the words, and to those by the weights side by side."""
    count = len(native.Weights._fields)

    def in_plain_operations(words, dwords, *rest):
        inputs = [words, *rest[:count]]
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            keep = rest[count] if len(rest) > count else None
            result = plain.inner_transformer(words, rest[:count], keep, sizes, epsilon)
        of_words, *of_weights = tape.gradient(result, inputs, output_gradients=dwords)
        return of_words, tf.concat([tf.reshape(x, [-1]) for x in of_weights], 0)

    @tf.custom_gradient
    def run(*operands):
        def back(*upstream):
            inputs, keep = operands[: 2 + count], operands[2 + count :]
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                results = in_plain_operations(*inputs, *keep)
            found = tape.gradient(results, inputs, output_gradients=upstream)
            return *found, *[None] * len(keep)

        return custom_call(xla_library.GRADIENT, operands, sizes, epsilon), back

    return tf.function(run, jit_compile=True, autograph=False)


def custom_call(target, operands, sizes, epsilon):
    """A custom call of xla.cpp as an operation; the numbers of images and patches may be unknown.

    Args:
        target: its name; the gradient's has a second result, the numbers of all weights.
        operands: what xla.cpp says.
        sizes: `native.Sizes`.
        epsilon: of the norms.

    Returns:
        A list of the results.
    """
    shapes = [operands[0].shape]
    if target == xla_library.GRADIENT:
        weights = operands[2 : 2 + len(native.Weights._fields)]
        shapes.append(tf.TensorShape(sum(weight.shape.num_elements() for weight in weights)))
    arguments = {f"%operand{i}": tensor_type(x.shape) for i, x in enumerate(operands)}
    results = ", ".join(map(tensor_type, shapes))
    lines, told = [], {}
    if not shapes[0].is_fully_defined():
        lines, told = shapes_told(arguments, shapes)
    taken = arguments | told
    # TensorFlow refines the shapes of a program that JAX would have made for any.
    module = f"""
      module attributes {{jax.uses_shape_polymorphism = true}} {{
        func.func public @main({typed(arguments)}) -> ({results}) {{
          {" ".join(lines)}
          %results:{len(shapes)} = stablehlo.custom_call @{target}({", ".join(taken)}) {{
            api_version = 4 : i32,
            backend_config = {{kernel = "{sizes.name()}", epsilon = {epsilon:.9e} : f32}},
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


def shapes_told(arguments, shapes):
    """How a program is told the shapes of results, where those of its arguments are unknown.

    Returns:
        Lines of the program, and a dict from its values that hold a result's shape to their types.
    """
    (words, words_type), *_ = arguments.items()
    axes, lines = [], []
    for axis, size in enumerate(shapes[0].as_list()):
        value = f"%axis{axis}"
        if size is None:
            lines += [
                f"%size{axis} = stablehlo.get_dimension_size {words}, dim = {axis} "
                f": ({words_type}) -> tensor<i32>",
                f"{value} = stablehlo.reshape %size{axis} : (tensor<i32>) -> tensor<1xi32>",
            ]
        else:
            lines.append(f"{value} = stablehlo.constant dense<{size}> : tensor<1xi32>")
        axes.append(value)
    lines.append(
        f"%shape0 = stablehlo.concatenate {', '.join(axes)}, dim = 0 "
        f": ({', '.join(['tensor<1xi32>'] * len(axes))}) -> tensor<{len(axes)}xi32>"
    )
    told = {"%shape0": f"tensor<{len(axes)}xi32>"}
    for i, shape in enumerate(shapes[1:], 1):
        told[f"%shape{i}"] = f"tensor<{len(shape)}xi32>"
        lines.append(
            f"%shape{i} = stablehlo.constant dense<{shape.as_list()}> : {told[f'%shape{i}']}"
        )
    return lines, told


def tensor_type(shape):
    sizes = ("?" if size is None else str(size) for size in shape)
    return f"tensor<{'x'.join([*sizes, 'f32'])}>"


def typed(values):
    return ", ".join(map(": ".join, values.items()))
