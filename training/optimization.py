"""AdamW across replicas, the learning rate of each update, and the moving average of the weights.

Keras's optimizers reduce gradients after clipping them and know no rate of their own for a layer;
here the gradients are summed over the replicas first, so that any number of devices takes the step
that one would.
"""

import contextlib
import math

import tensorflow as tf

from keras_tnt.anatomy import anatomy, is_ours


def learning_rate(config, step, steps_per_epoch):
    """The rate of update `step`: linear warm-up, then a cosine to the minimum, a value an update.

    Args:
        config: a `training.configuration.Config`.
        step: updates made before.
        steps_per_epoch: updates an epoch.

    Returns:
        A float.
    """
    scale = config.batch_size / config.learning_rate_batch if config.learning_rate_batch else 1.0
    peak = config.learning_rate * scale
    epoch = step / steps_per_epoch
    if epoch < config.warmup_epochs:
        start = config.warmup_learning_rate
        return start + (peak - start) * epoch / config.warmup_epochs
    end = min(config.min_learning_rate, peak)
    return end + (peak - end) * (1 + math.cos(math.pi * epoch / config.epochs)) / 2


def decays(variable):
    """Whether weight decay applies: to kernels; not to tokens, positions, biases, norms, scales."""
    return variable.path.rsplit("/", 1)[-1].endswith("kernel")


def depths(model):
    """How deep each trainable variable lies: 0 before the first block, then block by block.

    Returns:
        (list of integers, one a variable of `model.trainable_variables`; the head's depth). All of
        a model that has no anatomy is as deep as its head.
    """
    if not is_ours(model):
        return [1] * len(model.trainable_variables), 1
    found = anatomy(model)
    places = [block.layer for block in found.blocks] + list(found.class_blocks)
    head = len(places) + 1
    # What stands between the blocks goes with the block before it; norm and heads are last, and
    # tokens first, even where they enter behind the blocks.
    depth, by_variable = 0, {}
    for layer in found.model.layers:
        if layer in places:
            depth += 1
        last = layer is found.norm or layer in found.heads
        place = head if last else 0 if layer in found.tokens else depth
        by_variable |= {id(v): place for v in layer.trainable_variables}
    return [by_variable[id(v)] for v in model.trainable_variables], head


class AdamW:
    """AdamW (arXiv 1711.05101) with the papers' groups, clipping, EMA and loss scaling.

    Make it in the strategy's scope and call `apply` in a replica.

    Args:
        model: the `keras.Model` to train.
        config: a `training.configuration.Config`.
    """

    epsilon = 1e-8
    growth_steps = 2000

    def __init__(self, model, config):
        self.config = config
        self.variables = [v.value for v in model.trainable_variables]
        self.names = [v.path for v in model.trainable_variables]
        self.decay = [config.weight_decay * decays(v) for v in model.trainable_variables]
        places, last = depths(model)
        self.rates = [config.layer_decay ** (last - place) for place in places]

        def like(variable):
            return tf.Variable(tf.zeros(variable.shape, variable.dtype), trainable=False)

        self.means = [like(v) for v in self.variables]
        self.squares = [like(v) for v in self.variables]
        self.averages = [like(v) for v in self.variables] if config.ema else []
        for average, variable in zip(self.averages, self.variables, strict=bool(config.ema)):
            average.assign(variable.numpy())
        self.scaling = config.precision == "float16"
        # Loss scale, and updates since it last changed.
        self.scale = [tf.Variable(2.0**15, trainable=False), tf.Variable(0.0, trainable=False)]

    def state(self):
        """Everything to save, by name."""
        groups = {"mean": self.means, "square": self.squares, "ema": self.averages}
        named = {
            f"{group}/{name}": variable
            for group, variables in groups.items()
            for name, variable in zip(self.names, variables, strict=bool(variables))
        }
        if self.scaling:
            named |= {"loss_scale": self.scale[0], "loss_scale_age": self.scale[1]}
        return named

    @contextlib.contextmanager
    def averaged(self):
        """Within the context, the model's weights are their moving average."""
        weights = [v.numpy() for v in self.variables]
        for variable, average in zip(self.variables, self.averages, strict=True):
            variable.assign(average.numpy())
        yield
        for variable, value in zip(self.variables, weights, strict=True):
            variable.assign(value)

    def loss_scale(self):
        return tf.convert_to_tensor(self.scale[0]) if self.scaling else 1.0

    def apply(self, gradients, step, rate):
        """Sum the gradients over the replicas and update all variables.

        Args:
            gradients: of the (scaled) loss, this replica's share of it.
            step: updates made before, float tensor.
            rate: learning rate, float tensor.

        Returns:
            The gradients' global norm before clipping.
        """
        replica = tf.distribute.get_replica_context()
        gradients = replica.all_reduce(tf.distribute.ReduceOp.SUM, gradients)
        gradients = [g / self.loss_scale() for g in gradients]
        norm = tf.linalg.global_norm(gradients)
        if self.config.clip_norm:
            factor = self.config.clip_norm / tf.maximum(norm, self.config.clip_norm)
            gradients = [g * factor for g in gradients]
        # A float16 overflow is no fault: that update is left out and the scale halved.
        keep = tf.math.is_finite(norm) if self.scaling else tf.constant(True)
        tf.__internal__.distribute.interim.maybe_merge_call(
            self._update, replica.strategy, gradients, step + 1.0, rate, keep
        )
        return norm

    def _update(self, strategy, gradients, count, rate, keep):
        update = strategy.extended.update
        for i, variable in enumerate(self.variables):
            slots = [self.means[i], self.squares[i], *self.averages[i : i + 1]]
            fixed = (self.decay[i], self.rates[i])
            arguments = (gradients[i], count, rate, keep, fixed, *slots)
            update(variable, self._update_one, args=arguments, group=False)
        if self.scaling:
            update(self.scale[0], self._update_scale, args=(self.scale[1], keep), group=False)

    def _update_one(self, variable, gradient, count, rate, keep, fixed, mean, square, *average):
        decay, layer_rate = fixed
        beta_1, beta_2, ema = self.config.beta_1, self.config.beta_2, self.config.ema
        new_mean = beta_1 * mean + (1 - beta_1) * gradient
        new_square = beta_2 * square + (1 - beta_2) * tf.square(gradient)
        direction = (new_mean / (1 - beta_1**count)) / (
            tf.sqrt(new_square / (1 - beta_2**count)) + self.epsilon
        )
        new = variable - rate * layer_rate * (direction + decay * variable)
        pairs = [(variable, new), (mean, new_mean), (square, new_square)]
        for slot in average:
            pairs.append((slot, ema * slot + (1 - ema) * new))
        for slot, value in pairs:
            slot.assign(tf.where(keep, value, slot) if self.scaling else value)

    def _update_scale(self, scale, age, keep):
        grown = age + 1 >= self.growth_steps
        up = tf.where(grown, scale * 2, scale)
        scale.assign(tf.where(keep, up, tf.maximum(scale / 2, 1.0)))
        age.assign(tf.where(keep & ~grown, age + 1, 0.0))
