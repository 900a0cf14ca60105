"""LayerScale (CaiT, arXiv 2103.17239), and dropout layers with a different mask on each replica."""

import keras
from keras import ops

from keras_tnt.kernels import runtimes
from keras_tnt.layers.base import ConfiguredLayer
from keras_tnt.layers.sharding import shard_like

# Maximum number of seeds that a generator stores on torch for calls before a backward pass.
MAX_OPEN_CALLS = 1024


class ReplicaSeedGenerator(keras.random.SeedGenerator):
    """Seed generator with different seeds on each replica or rank, which replays seeds on torch.

    Replicas of a `tf.distribute.Strategy` and ranks of `torch.distributed` have equal copies of the
    state (`DistributedDataParallel` broadcasts that of rank 0), so they would all draw the same
    mask if the seed did not depend on the replica.

    A pass that `torch.utils.checkpoint` recomputes has to draw the masks of the first pass.
    `torch.utils.checkpoint` restores torch's random state for the recomputation. Each call
    therefore draws a number from that state, and in the backward pass it looks up its seed by this
    number, without changing the generator's state.
    """

    def __init__(self, seed: int | None = None, **kwargs):
        """Initializes the generator; the arguments are those of `keras.random.SeedGenerator`."""
        super().__init__(seed, **kwargs)
        self._seeds = {}  # Keys are numbers from torch's random state, the oldest first.

    def next(self, ordered=True):
        """Returns the next seed `(2,)`, which depends on the replica or rank."""
        backend = keras.backend.backend()
        if backend == "torch":
            return self.next_on_torch(ordered)
        seed = super().next(ordered)
        if backend == "tensorflow":
            import tensorflow as tf

            context = tf.distribute.get_replica_context()
            if context is not None and context.num_replicas_in_sync > 1:
                seed = replica_seed(seed, context.replica_id_in_sync_group)
        return seed

    def next_on_torch(self, ordered):
        """Returns the next seed on torch: a replayed one in the backward pass, else a new one."""
        number = runtimes.torch_random_number()
        if runtimes.is_in_torch_backward():
            return self.replayed(number)
        seed = super().next(ordered)
        rank = runtimes.torch_rank()
        if rank:
            seed = replica_seed(seed, rank)
        if number is not None:
            while len(self._seeds) >= MAX_OPEN_CALLS:
                del self._seeds[next(iter(self._seeds))]
            self._seeds[number] = seed.tolist()
        return seed

    def replayed(self, number):
        """Returns the seed of an earlier call, by the number it drew from torch's random state.

        Args:
            number: the number, or `None` within a `torch.func` transformation.

        Raises:
            RuntimeError: if no seed is stored for the number.
        """
        if number not in self._seeds:
            raise RuntimeError(
                "A random layer is recomputed in the backward pass and cannot draw the mask of the "
                "forward pass, so that gradients would be wrong. Call `torch.utils.checkpoint` "
                "with `preserve_rng_state=True`, its default, and each layer at most "
                f"{MAX_OPEN_CALLS} times before a backward pass."
            )
        return ops.convert_to_tensor(self._seeds[number], dtype=self.state.dtype)


def replica_seed(seed, replica):
    """Returns the seed `(2,)` of a replica or rank; replica 0 uses `seed` itself."""
    offset = ops.cast(replica, seed.dtype) * 1_000_003
    return seed + ops.stack([offset, ops.zeros_like(offset)])


class RandomDrop(ConfiguredLayer):
    """Base class of the dropout layers, which zero random elements of the input in training.

    The other elements are divided by the probability of not being dropped, so that the expectation
    is the input.
    """

    def __init__(self, rate: float, seed: int | None = None, **kwargs):
        """Initializes the layer; raises a `ValueError` if `rate` is outside of [0, 1)."""
        super().__init__(**kwargs)
        if not 0 <= rate < 1:
            raise ValueError(f"`rate` must lie in [0, 1). Received: rate={rate}")
        self.rate = rate
        self.seed = seed
        if rate > 0:
            self.seed_generator = ReplicaSeedGenerator(seed)
        self.supports_masking = True
        self.built = True

    def call(self, x, training=False):
        """Returns `x` with dropped elements while training, and `x` itself otherwise."""
        if not training or self.rate == 0:
            return x
        keep = 1 - self.rate
        # The mask is drawn in float32; 16-bit random numbers are too coarse for small rates.
        uniform = keras.random.uniform(
            self.mask_shape(x), dtype="float32", seed=self.seed_generator
        )
        return x * shard_like(ops.cast(uniform < keep, x.dtype) / keep, x)

    def rematerialized_call(self, layer_call, *args, **kwargs):
        """Returns `layer_call` itself: under `keras.RematScope`, the mask must not be redrawn."""
        return layer_call

    def compute_output_shape(self, input_shape):
        """Returns `input_shape`."""
        return input_shape


@keras.saving.register_keras_serializable(package="keras_tnt")
class Dropout(RandomDrop):
    """Dropout with different masks on each replica or rank.

    Args:
        rate: probability of dropping a value, in [0, 1).
        seed: integer, for reproducible masks. If `None`, the seed is random.
    """

    def mask_shape(self, x):
        """Returns the shape of `x`."""
        return ops.shape(x)


@keras.saving.register_keras_serializable(package="keras_tnt")
class StochasticDepth(RandomDrop):
    """Drops the residual branch of whole samples while training (arXiv 1603.09382).

    Args:
        rate: probability of dropping a sample's branch, in [0, 1).
        sample_axes: number of leading axes that are treated as batch axes. TNT drops the inner
            branch per patch: 2 for words of shape `(batch, patches, words, dim)`. Defaults to 1.
        seed: integer, for reproducible masks. If `None`, the seed is random.

    Example:
        >>> keras_tnt.layers.StochasticDepth(0.1)(np.ones((8, 16, 32)), training=True).shape
    """

    def __init__(self, rate: float, sample_axes: int = 1, seed: int | None = None, **kwargs):
        """Initializes the layer; the class docstring lists the arguments."""
        super().__init__(rate, seed, **kwargs)
        self.sample_axes = sample_axes

    def mask_shape(self, x):
        """Returns the leading `sample_axes` sizes of `x`, followed by ones."""
        samples = ops.shape(x)[: self.sample_axes]
        return (*samples, *[1] * (len(x.shape) - self.sample_axes))


@keras.saving.register_keras_serializable(package="keras_tnt")
class LayerScale(ConfiguredLayer):
    """Learned per-channel scale of a residual branch (CaiT, equation 4).

    Args:
        initial_value: initial value of every factor; CaiT uses 1e-5 up to 24 blocks, 1e-6 beyond.
            Defaults to 1e-5.
    """

    def __init__(self, initial_value: float = 1e-5, **kwargs):
        """Initializes the layer; the class docstring lists the arguments."""
        super().__init__(**kwargs)
        self.initial_value = initial_value

    def build(self, input_shape):
        """Creates one factor per channel."""
        self.gamma = self.add_weight(
            name="gamma",
            shape=(input_shape[-1],),
            initializer=keras.initializers.Constant(self.initial_value),
        )

    def call(self, x):
        """Multiplies `(batch, ..., dim)` by the factors."""
        return x * self.gamma

    def compute_output_shape(self, input_shape):
        """Returns `input_shape`."""
        return input_shape
