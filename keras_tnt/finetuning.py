"""Fine-tuning with `fit`: layer-wise learning-rate decay and freezing."""

import functools
import re

import keras

from keras_tnt.models.anatomy import anatomy

__all__ = ["freeze", "layerwise", "unfreeze"]

# Optimizers that wrap others and have no update step.
WRAPPERS = (keras.optimizers.LossScaleOptimizer, keras.optimizers.MultiOptimizer)


def layerwise(optimizer, model, decay=0.75):
    """Returns an optimizer with layer-wise learning-rate decay, from the head to the stem.

    The learning rate of a variable is the optimizer's times `decay ** distance` (arXiv 2106.08254,
    appendix). Heads, final norm and the levels of a backbone have distance 0, the last block has 1,
    the block before it 2, and stem, tokens and position tables before the blocks have one more than
    the number of blocks. A merge between stages has the distance of the block before it; layers
    outside of the keras_tnt model have distance 0. Weight decay is scaled with the learning rate,
    and applies to the same variables as in the published code: kernels, the distillation token and
    relative positions, but not the class token, position tables, norms, biases and LayerScale.

    Adapters that `enable_lora` adds afterwards have the rate of the layer that they adapt. Any
    other variable that is added to the model later is an error when training begins.

    Gradients are not changed. Clipping, gradient accumulation, moving averages, learning-rate
    schedules, loss scaling and saving are those of the given optimizer.

    Args:
        optimizer: a Keras optimizer, not yet built, or the name of one.
        model: the model to train, which is or contains a model of keras_tnt.
        decay: factor of the learning rate from one block to the block before it, in (0, 1].
            Defaults to 0.75.

    Returns:
        A new optimizer, of a subclass of `optimizer`'s class.

    Raises:
        ValueError: if `decay` is outside (0, 1], or the optimizer is already built or wraps another
            one.

    Example:
        >>> optimizer = keras.optimizers.AdamW(5e-4, weight_decay=0.05)
        >>> model.compile(keras_tnt.finetuning.layerwise(optimizer, model), loss=loss)
    """
    if not 0 < decay <= 1:
        raise ValueError(f"`decay` must lie above 0 and be at most 1. Received: {decay}")
    optimizer = keras.optimizers.get(optimizer)
    if isinstance(optimizer, WRAPPERS):
        raise ValueError(
            f"`layerwise` takes an optimizer that updates variables by itself, and "
            f"{type(optimizer).__name__} wraps others. Give `layerwise` what it wraps."
        )
    if optimizer.built:
        raise ValueError(f"'{optimizer.name}' is in use by a model. Make a new optimizer.")
    factors = {weight.path: 1.0 for weight in model.weights}
    factors |= {path: decay**far for path, far in distances(model).items()}
    return scaled(optimizer, factors)


def distances(model):
    """Returns the distance of each weight from the head: 0 at the head, 1 in the last block, ...

    Args:
        model: a model of keras_tnt, or one that contains such a model.

    Returns:
        Dict from the path of each weight of the keras_tnt model to its distance.
    """
    return {
        weight.path: distance
        for layer, distance in layer_distances(anatomy(model))
        for weight in layer.weights
    }


def layer_distances(parts):
    """Yields (layer, distance from the head) for the layers of a model, in their order."""
    blocks = [*(block.layer for block in parts.blocks), *parts.class_blocks]
    distance = farthest = len(blocks) + 1
    for layer in parts.model.layers:
        if layer in blocks:
            distance = len(blocks) - blocks.index(layer)
        elif layer is parts.norm or layer in parts.heads:
            distance = 0
        if layer in parts.tokens:
            yield layer, farthest
        else:
            yield layer, 0 if layer in parts.levels else distance


# === Freezing ===


def freeze(model, up_to):
    """Freezes the layers up to `up_to`; compile the model afterwards.

    Frozen BatchNorm normalizes with its moving averages, in `fit` too.

    Args:
        model: a model of keras_tnt, or one that contains such a model.
        up_to: `"stem"` for everything before the blocks, including tokens; an integer N for the
            stem and the first N blocks; or `"head"` for all but the heads and the levels of a
            backbone.

    Raises:
        ValueError: for another `up_to`.
    """
    parts = anatomy(model)
    count = len(parts.blocks) + len(parts.class_blocks)
    frozen = {"stem": 0, "head": count}.get(up_to, up_to)
    if isinstance(frozen, bool) or not isinstance(frozen, int) or not 0 <= frozen <= count:
        raise ValueError(
            f"`up_to` must be 'stem', 'head' or a number of blocks from 0 to {count}. "
            f"Received: {up_to!r}"
        )
    unfreeze(parts.model)
    for layer, distance in layer_distances(parts):
        last = layer in parts.heads or layer in parts.levels
        layer.trainable = last if up_to == "head" else distance <= count - frozen


def unfreeze(model):
    """Makes every layer trainable; compile the model afterwards."""
    model.trainable = False  # TensorFlow ignores an assignment that changes nothing.
    model.trainable = True


# === Optimizers ===

# Variables with weight decay in addition to kernels. The published code excludes vectors, biases
# and the model's `no_weight_decay` list: cls_token and the position tables (TNT outer_pos and
# inner_pos, DeiT and CaiT pos_embed, PyramidTNT outer_pos and inner_pos). It does not exclude
# `dist_token` and `relative_pos`.
ALSO_DECAYED = re.compile(r"(distillation_token/token|relative_position/table)$")


def decays(variable):
    """Returns whether weight decay applies to a variable, as in the published code.

    It applies to kernels, the distillation token and relative positions; not to the class token,
    position tables, biases, norms and LayerScale.

    Args:
        variable: a `keras.Variable` of a built model.
    """
    return variable.path.endswith("kernel") or bool(ALSO_DECAYED.search(variable.path))


@keras.saving.register_keras_serializable(package="keras_tnt")
class Layerwise:
    """Mixin for optimizer classes that scales the learning rate of each variable."""

    plain = None  # The base optimizer class.

    @classmethod
    def like(cls, optimizer, factors, complete=True):
        """Returns a new optimizer with the settings of `optimizer`.

        Args:
            optimizer: optimizer of the base class of this class.
            factors: dict from a variable's path to the factor of its learning rate.
            complete: whether `factors` covers all variables to be trained. `False` for files of
                earlier versions, which listed only some: other variables have factor 1. Defaults to
                `True`.
        """
        result = super().from_config(optimizer.get_config())
        result.factors = factors
        result.complete = complete
        result.kernel_decay, result.weight_decay = result.weight_decay, None
        return result

    def build(self, variables):
        """Builds the optimizer, with a learning-rate factor and weight decay for each variable."""
        rates = [self.factor_of(v.path) for v in variables]
        self.exclude_from_weight_decay(variables)
        super().build(variables)
        self.rates = rates
        # Muon updates some variables with AdamW, which has a separate weight decay.
        of_adamw = getattr(self, "adam_velocities", [None] * len(variables))
        rates = [self.kernel_decay if v is None else self.adam_weight_decay for v in of_adamw]
        self.decays = [
            decay if decays(v) else None for v, decay in zip(variables, rates, strict=True)
        ]

    def factor_of(self, path):
        """Returns the learning-rate factor of a variable, by its path.

        Raises:
            ValueError: if neither the variable nor the layer that it adapts is known.
        """
        if path in self.factors:
            return self.factors[path]
        layer, _, name = path.rpartition("/")
        if name.startswith("lora_"):
            for known, factor in self.factors.items():
                if known.rpartition("/")[0] == layer:
                    return factor
        if self.complete:
            raise ValueError(
                f"`layerwise` was given a model without the variable '{path}'. Make the optimizer "
                "for the model that is trained, layers around it included, after it was built."
            )
        return 1.0

    def update_step(self, gradient, variable, learning_rate):
        """Applies weight decay and the base optimizer's update, at the scaled learning rate."""
        index = self._get_variable_index(variable)
        rate = keras.ops.cast(learning_rate, variable.dtype) * self.rates[index]
        if self.decays[index]:
            self.assign_sub(variable, variable * (self.decays[index] * rate))
        super().update_step(gradient, variable, rate)

    def get_config(self):
        """Returns the base optimizer's configuration and the factors."""
        config = super().get_config() | {"weight_decay": self.kernel_decay}
        return {
            "optimizer": keras.saving.serialize_keras_object(self.plain.from_config(config)),
            "factors": dict(self.factors),
            "complete": self.complete,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """Creates the optimizer, of the class that fits the serialized base optimizer."""
        plain = keras.saving.deserialize_keras_object(config["optimizer"], custom_objects)
        return scaled(plain, config["factors"], config.get("complete", False))


def scaled(optimizer, factors, complete=True):
    """Returns `Layerwise.like(optimizer, ...)` of the class that fits the optimizer."""
    plain = type(optimizer)
    if plain.__module__.startswith("keras."):  # On torch, the type is a torch subclass.
        plain = getattr(keras.optimizers, plain.__name__)
    return layerwise_class(plain).like(optimizer, factors, complete)


@functools.cache
def layerwise_class(plain):
    """Returns the subclass of an optimizer class with the mixin `Layerwise`.

    All are registered under one name; the configuration records the base optimizer.
    """
    made = type("Layerwise", (Layerwise, plain), {"plain": plain})
    return keras.saving.register_keras_serializable(package="keras_tnt")(made)
