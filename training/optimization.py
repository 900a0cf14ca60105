"""An optimizer across replicas, the learning rate of each update, and the weights' average.

Keras's `apply` reduces gradients after clipping them and knows no rate of its own for a layer; here
the gradients are summed over the replicas first, so that any number of devices takes the step that
one would.
"""

import contextlib
import functools
import math

import tensorflow as tf

from keras_tnt import finetuning
from keras_tnt.anatomy import is_ours
from training import optimizers


def learning_rate(config, step, steps_per_epoch):
    """Returns the rate of update `step`: linear warm-up, then the schedule.

    One value an update, or, under `schedule_per_epoch`, one an epoch, as timm 0.3.2 sets it.

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
    if config.schedule_per_epoch:
        epoch = max(step // steps_per_epoch - config.schedule_delay, 0)
    if epoch < config.warmup_epochs:
        start = config.warmup_learning_rate
        return start + (peak - start) * epoch / config.warmup_epochs
    return SCHEDULES[config.schedule](config, peak, epoch)


def cosine(config, peak, epoch):
    end = min(config.min_learning_rate, peak)
    return end + (peak - end) * (1 + math.cos(math.pi * min(epoch / config.epochs, 1))) / 2


def linear(config, peak, epoch):
    end = min(config.min_learning_rate, peak)
    return end + (peak - end) * max(1 - epoch / config.epochs, 0)


def step(config, peak, epoch):
    return peak * config.step_factor ** (epoch // config.step_epochs)


def constant(config, peak, epoch):
    return peak


# From (configuration, peak, epochs that are done, a float) to a rate.
SCHEDULES = {"cosine": cosine, "linear": linear, "step": step, "constant": constant}


def ema_decay(config, step):
    """Returns the decay of the moving average in update `step`.

    Under `ema_warmup` that of timm's ModelEmaV3: 0 in the first update, then
    1 - (1 + step)^(-2/3), at most `ema`.

    Args:
        config: a `training.configuration.Config`.
        step: updates made before, float tensor.
    """
    if not config.ema_warmup:
        return config.ema
    return tf.minimum(1 - tf.pow(1 + step, -2 / 3), config.ema)


class Optimizer:
    """A rule of `training.optimizers` with the papers' groups, clipping, EMA and loss scaling.

    Make it in the strategy's scope and call `apply` in a replica.

    Args:
        model: the `keras.Model` to train.
        config: a `training.configuration.Config`.
    """

    growth_steps = 2000

    def __init__(self, model, config):
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
        # Loss scale, and updates since it last changed.
        self.scale = [tf.Variable(2.0**15, trainable=False), tf.Variable(0.0, trainable=False)]

    def state(self):
        """Everything to save, by name."""
        named = {f"optimizer/{name}": variable for name, variable in self.rule.others.items()}
        for name, slots in zip(self.names, self.rule.slots, strict=True):
            named |= {f"{slot}/{name}": variable for slot, variable in slots.items()}
        if self.averages:
            named |= {f"ema/{n}": v for n, v in zip(self.names, self.averages, strict=True)}
        if self.scaling:
            named |= {"loss_scale": self.scale[0], "loss_scale_age": self.scale[1]}
        return named

    @contextlib.contextmanager
    def averaged(self):
        """Within the context, the model's weights are their moving average."""
        weights = [v.numpy() for v in self.variables]
        for variable, average in zip(self.variables, self.averages, strict=True):
            variable.assign(average.numpy())
        try:
            yield
        finally:
            for variable, value in zip(self.variables, weights, strict=True):
                variable.assign(value)

    def loss_scale(self):
        return tf.convert_to_tensor(self.scale[0]) if self.scaling else 1.0

    def is_kept(self, norm):
        """Returns whether an update of this gradient norm is kept: a boolean, or `None` for any.

        A float16 overflow is no fault: that update is left out and the scale halved.
        """
        return tf.math.is_finite(norm) if self.scaling else None

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
