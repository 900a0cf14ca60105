"""The optimizers by name: `--optimizer`'s table.

A row is a function from (the trainable variables, the configuration) to a rule, made in the
strategy's scope. A rule says what an update does to one variable; the sum over the replicas,
clipping, the rate of each layer, which variables decay, float16's left-out updates and the moving
average are the trainer's, in `training/optimization.py`. Any Keras optimizer is a rule by
`KerasRule`:

    register_optimizer("adamax", lambda variables, config: KerasRule(Adamax(), variables))
"""

import difflib

import keras
import tensorflow as tf


class AdamW:
    """AdamW (arXiv 1711.05101), epsilon added behind the bias correction.

    Args:
        variables: trainable `keras.Variable`s.
        config: a `training.configuration.Config`.
    """

    epsilon = 1e-8

    def __init__(self, variables, config):
        self.betas = config.beta_1, config.beta_2
        self.means = [zeros_like(v) for v in variables]
        self.squares = [zeros_like(v) for v in variables]
        pairs = zip(self.means, self.squares, strict=True)
        self.slots = [{"mean": mean, "square": square} for mean, square in pairs]
        self.counters, self.others = (), {}

    def update(self, i, variable, gradient, count, rate, decay):
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
    """A Keras optimizer as a rule: decoupled weight decay, as its `apply` has it, and its step.

    Args:
        optimizer: a new `keras.optimizers.Optimizer`. Its own learning rate, weight decay,
            clipping and moving average are not used.
        variables: trainable `keras.Variable`s.

    Attributes:
        slots: a dict for each variable, from name to the `tf.Variable` that belongs to it.
        counters: variables that hold how many updates were made before.
        others: what else the optimizer keeps, by name.
    """

    def __init__(self, optimizer, variables):
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
        if decay:
            variable.assign(variable - rate * decay * variable)
        self.optimizer.update_step(gradient, variable, rate)


def zeros_like(variable):
    return tf.Variable(tf.zeros(variable.shape, variable.dtype), trainable=False)


# === The table ===


def sgd(variables, config):
    return KerasRule(keras.optimizers.SGD(momentum=config.momentum, nesterov=True), variables)


def lion(variables, config):
    return KerasRule(keras.optimizers.Lion(beta_1=config.beta_1, beta_2=config.beta_2), variables)


def lamb(variables, config):
    return KerasRule(keras.optimizers.Lamb(beta_1=config.beta_1, beta_2=config.beta_2), variables)


def muon(variables, config):
    """Matrices of the blocks by Muon; embeddings, tables, heads and vectors by AdamW."""
    betas = {"adam_beta_1": config.beta_1, "adam_beta_2": config.beta_2}
    outside = {"exclude_layers": ["head", "position", "token", "table"]}
    optimizer = keras.optimizers.Muon(momentum=config.momentum, **betas, **outside)
    return KerasRule(optimizer, variables)


OPTIMIZERS = {
    # Keras's AdamW adds epsilon before the bias correction and decays in a step of its own: other
    # updates than those of PyTorch's, with which the published models were trained.
    "adamw": AdamW,
    "sgd": sgd,
    "lion": lion,
    "lamb": lamb,
    "muon": muon,
}


def register_optimizer(name, make):
    """Add a row to the table.

    Args:
        name: what `--optimizer` calls it.
        make: function from (trainable variables, configuration) to a rule.

    Raises:
        ValueError: if the name is taken.
    """
    if OPTIMIZERS.get(name, make) is not make:
        raise ValueError(f"There is an optimizer {name!r} already.")
    OPTIMIZERS[name] = make


def find_optimizer(name):
    """The function that makes the rule of a name.

    Raises:
        ValueError: with the nearest names, if there is none.
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
