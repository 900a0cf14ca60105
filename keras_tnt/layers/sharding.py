"""Reshaping and sharding of tensors on JAX meshes with explicit axes.

`jax.set_mesh(jax.make_mesh(...))` creates such a mesh, on which operations do not infer the
sharding of their results. The batch is sharded and weights are replicated, and the functions below
pass the sharding that JAX requires. On other meshes and backends they equal the operations of
Keras.
"""

import keras
from keras import ops


def batch_axes(x):
    """Returns the explicit mesh axes that shard a tensor's first axis; `None` if there are none.

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
    """Reshapes `x`, whose first axis is or begins with the batch, and preserves its sharding."""
    axes = batch_axes(x)
    if axes is None:
        return ops.reshape(x, shape)
    import jax

    return jax.numpy.reshape(x, shape, out_sharding=jax.P(axes))


def shard_like(x, reference):
    """Returns a replicated tensor with its first axis sharded like that of `reference`."""
    axes = batch_axes(reference)
    if axes is None:
        return x
    import jax

    return jax.reshard(x, jax.P(axes))
