"""Names and layouts of a model's variables in PyTorch checkpoints.

A family has a table of rows: the path of a variable or layer, the tensor name in timm's
checkpoints, and the name in the original release. In a row with one name, both use it, or only one
of them exists.

- `{}` is the index of a block or stage.
- `qk|v` are two tensors, concatenated in one fused variable; each letter is an equal fraction of
  its last axis.
- `:map` after a name: the tensor is a map (1, dim, rows, columns), the variable a table (rows *
  columns, dim).
- `:patches` after a name: the tensor is a convolution kernel (dim, channels, side, side), the
  variable a matrix (side * side * channels, dim).
"""

import dataclasses
import math
import re

import numpy as np
from keras import ops

# Checkpoint tensors that no forward pass reads.
UNUSED = re.compile(r"(^|\.)(outer_tokens|num_batches_tracked|n_averaged)$")
LEAVES = {
    "kernel": "weight",
    "gamma": "weight",
    "beta": "bias",
    "bias": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
HEADS = ("head", "head_distillation")
# Rows of every classifier.
HEAD = (("norm", "norm"), ("head", "head"), ("head_distillation", "head_dist"))
# Rows of class-attention blocks, which several families share.
CLASS_ATTENTION_NAMES = (
    ("class_block_{}/norm_attention", "blocks_token_only.{}.norm1"),
    ("class_block_{}/attention/query", "blocks_token_only.{}.attn.q"),
    ("class_block_{}/attention/kv", "blocks_token_only.{}.attn.k|v"),
    ("class_block_{}/attention/projection", "blocks_token_only.{}.attn.proj"),
    ("class_block_{}/scale_attention/gamma", "blocks_token_only.{}.gamma_1"),
    ("class_block_{}/norm_mlp", "blocks_token_only.{}.norm2"),
    ("class_block_{}/mlp/fc1", "blocks_token_only.{}.mlp.fc1"),
    ("class_block_{}/mlp/fc2", "blocks_token_only.{}.mlp.fc2"),
    ("class_block_{}/scale_mlp/gamma", "blocks_token_only.{}.gamma_2"),
)

NUMBER = re.compile(r"(?<=_)\d+(?=[/_])")


@dataclasses.dataclass(frozen=True)
class Entry:
    """Variable and the checkpoint tensors that store it.

    Attributes:
        layer, variable: the variable and the layer that owns it.
        names: names of the tensors, which are concatenated along the variable's last axis.
        shares: size of each tensor along that axis.
        shape: the variable's shape, with the axes of a tensor.
        axes: permutation from those axes to a tensor's.
    """

    layer: object
    variable: object
    names: tuple
    shares: tuple
    shape: tuple
    axes: tuple

    @property
    def shapes(self):
        """Returns the shapes of the tensors."""
        full = [(*self.shape[:-1], share) for share in self.shares]
        return tuple(tuple(shape[axis] for axis in self.axes) for shape in full)

    def fits(self, shapes):
        """Returns whether tensors of these shapes can fill the variable, resampled if necessary."""
        return shapes == self.shapes or self.resamples(shapes[0])

    def resamples(self, shape):
        """Returns whether a tensor of this shape is the layer's table for another grid."""
        if not hasattr(self.layer, "resample") or len(shape) != len(self.shape):
            return False
        return self.layer.can_resample(tuple(shape[axis] for axis in np.argsort(self.axes)))

    def to_keras(self, tensors):
        """Returns the variable's value from its tensors, resampled if the layer's grid differs."""
        parts = [np.transpose(tensor, np.argsort(self.axes)) for tensor in tensors]
        value = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
        if value.shape != self.shape:
            value = self.layer.resample(value)
        return np.reshape(value, self.variable.shape)

    @property
    def value(self):
        """Returns the variable's value, with LoRA weights merged."""
        adapted = self.variable.name == "kernel" and getattr(self.layer, "lora_enabled", False)
        return ops.convert_to_numpy(self.layer.kernel if adapted else self.variable)

    def assign(self, tensors):
        """Assigns the variable from its tensors, and resets LoRA's update to zero."""
        self.variable.assign(self.to_keras(tensors))
        if self.variable.name == "kernel" and getattr(self.layer, "lora_enabled", False):
            self.layer.lora_kernel_b.assign(ops.zeros(self.layer.lora_kernel_b.shape))

    def to_torch(self, value):
        """Returns a list of the tensors for a value of the variable."""
        value = np.reshape(value, self.shape)
        parts = np.split(value, np.cumsum(self.shares)[:-1], axis=-1)
        return [np.ascontiguousarray(np.transpose(part, self.axes)) for part in parts]


def conventions(table):
    """Returns the number of naming conventions of a table; files are written in the first."""
    return max(len(row) for row in table) - 1


def entries(model, table, prefix="", convention=0, skip_others=False):
    """Returns the entries of all variables of a model that a checkpoint stores.

    Args:
        model: a model built by this package, or one with such a model inside.
        table: the family's rows of names.
        prefix: common prefix of the names of the model's layers. Defaults to "".
        convention: 0 for timm's names, 1 for the original release's. Defaults to 0.
        skip_others: whether to skip layers that the user added before or after ours. Defaults to
            `False`.

    Returns:
        A list of `Entry`.

    Raises:
        ValueError: for a quantized layer, and for the user's layers unless they are skipped.
    """
    rows = {row[0]: row[min(1 + convention, len(row) - 1)] for row in (*HEAD, *table)}
    # A TNT block without an inner transformer has the names of the outer part of one with it.
    rows |= {path.replace("/outer/", "/"): name for path, name in rows.items()}
    layers = {layer.path: layer for layer in model._flatten_layers()}
    found = [
        entry(rows, layers, layer, variable, prefix, skip_others)
        for layer in layers.values()
        for variable in layer._trainable_variables + layer._non_trainable_variables
        if not variable.name.startswith("lora_kernel_")
    ]
    return [entry for entry in found if entry is not None]


def entry(rows, layers, layer, variable, prefix, skip_others):
    """Returns the `Entry` of a variable; `None` for a variable that is skipped."""
    if getattr(layer, "quantization_mode", None):
        raise ValueError(
            f"Layer '{layer.path}' is quantized, and no checkpoint holds {layer.quantization_mode} "
            "weights: load or save the checkpoint before model.quantize(...)."
        )
    path = variable.path.removeprefix(prefix)
    if layer.name.removeprefix(prefix) in HEADS:
        # A head that the user added may be nested deeper.
        path = "/".join(path.split("/")[-2:]).removeprefix(prefix)
    key = NUMBER.sub("{}", path)
    stem, _, leaf = key.rpartition("/")
    if key in rows:
        pattern = rows[key]
    elif stem in rows:
        pattern = with_leaf(rows[stem], LEAVES[leaf])
    elif skip_others:
        return None
    else:
        raise ValueError(
            f"No checkpoint name is known for the variable '{variable.path}'. Beside the layers of "
            "keras_tnt's models a checkpoint has only a classifier, Dense(classes, name='head')."
        )
    pattern, _, form = pattern.format(*NUMBER.findall(path)).partition(":")

    names, letters = split_names(pattern)
    owner = layers.get(layer.path.rpartition("/")[0])
    shape, axes = layout(layer, owner, variable, form)
    shares = tuple(shape[-1] * count // sum(letters) for count in letters)
    return Entry(layer, variable, names, shares, shape, axes)


def with_leaf(name, leaf):
    """Returns a layer's name in a table, followed by the name of one of its variables."""
    name, colon, form = name.partition(":")
    # The layout is that of the kernel; a bias is a vector for every kernel.
    return f"{name}.{leaf}{colon}{form}" if leaf == "weight" else f"{name}.{leaf}"


def split_names(pattern):
    """Returns the tensor names of a pattern, and the letter count of each.

    "attn.qk|v.weight" gives ("attn.qk.weight", "attn.v.weight") and (2, 1).
    """
    if "|" not in pattern:
        return (pattern,), (1,)
    start, middle, end = re.fullmatch(r"(.*\.)([^.]*\|[^.]*)(\..*)", pattern).groups()
    letters = middle.split("|")
    return tuple(start + part + end for part in letters), tuple(len(part) for part in letters)


def layout(layer, owner, variable, form):
    """Returns a variable's shape with the axes of its tensor, and their order in the tensor."""
    shape = tuple(variable.shape)
    if form == "map":
        return (*layer.grid, shape[-1], 1), (3, 2, 0, 1)
    if form == "patches":
        side = owner.patch_size
        return (side, side, shape[0] // side**2, shape[1]), (3, 2, 0, 1)
    if variable.name == "table":  # (tokens, dim) -> (1, tokens, dim)
        return (1, *shape), tuple(range(len(shape) + 1))
    if variable.name == "kernel":
        return shape, (3, 2, 0, 1) if len(shape) == 4 else (1, 0)
    if variable.name in ("gamma", "beta"):  # (words, dim) -> (words * dim,)
        shape = (math.prod(shape),)
    return shape, tuple(range(len(shape)))
