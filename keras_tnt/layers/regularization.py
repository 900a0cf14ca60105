"""LayerScale (CaiT, arXiv 2103.17239) and the random layers, different on every replica."""

import keras
from keras import ops


class ReplicaSeedGenerator(keras.random.SeedGenerator):
    """A seed generator that gives another seed on each `tf.distribute` replica.

    Replicas of a strategy hold equal copies of its state, so that without the replica's number they
    would all draw the same mask.
    """

    def next(self, ordered=True):
        seed = super().next(ordered)
        if keras.backend.backend() == "tensorflow":
            import tensorflow as tf

            context = tf.distribute.get_replica_context()
            if context is not None and context.num_replicas_in_sync > 1:
                replica = ops.cast(context.replica_id_in_sync_group, seed.dtype)
                seed += ops.stack([replica * 1_000_003, ops.zeros_like(replica)])
        return seed


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
        return x * (ops.cast(uniform < keep, x.dtype) / keep)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "rate": self.rate, "seed": self.seed}


@keras.saving.register_keras_serializable(package="keras_tnt")
class Dropout(RandomDrop):
    """Drops single values while training; replicas of `tf.distribute` draw masks of their own.

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
