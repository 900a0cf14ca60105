"""Learning-rate schedule, and an optimizer for replicas with clipping, EMA and loss scaling.

Keras's `apply` all-reduces gradients after clipping them, and has no per-layer learning rates. Here
gradients are summed over the replicas first, so that the update does not depend on the number of
devices.
"""

import contextlib
import functools
import math

import tensorflow as tf

from keras_tnt import finetuning
from keras_tnt.models.anatomy import is_ours
from training import optimizers


def learning_rate(config, step, steps_per_epoch):
    """Returns the learning rate of update `step`: linear warm-up, then the schedule.

    The rate changes every update or, with `schedule_per_epoch`, every epoch, as in timm 0.3.2.

    Args:
        config: A `training.configuration.Config`.
        step: Updates made before.
        steps_per_epoch: Updates per epoch.

    Returns:
        A float.
    """
    scale = config.batch_size / config.learning_rate_batch if config.learning_rate_batch else 1.0
    peak = config.learning_rate * scale
    epoch = step / steps_per_epoch
    if config.schedule_per_epoch:
        epoch = max(step // steps_per_epoch - config.schedule_delay, 0)
    if epoch < config.warmup_epochs:
        start = config.warmup_learning_rate
        return start + (peak - start) * epoch / config.warmup_epochs
    return SCHEDULES[config.schedule](config, peak, epoch)


def cosine(config, peak, epoch):
    """Returns the rate of a cosine decay from `peak` to `min_learning_rate`."""
    end = min(config.min_learning_rate, peak)
    return end + (peak - end) * (1 + math.cos(math.pi * min(epoch / config.epochs, 1))) / 2


def linear(config, peak, epoch):
    """Returns the rate of a linear decay from `peak` to `min_learning_rate`."""
    end = min(config.min_learning_rate, peak)
    return end + (peak - end) * max(1 - epoch / config.epochs, 0)


def step(config, peak, epoch):
    """Returns the rate of a step decay: times `step_factor` every `step_epochs` before `epochs`."""
    last = math.ceil(config.epochs / config.step_epochs) - 1
    return peak * config.step_factor ** min(epoch // config.step_epochs, last)


def constant(config, peak, epoch):
    """Returns `peak`."""
    return peak


# Functions from (configuration, peak rate, fractional epoch) to a learning rate.
SCHEDULES = {"cosine": cosine, "linear": linear, "step": step, "constant": constant}


def ema_decay(config, step):
    """Returns the decay of the exponential moving average in update `step`.

    With `ema_warmup` it is that of timm's ModelEmaV3: 0 in the first update, then
    1 - (1 + step)^(-2/3), at most `ema`.

    Args:
        config: A `training.configuration.Config`.
        step: Updates made before, float tensor.
    """
    if not config.ema_warmup:
        return config.ema
    return tf.minimum(1 - tf.pow(1 + step, -2 / 3), config.ema)


# Initial values of the state that only --precision=float16 has.
LOSS_SCALE = {"loss_scale": 2.0**15, "loss_scale_age": 0.0}


class Optimizer:
    """Optimizer with weight-decay groups, layer decay, clipping, EMA and dynamic loss scaling.

    The update rule is one of `training.optimizers`. Create it in the strategy's scope and call
    `apply` in replica context.

    Args:
        model: The `keras.Model` to train.
        config: A `training.configuration.Config`.
    """

    growth_steps = 2000

    def __init__(self, model, config):
        """Creates the variables: moments, moving averages, loss scale."""
        self.config = config
        self.variables = [v.value for v in model.trainable_variables]
        self.names = [v.path for v in model.trainable_variables]
        self.rule = optimizers.find_optimizer(config.optimizer)(model.trainable_variables, config)
        self.decay = [config.weight_decay * finetuning.decays(v) for v in model.trainable_variables]
        distances = finetuning.distances(model) if is_ours(model) else {}
        self.rates = [config.layer_decay ** distances.get(name, 0) for name in self.names]
        averaged = model.trainable_variables if config.ema else []
        self.averages = [optimizers.zeros_like(v) for v in averaged]
        for average, variable in zip(self.averages, averaged, strict=True):
            average.assign(variable.numpy())
        self.scaling = config.precision == "float16"
        # Loss scale, and number of updates since it last changed.
        self.scale = [tf.Variable(value, trainable=False) for value in LOSS_SCALE.values()]

    def state(self):
        """Returns all variables to checkpoint, by name."""
        named = {f"optimizer/{name}": variable for name, variable in self.rule.others.items()}
        for name, slots in zip(self.names, self.rule.slots, strict=True):
            named |= {f"{slot}/{name}": variable for slot, variable in slots.items()}
        if self.averages:
            named |= {f"ema/{n}": v for n, v in zip(self.names, self.averages, strict=True)}
        if self.scaling:
            named |= dict(zip(LOSS_SCALE, self.scale, strict=True))
        return named

    @contextlib.contextmanager
    def averaged(self):
        """Swaps the moving averages into the model within the context."""
        weights = [v.numpy() for v in self.variables]
        for variable, average in zip(self.variables, self.averages, strict=True):
            variable.assign(average.numpy())
        try:
            yield
        finally:
            for variable, value in zip(self.variables, weights, strict=True):
                variable.assign(value)

    def loss_scale(self):
        """Returns the float16 loss scale, a tensor, or 1.0 in other precisions."""
        return tf.convert_to_tensor(self.scale[0]) if self.scaling else 1.0

    def is_kept(self, norm):
        """Returns whether to apply an update: a boolean tensor, or `None` if always.

        With float16 an update whose gradients overflow is skipped and the loss scale halved, which
        is part of dynamic loss scaling and not an error.

        Args:
            norm: Global norm of the gradients.
        """
        return tf.math.is_finite(norm) if self.scaling else None

    def apply(self, gradients, step, rate):
        """All-reduces the gradients and updates all variables.

        Args:
            gradients: Gradients of the scaled loss: this replica's part of the sum.
            step: Updates made before, float tensor.
            rate: Learning rate, float tensor.

        Returns:
            Global norm of the gradients before clipping.
        """
        replica = tf.distribute.get_replica_context()
        gradients = replica.all_reduce(tf.distribute.ReduceOp.SUM, gradients)
        gradients = [g / self.loss_scale() for g in gradients]
        norm = tf.linalg.global_norm(gradients)
        if self.config.clip_norm:
            factor = self.config.clip_norm / tf.maximum(norm, self.config.clip_norm)
            gradients = [g * factor for g in gradients]
        keep = self.is_kept(norm) if self.scaling else tf.constant(True)
        replica.merge_call(self._update, args=(gradients, step, rate, keep))
        return norm

    def _update(self, strategy, gradients, step, rate, keep):
        def update(variable, function, *arguments):
            strategy.extended.update(variable, function, args=arguments, group=False)

        for counter in self.rule.counters:
            update(
                counter, lambda counter, step: counter.assign(tf.cast(step, counter.dtype)), step
            )
        for i, variable in enumerate(self.variables):
            one = functools.partial(self._update_one, i)
            update(variable, one, gradients[i], step, rate, keep)
        if self.scaling:
            update(self.scale[0], self._update_scale, self.scale[1], keep)

    def _update_one(self, i, variable, gradient, step, rate, keep):
        changed = [variable, *self.rule.slots[i].values()] if self.scaling else []
        before = [tf.identity(each) for each in changed]
        rate = rate * self.rates[i]
        self.rule.update(i, variable, gradient, step + 1.0, rate, self.decay[i])
        for each, old in zip(changed, before, strict=True):
            each.assign(tf.where(keep, each, old))
        if self.averages:
            average, ema = self.averages[i], ema_decay(self.config, step)
            new = ema * average + (1 - ema) * variable
            average.assign(tf.where(keep, new, average) if self.scaling else new)

    def _update_scale(self, scale, age, keep):
        grown = age + 1 >= self.growth_steps
        up = tf.where(grown, scale * 2, scale)
        scale.assign(tf.where(keep, up, tf.maximum(scale / 2, 1.0)))
        age.assign(tf.where(keep & ~grown, age + 1, 0.0))
