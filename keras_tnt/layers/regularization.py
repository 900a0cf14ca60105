"""LayerScale (CaiT, arXiv 2103.17239), and layers whose masks differ between replicas or ranks."""

import keras
from keras import ops

from keras_tnt.layers.sharding import shard_like
from keras_tnt.native import runtimes

# Seeds that a generator remembers on torch for calls whose backward pass is still to come.
MAX_OPEN_CALLS = 1024


class ReplicaSeedGenerator(keras.random.SeedGenerator):
    """A seed generator that gives another seed on each replica or rank, and replays its seeds.

    Replicas of a `tf.distribute.Strategy` and ranks of `torch.distributed` hold equal copies of the
    state (`DistributedDataParallel` broadcasts rank 0's), so that without their number they would
    all draw the same mask.

    A pass that `torch.utils.checkpoint` recomputes has to draw the masks of the first pass. It
    restores torch's random state for that, from which each call therefore takes a number; in the
    backward pass the seed is looked up by this number, and the state stays as it is.
    """

    def __init__(self, seed: int | None = None, **kwargs):
        super().__init__(seed, **kwargs)
        self._seeds = {}  # by the number from torch's random state; the oldest first

    def next(self, ordered=True):
        backend = keras.backend.backend()
        if backend == "torch":
            return self.next_on_torch(ordered)
        seed = super().next(ordered)
        if backend == "tensorflow":
            import tensorflow as tf

            context = tf.distribute.get_replica_context()
            if context is not None and context.num_replicas_in_sync > 1:
                seed = of_replica(seed, context.replica_id_in_sync_group)
        return seed

    def next_on_torch(self, ordered):
        number = runtimes.torch_random_number()
        if runtimes.is_in_torch_backward():
            return self.replayed(number)
        seed = super().next(ordered)
        rank = runtimes.torch_rank()
        if rank:
            seed = of_replica(seed, rank)
        if number is not None:
            while len(self._seeds) >= MAX_OPEN_CALLS:
                del self._seeds[next(iter(self._seeds))]
            self._seeds[number] = seed.tolist()
        return seed

    def replayed(self, number):
        """The seed of an earlier call, by the number that it took from torch's random state."""
        if number not in self._seeds:
            raise RuntimeError(
                "A random layer is recomputed in the backward pass and cannot draw the mask of the "
                "forward pass, so that gradients would be wrong. Call `torch.utils.checkpoint` "
                "with `preserve_rng_state=True`, its default, and each layer at most "
                f"{MAX_OPEN_CALLS} times before a backward pass."
            )
        return ops.convert_to_tensor(self._seeds[number], dtype=self.state.dtype)


def of_replica(seed, replica):
    """The seed `(2,)` of a replica or rank, of which 0 has the given one."""
    offset = ops.cast(replica, seed.dtype) * 1_000_003
    return seed + ops.stack([offset, ops.zeros_like(offset)])


class RandomDrop(keras.layers.Layer):
    """What the random layers share: parts of the input are zero while training.

    What is kept is divided by the probability of keeping it, so that the expectation is the input.
    """

    def __init__(self, rate: float, seed: int | None = None, **kwargs):
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
        if not training or self.rate == 0:
            return x
        keep = 1 - self.rate
        # In float32: a number drawn in half precision has too few steps to keep the rate.
        uniform = keras.random.uniform(
            self.mask_shape(x), dtype="float32", seed=self.seed_generator
        )
        return x * shard_like(ops.cast(uniform < keep, x.dtype) / keep, x)

    def rematerialized_call(self, layer_call, *args, **kwargs):
        """Under `keras.RematScope`: as it is, for the mask that was drawn is the one to use."""
        return layer_call

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "rate": self.rate, "seed": self.seed}


@keras.saving.register_keras_serializable(package="keras_tnt")
class Dropout(RandomDrop):
    """Drops single values while training; replicas and ranks draw different masks.

    Args:
        rate: probability of dropping a value, in [0, 1).
        seed: integer, for reproducible masks.
    """

    def mask_shape(self, x):
        return ops.shape(x)


@keras.saving.register_keras_serializable(package="keras_tnt")
class StochasticDepth(RandomDrop):
    """Drops a residual branch of whole samples while training (arXiv 1603.09382).

    Args:
        rate: probability of dropping a sample's branch, in [0, 1).
        sample_axes: how many leading axes count samples. TNT drops the inner branch patch by patch:
            2 for words of shape `(batch, patches, words, dim)`.
        seed: integer, for reproducible masks.

    Example:

    >>> keras_tnt.layers.StochasticDepth(0.1)(np.ones((8, 16, 32)), training=True).shape
    """

    def __init__(self, rate: float, sample_axes: int = 1, seed: int | None = None, **kwargs):
        super().__init__(rate, seed, **kwargs)
        self.sample_axes = sample_axes

    def mask_shape(self, x):
        samples = ops.shape(x)[: self.sample_axes]
        return (*samples, *[1] * (len(x.shape) - self.sample_axes))

    def get_config(self):
        return {**super().get_config(), "sample_axes": self.sample_axes}


@keras.saving.register_keras_serializable(package="keras_tnt")
class LayerScale(keras.layers.Layer):
    """Multiplies each channel of a residual branch by a learned factor (CaiT, equation 4).

    Args:
        initial_value: what every factor starts from; CaiT: 1e-5 up to 24 blocks, 1e-6 beyond.
    """

    def __init__(self, initial_value: float = 1e-5, **kwargs):
        super().__init__(**kwargs)
        self.initial_value = initial_value

    def build(self, input_shape):
        self.gamma = self.add_weight(
            name="gamma",
            shape=(input_shape[-1],),
            initializer=keras.initializers.Constant(self.initial_value),
        )

    def call(self, x):
        return x * self.gamma

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "initial_value": self.initial_value}
