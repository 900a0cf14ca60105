"""The inner transformer as operations of JAX.

They are primitives of their own, so that each program takes the C++ where it can: one that is
compiled for a single CPU of this process has the custom call; one for another device or several,
one that is exported, a `vmap`, a derivative forwards or of a derivative have the plain operations.
"""

import functools

import jax
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from keras_tnt import native
from keras_tnt.native import plain, xla_library


def make(sizes: native.Sizes):
    """The function that `runtimes.operator` describes; None where there is no library for it."""
    library = xla_library.load(sizes, "-isystem", jax.ffi.include_dir())
    if library is None:
        return None
    for name in (xla_library.FORWARD, xla_library.GRADIENT):
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(library[name]), platform="cpu")

    def call(words, weights, epsilon, keep=None):
        operands = [words, *weights]
        if keep is not None:
            operands.append(jax.lax.stop_gradient(keep))
        # Within a mesh gradients are summed over devices, each in its own way.
        run = forward_of if jax.sharding.get_abstract_mesh().empty else plain_forward
        return run(*operands, sizes=sizes, epsilon=epsilon)

    return call


# === The plain operations ===


def plain_forward(words, *rest, sizes, epsilon):
    count = len(native.Weights._fields)
    keep = rest[count] if len(rest) > count else None
    return plain.inner_transformer(words, rest[:count], keep, sizes, epsilon)


def plain_tangent(*primals_and_tangents, **settings):
    half = len(primals_and_tangents) // 2
    primals, tangents = primals_and_tangents[:half], primals_and_tangents[half:]
    return jax.jvp(functools.partial(plain_forward, **settings), primals, tangents)[1]


def plain_gradient(words, dwords, *rest, **settings):
    """The gradient by the words, and those by the weights one after another."""
    _, back = jax.vjp(functools.partial(plain_forward, **settings), words, *rest)
    of_words, *of_rest = back(dwords)
    of_weights = of_rest[: len(native.Weights._fields)]
    return of_words, jax.numpy.concatenate([x.ravel() for x in of_weights])


# === The primitives ===


def primitive(name, function, multiple_results=False):
    """A primitive that is a plain function, until it is told better."""
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

    new.def_impl(compiled)
    mlir.register_lowering(new, mlir.lower_fun(function, multiple_results=multiple_results))
    batching.primitive_batchers[new] = batch
    ad.primitive_jvps[new] = differentiate
    return new


def on_a_cpu(new, target, function):
    """Let a primitive be a custom call in programs for a single CPU of this process."""
    plain_lowering = mlir.lower_fun(function, multiple_results=new.multiple_results)

    def lower(ctx, *operands, sizes, epsilon):
        module = ctx.module_context
        devices = getattr(module.axis_context, "num_devices", None) or 1
        if module.lowering_parameters.for_export or devices > 1:
            return plain_lowering(ctx, *operands, sizes=sizes, epsilon=epsilon)
        call = jax.ffi.ffi_lowering(target)
        return call(ctx, *operands, kernel=sizes.name(), epsilon=np.float32(epsilon))

    mlir.register_lowering(new, lower, platform="cpu")


forward = primitive("forward", plain_forward)
forward.def_abstract_eval(lambda words, *_, **__: words.update(weak_type=False))
on_a_cpu(forward, xla_library.FORWARD, plain_forward)

tangent = primitive("tangent", plain_tangent)
tangent.def_abstract_eval(lambda words, *_, **__: words.update(weak_type=False))

gradient = primitive("gradient", plain_gradient, multiple_results=True)
on_a_cpu(gradient, xla_library.GRADIENT, plain_gradient)


@gradient.def_abstract_eval
def _(words, dwords, *rest, **_):
    count = sum(weight.size for weight in rest[: len(native.Weights._fields)])
    return words.update(weak_type=False), words.update(shape=(count,), weak_type=False)


def forward_of(*operands, **settings):
    return forward.bind(*operands, **settings)


def differentiate_forward(primals, tangents, **settings):
    tangents = map(ad.instantiate_zeros, tangents)
    return forward.bind(*primals, **settings), tangent.bind(*primals, *tangents, **settings)


def transpose_tangent(dwords, *operands, **settings):
    half = len(operands) // 2
    primals, tangents = operands[:half], operands[half:]
    if type(dwords) is ad.Zero:
        found = [ad.Zero(primal.aval) for primal in primals]
    else:
        weights = native.Weights(*primals[1 : 1 + len(native.Weights._fields)])
        of_words, sums = gradient.bind(primals[0], dwords, *primals[1:], **settings)
        found = [of_words, *xla_library.apart(sums, weights), None]
    wanted = [ad.is_undefined_primal(x) for x in tangents]
    return [None] * half + [x if asked else None for x, asked in zip(found, wanted, strict=False)]


ad.primitive_jvps[forward] = differentiate_forward
ad.primitive_transposes[tangent] = transpose_tangent
