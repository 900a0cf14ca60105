"""Removes the containers and name prefixes of checkpoints of wrapped models.

Training scripts nest a state dict in containers (`{"model": ...}`), and wrappers rename its
tensors: DistributedDataParallel and AveragedModel (`module.`), torch.compile (`_orig_mod.`),
Lightning modules (the attribute that holds the model, usually `model.` or `net.`), FSDP.
"""

import re

from keras_tnt.text import printable

# Keys of the containers of a state dict, and of that of the moving average (EMA).
PLAIN = (
    "model",
    "state_dict",
    "model_state_dict",
    "model_state",
    "module",
    "net",
    "network",
    "params",
    "weights",
)
EMA = ("model_ema", "state_dict_ema", "ema_state_dict", "ema_model", "ema", "params_ema")
# Names that torch's wrappers insert at any depth; no layer has such a name.
INTERNAL = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
)
# Prefixes that wrappers put before all tensor names.
OUTER = ("module.", "model.", "net.", "network.")
# AveragedModel counts its updates in a tensor next to the weights.
COUNTER = re.compile(r"(^|\.)n_averaged$")
LIGHTNING = "pytorch-lightning_version"


def choose(path, content, ema):
    """Returns the state dict of the weights, or of their moving average, from a file's content.

    Args:
        path: path of the file, for messages.
        content: the file's content.
        ema: whether to return the exponential moving average (EMA).

    Raises:
        ValueError: if there is no such state dict.
    """
    if not isinstance(content, dict):
        raise ValueError(f"'{path}' holds a {type(content).__name__}, not a dict of tensors.")
    averages = [content[key] for key in EMA if isinstance(content.get(key), dict)]
    if not ema:
        inner = unnest(content)
        if inner is content and averages:
            raise ValueError(
                f"'{path}' holds only the moving average of the weights: load it with ema=True."
            )
        return inner
    if not averages:
        raise ValueError(
            f"'{path}' has no moving average of the weights (none of {', '.join(EMA)}): leave "
            "`ema` out."
        )
    return unnest(averages[0])


def unnest(content):
    """Returns the innermost dict of a chain of containers."""
    while True:
        inner = next((content[key] for key in PLAIN if isinstance(content.get(key), dict)), None)
        if inner is None:
            return content
        content = inner


def without_wrappers(path, names, others_may_be=False):
    """Returns a dict from the name of each tensor in the wrapped model to its name in the file.

    Args:
        path: path of the file, for messages.
        names: names of the tensors in the file.
        others_may_be: whether the file may contain tensors of other modules, such as losses and
            metrics in Lightning's files. They are left out. Defaults to `False`.

    Raises:
        ValueError: if two tensors would have the same name.
    """
    found = {}
    for name in names:
        plain = INTERNAL.sub("", name)
        if plain in found:
            raise ValueError(
                f"'{path}' cannot be loaded: it holds '{printable(plain)}' twice, as "
                f"'{printable(found[plain])}' and as '{printable(name)}'."
            )
        found[plain] = name
    while prefix := common_prefix(found, others_may_be):
        found = {
            name.removeprefix(prefix): stored
            for name, stored in found.items()
            if name.startswith(prefix)
        }
    return found


def common_prefix(names, others_may_be):
    """Returns the prefix that a wrapper put before all names; `None` if there is none."""
    names = [name for name in names if not COUNTER.search(name)]
    for prefix in OUTER:
        count = sum(name.startswith(prefix) for name in names)
        if count and (others_may_be or count == len(names)):
            return prefix
    return None
