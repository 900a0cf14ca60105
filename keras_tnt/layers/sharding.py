"""Tensors in a JAX mesh with explicit axes, where operations do not guess how results are sharded.

`jax.set_mesh(jax.make_mesh(...))` makes such a mesh. There the batch is sharded, weights are
replicated, and the functions below say what JAX asks for. Everywhere else they are Keras's own.
"""

import keras
from keras import ops


def batch_axes(x):
    """Returns the explicit mesh axes that shard a tensor's first axis; `None` where there are none.

    Args:
        x: a tensor of any backend.
    """
    if keras.backend.backend() != "jax":
        return None
    import jax

    if not isinstance(x, jax.Array) or not x.ndim:
        return None
    sharding = jax.typeof(x).sharding
    explicit = jax.sharding.AxisType.Explicit
    mesh = getattr(sharding, "mesh", None)
    if mesh is None or mesh.empty or explicit not in mesh.axis_types:
        return None
    return sharding.spec[0] if len(sharding.spec) else None


def reshape(x, shape):
    """`keras.ops.reshape` of a tensor whose first axis is, or begins with, the batch."""
    axes = batch_axes(x)
    if axes is None:
        return ops.reshape(x, shape)
    import jax

    return jax.numpy.reshape(x, shape, out_sharding=jax.P(axes))


def shard_like(x, reference):
    """Returns a replicated tensor with its first axis sharded as that of another tensor."""
    axes = batch_axes(reference)
    if axes is None:
        return x
    import jax

    return jax.reshard(x, jax.P(axes))
