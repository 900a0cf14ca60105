"""The C++ kernels as JAX primitives: `forward`, `tangent` (its JVP) and `gradient` (its VJP).

Custom primitives decide at lowering: a program for a single CPU device of this process contains the
XLA custom call. The reference implementation (`plain`) takes its place for other or several
devices, in exported programs, under `vmap`, and for forward-mode and higher-order derivatives.
"""

import functools

import jax
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from keras_tnt import kernels
from keras_tnt.kernels import plain, xla_library


def make(sizes: kernels.Sizes):
    """Returns the function that `runtimes.operator` documents, or `None` without a library."""
    library = xla_library.load(sizes, "-isystem", jax.ffi.include_dir())
    if library is None:
        return None
    for name in filter(None, xla_library.targets(sizes)):
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(library[name]), platform="cpu")

    def call(x, weights, epsilon, keep=None):
        operands = [x, *weights]
        if keep is not None:
            operands.append(jax.lax.stop_gradient(keep))
        # Under a mesh, the sharding decides how each gradient is reduced over devices. JAX's own
        # operations handle that; the primitives do not.
        run = forward.bind if jax.sharding.get_abstract_mesh().empty else plain_forward
        return run(*operands, sizes=sizes, epsilon=epsilon)[0]

    return call


# === Reference implementations ===
#
# Each has the signature of its primitive. Operands are x, the weights and, optionally, `keep`.


def plain_forward(*operands, sizes, epsilon):
    """Returns the output, and zeros for the activations that the C++ kernel saves."""
    count = xla_library.inputs_count(sizes)
    (x, *weights), keep = operands[:count], operands[count:]
    result = plain.compute(x, weights, keep[0] if keep else None, sizes, epsilon)
    return result, *(jax.numpy.zeros(shape, x.dtype) for shape in sizes.kept(x.shape))


def plain_tangent(*kept_operands_and_tangents, sizes, epsilon):
    """Returns the output tangent (JVP), given saved activations, operands and their tangents."""
    _, operands, tangents = split(kept_operands_and_tangents, sizes)

    def result(*operands):
        return plain_forward(*operands, sizes=sizes, epsilon=epsilon)[0]

    return jax.jvp(result, operands, tangents)[1]


def plain_gradient(dx, *kept_and_operands, sizes, epsilon):
    """Returns the gradients with respect to x and the weights (VJP), given that of the output."""
    operands = kept_and_operands[xla_library.kept_count(sizes) :]

    def result(*operands):
        return plain_forward(*operands, sizes=sizes, epsilon=epsilon)[0]

    return jax.vjp(result, *operands)[1](dx)[: xla_library.inputs_count(sizes)]


def split(kept_operands_and_tangents, sizes):
    """Splits the arguments of `tangent` into saved activations, operands and tangents."""
    count = xla_library.kept_count(sizes)
    kept, both = kept_operands_and_tangents[:count], kept_operands_and_tangents[count:]
    half = len(both) // 2
    return kept, both[:half], both[half:]


# === The primitives ===


def primitive(name, function, multiple_results=True):
    """Creates a primitive whose lowering, batching and JVP are those of a reference function.

    Args:
        name: name of the primitive, without the prefix.
        function: the reference implementation.
        multiple_results: whether it returns a sequence. Defaults to `True`.
    """
    new = Primitive(f"keras_tnt_{name}")
    new.multiple_results = multiple_results

    @functools.partial(jax.jit, static_argnames=("sizes", "epsilon"))
    def compiled(*args, **settings):
        return new.bind(*args, **settings)

    def batch(args, axes, **settings):
        results = jax.vmap(functools.partial(function, **settings), axes)(*args)
        return results, [0] * len(results) if multiple_results else 0

    def differentiate(primals, tangents, **settings):
        tangents = tuple(map(ad.instantiate_zeros, tangents))
        return jax.jvp(functools.partial(function, **settings), tuple(primals), tangents)

    def run(*args, **settings):
        with jax.disable_jit(False):  # Without jit, `compiled` would call this function again.
            return compiled(*args, **settings)

    new.def_impl(run)
    mlir.register_lowering(new, mlir.lower_fun(function, multiple_results=multiple_results))
    batching.primitive_batchers[new] = batch
    ad.primitive_jvps[new] = differentiate
    return new


def on_a_cpu(new, which, function):
    """Registers the custom call as a primitive's lowering for a single CPU of this process.

    Args:
        new: the primitive.
        which: index of its custom call in `xla_library.targets`.
        function: the reference implementation, the fallback for all other programs.
    """
    plain_lowering = mlir.lower_fun(function, multiple_results=True)

    def lower(ctx, *operands, sizes, epsilon):
        module = ctx.module_context
        devices = getattr(module.axis_context, "num_devices", None) or 1
        target = xla_library.targets(sizes)[which]
        if module.lowering_parameters.for_export or devices > 1 or target is None:
            return plain_lowering(ctx, *operands, sizes=sizes, epsilon=epsilon)
        call = jax.ffi.ffi_lowering(target)
        attributes = {
            name: np.int64(value) if isinstance(value, int) else value
            for name, value in sizes.attributes().items()
        }
        return call(ctx, *operands, **attributes, epsilon=np.float32(epsilon))

    mlir.register_lowering(new, lower, platform="cpu")


forward = primitive("forward", plain_forward)
on_a_cpu(forward, 0, plain_forward)

tangent = primitive("tangent", plain_tangent, multiple_results=False)

gradient = primitive("gradient", plain_gradient)
on_a_cpu(gradient, 1, plain_gradient)


@forward.def_abstract_eval
def _(x, *_, sizes, **__):
    shapes = sizes.result(x.shape), *sizes.kept(x.shape)
    return [x.update(shape=shape, weak_type=False) for shape in shapes]


@tangent.def_abstract_eval
def _(*args, sizes, **_):
    x = split(args, sizes)[1][0]
    return x.update(shape=sizes.result(x.shape), weak_type=False)


@gradient.def_abstract_eval
def _(_, *kept_and_operands, sizes, **__):
    operands = kept_and_operands[xla_library.kept_count(sizes) :]
    return [
        operand.update(weak_type=False) for operand in operands[: xla_library.inputs_count(sizes)]
    ]


def differentiate_forward(primals, tangents, sizes, epsilon):
    """Applies the JVP rule of `forward`: binds `tangent`, which is linear in the tangents."""
    settings = {"sizes": sizes, "epsilon": epsilon}
    result, *kept = forward.bind(*primals, **settings)
    tangents = map(ad.instantiate_zeros, tangents)
    moved = tangent.bind(*kept, *primals, *tangents, **settings)
    return [result, *kept], [moved, *(ad.Zero(jax.typeof(x).to_tangent_aval()) for x in kept)]


def transpose_tangent(dx, *args, sizes, epsilon):
    """Applies the transpose rule of `tangent`: binds `gradient`, the C++ backward pass."""
    kept, operands, tangents = split(args, sizes)
    if type(dx) is ad.Zero:
        found = [ad.Zero(operand.aval) for operand in operands]
    else:
        found = [*gradient.bind(dx, *kept, *operands, sizes=sizes, epsilon=epsilon), None]
    wanted = [ad.is_undefined_primal(x) for x in tangents]
    back = [x if asked else None for x, asked in zip(found, wanted, strict=False)]
    return [None] * (len(kept) + len(operands)) + back


ad.primitive_jvps[forward] = differentiate_forward
ad.primitive_transposes[tangent] = transpose_tangent
