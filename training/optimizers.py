"""Optimizers by name: the table of `--optimizer`.

A row is a function from (trainable variables, configuration) to an update rule, called in the
strategy's scope. A rule updates one variable. The rest is done by `training/optimization.py`: sum
over the replicas, clipping, per-layer learning rates, selection of the variables with weight decay,
skipped updates of float16, and the moving average. `KerasRule` makes a rule of any Keras optimizer:

    register_optimizer("adamax", lambda variables, config: KerasRule(Adamax(), variables))
"""

import difflib

import keras
import tensorflow as tf


class AdamW:
    """AdamW (arXiv 1711.05101), with epsilon added after the bias correction, as in PyTorch.

    Args:
        variables: Trainable `keras.Variable`s.
        config: A `training.configuration.Config`.
    """

    epsilon = 1e-8

    def __init__(self, variables, config):
        """Creates the first and second moments of each variable."""
        self.betas = config.beta_1, config.beta_2
        self.means = [zeros_like(v) for v in variables]
        self.squares = [zeros_like(v) for v in variables]
        pairs = zip(self.means, self.squares, strict=True)
        self.slots = [{"mean": mean, "square": square} for mean, square in pairs]
        self.counters, self.others = (), {}

    def update(self, i, variable, gradient, count, rate, decay):
        """Updates variable `i` and its moments.

        Args:
            i: Index of the variable.
            variable: The `tf.Variable`.
            gradient: Its gradient, clipped and summed over the replicas.
            count: Updates made, this one included, float tensor.
            rate: Learning rate, layer decay included.
            decay: Weight decay, 0 for variables without.
        """
        beta_1, beta_2 = self.betas
        mean = beta_1 * self.means[i] + (1 - beta_1) * gradient
        square = beta_2 * self.squares[i] + (1 - beta_2) * tf.square(gradient)
        direction = (mean / (1 - beta_1**count)) / (
            tf.sqrt(square / (1 - beta_2**count)) + self.epsilon
        )
        variable.assign(variable - rate * (direction + decay * variable))
        self.means[i].assign(mean)
        self.squares[i].assign(square)


class KerasRule:
    """Update rule of a Keras optimizer: decoupled weight decay, then the optimizer's step.

    Args:
        optimizer: A new `keras.optimizers.Optimizer`. Its learning rate, weight decay, clipping and
            moving average are not used.
        variables: Trainable `keras.Variable`s.

    Attributes:
        slots: A dict for each variable, from name to the `tf.Variable` of that slot.
        counters: Variables that count updates.
        others: Other variables of the optimizer, by name.
    """

    def __init__(self, optimizer, variables):
        """Builds the optimizer and assigns its variables to slots by their names."""
        optimizer.build(variables)
        self.optimizer = optimizer
        self.counters = (optimizer.iterations.value,)
        self.slots, self.others = [{} for _ in variables], {}
        places = {v.path.replace("/", "_"): i for i, v in enumerate(variables)}
        for kept in optimizer.variables:
            owners = [path for path in places if kept.name.startswith(f"{path}_")]
            owner = max(owners, key=len, default=None)
            if owner is not None:
                self.slots[places[owner]][kept.name[len(owner) + 1 :]] = kept.value
            elif kept.name not in ("iteration", "learning_rate"):
                self.others[kept.name] = kept.value

    def update(self, i, variable, gradient, count, rate, decay):
        """Updates variable `i`; see `AdamW.update` for the arguments."""
        if decay:
            variable.assign(variable - rate * decay * variable)
        self.optimizer.update_step(gradient, variable, rate)


def zeros_like(variable):
    """Returns a non-trainable `tf.Variable` of zeros in a variable's shape and dtype."""
    return tf.Variable(tf.zeros(variable.shape, variable.dtype), trainable=False)


# === The table ===


def sgd(variables, config):
    """Returns SGD with Nesterov momentum."""
    return KerasRule(keras.optimizers.SGD(momentum=config.momentum, nesterov=True), variables)


def lion(variables, config):
    """Returns Lion (arXiv 2302.06675)."""
    return KerasRule(keras.optimizers.Lion(beta_1=config.beta_1, beta_2=config.beta_2), variables)


def lamb(variables, config):
    """Returns LAMB (arXiv 1904.00962)."""
    return KerasRule(keras.optimizers.Lamb(beta_1=config.beta_1, beta_2=config.beta_2), variables)


def muon(variables, config):
    """Returns Muon for the blocks' matrices, AdamW for embeddings, tables, heads and vectors."""
    betas = {"adam_beta_1": config.beta_1, "adam_beta_2": config.beta_2}
    outside = {"exclude_layers": ["head", "position", "token", "table"]}
    optimizer = keras.optimizers.Muon(momentum=config.momentum, **betas, **outside)
    return KerasRule(optimizer, variables)


OPTIMIZERS = {
    # Keras's AdamW adds epsilon before the bias correction and decays in a separate step, unlike
    # PyTorch's, with which the published models were trained.
    "adamw": AdamW,
    "sgd": sgd,
    "lion": lion,
    "lamb": lamb,
    "muon": muon,
}


def register_optimizer(name, make):
    """Adds an optimizer to the table.

    Args:
        name: Value of `--optimizer`.
        make: Function from (trainable variables, configuration) to a rule.

    Raises:
        ValueError: If the name is taken.
    """
    if OPTIMIZERS.get(name, make) is not make:
        raise ValueError(f"There is an optimizer {name!r} already.")
    OPTIMIZERS[name] = make


def find_optimizer(name):
    """Returns the function that creates the rule of a name.

    Raises:
        ValueError: If there is none; the message suggests the nearest names.
    """
    if name not in OPTIMIZERS:
        near = " or ".join(difflib.get_close_matches(name, OPTIMIZERS))
        raise ValueError(
            f"--optimizer: there is no {name!r}. "
            + (f"Did you mean {near}? " if near else "")
            + f"There are: {', '.join(OPTIMIZERS)}; more by register_optimizer in a module of "
            "--plugins"
        )
    return OPTIMIZERS[name]
