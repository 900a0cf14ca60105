"""Loads Keras weight files into a model, completely or not at all."""

import collections
import contextlib
import re
import warnings
import zipfile

import keras
import numpy as np

from keras_tnt.files import expand
from keras_tnt.text import printable
from keras_tnt.weights.files import check_archive, check_readable, damaged

KERAS = (".weights.h5", ".keras")
# Keras's name for the weight file inside a `.keras` file.
INSIDE = "model.weights.h5"
LISTED = 10


def load_keras_file(model, path):
    """Loads the weights of a file that Keras wrote into a model.

    Every variable of the model is assigned, and every tensor of the file is used, except for
    classifier heads that the model does not have.

    Args:
        model: a model built by this package.
        path: path of a `.keras` or `.weights.h5` file.

    Raises:
        OSError: if the file does not exist or cannot be read.
        ValueError: if the file is damaged, or its weights do not match the model or contain NaN or
            Inf. The model is unchanged then.
    """
    path = expand(path)
    shapes = without_unused_heads(model, read_shapes(path))
    # In this scope assignments are recorded, and the variables do not change.
    with keras.StatelessScope() as scope, warnings.catch_warnings():
        # Keras warns about groups that it does not find before its error lists them.
        warnings.simplefilter("ignore")
        try:
            model.load_weights(path)
        except Exception as error:  # h5py and the layers' loading raise many types.
            raise misfit(model, path, shapes, error) from error
    values = [(v, scope.get_current_value(v)) for v in model.variables if is_float(v.dtype)]
    if len(shapes) != len(values) or any(value is None for _, value in values):
        raise misfit(model, path, shapes, "the file has other tensors than the model")
    for variable, value in values:
        if not np.all(np.isfinite(keras.ops.convert_to_numpy(value).astype("float32"))):
            raise ValueError(f"'{path}' cannot be loaded: {variable.path} holds NaN or infinity.")
    for variable, value in values:
        variable.assign(value)


def load_keras_model(path):
    """Returns the model in a `.keras` file, not compiled.

    Args:
        path: path of the file.

    Raises:
        OSError: if the file does not exist or cannot be read.
        ValueError: if the file is damaged, or contains no model that Keras can build.
    """
    path = expand(path)
    read_shapes(path)
    try:
        return keras.saving.load_model(path, compile=False)
    except Exception as error:  # Layers may raise any exception.
        reason = printable(str(error), longest=500)
        raise ValueError(f"'{path}' holds no model that Keras can build: {reason}") from error


def without_unused_heads(model, shapes):
    """Returns the shapes of a file without its heads if the model has no head."""
    if any(layer.name == "head" for layer in model.layers):
        return shapes
    return {name: shapes[name] for name in shapes if not re.match(r"layers/dense(_\d+)?/", name)}


def is_float(dtype):
    """Returns whether a dtype is a floating-point type."""
    return "float" in str(dtype)


# === The file ===


def read_shapes(path):
    """Returns the shapes of the model's floating-point tensors in a file, after an integrity check.

    Args:
        path: path of a `.keras` or `.weights.h5` file.

    Returns:
        A dict from HDF5 path to shape.
    """
    return inside(path, shapes_inside)


def read_grid(path):
    """Returns (rows, columns) of the patch grid of a file's position table; `None` without one.

    Args:
        path: path of a `.keras` or `.weights.h5` file.
    """
    shapes = read_shapes(path)
    named = [re.fullmatch(r"(layers/position_embedding(?:_(\d+))?)/vars/0", x) for x in shapes]
    # Patches have a larger dimension than words, whose table may be in the file too.
    tables = [(shapes[x[0]][-1], int(x[2] or 0), x[1]) for x in named if x]
    if not tables:
        return None
    *_, group = max(tables)
    grid = inside(path, lambda content: np.ravel(content[f"{group}/vars/grid"][()]).tolist())
    tokens = shapes[f"{group}/vars/0"][0]
    fits = len(grid) == 2 and min(grid) > 0 and tokens - 2 <= grid[0] * grid[1] <= tokens
    return tuple(map(int, grid)) if fits else None


def inside(path, read):
    """Returns `read(content)` for the HDF5 content of a file."""
    import h5py

    check_readable(path)
    with contextlib.ExitStack() as opened:
        file = path
        if path.endswith(".keras"):
            names = [entry.filename for entry in check_archive(path)]
            if INSIDE not in names:
                raise damaged(path, f"it has no entry '{INSIDE}'")
            archive = opened.enter_context(zipfile.ZipFile(path))
            file = opened.enter_context(archive.open(INSIDE))
        try:
            with h5py.File(file) as content:
                return read(content)
        except Exception as error:  # A damaged file may raise any exception.
            raise damaged(path, str(error)) from error


def shapes_inside(content):
    """Returns the shapes of the floating-point tensors of the layers in HDF5 content."""
    import h5py

    shapes = {}

    def visit(name, item):
        if not isinstance(item, h5py.Dataset):
            return
        if item.shape is None or item.id.get_storage_size() < item.nbytes:
            raise ValueError(f"'{name}' claims more numbers than it has")
        # HDF5 has no bfloat16: Keras stores two bytes, and the type as an attribute.
        is_number = item.dtype.kind == "f" or item.attrs.get("dtype") == "bfloat16"
        if is_number and name.startswith("layers/"):  # not the optimizer's state
            shapes[name] = item.shape

    content.visititems(visit)
    return shapes


# === Mismatches ===


def misfit(model, path, shapes, error):
    """Returns the error that lists how a file and a model differ, or else Keras's message."""
    lines = list(differences(model, shapes)) or [f"Keras says: {printable(str(error), 300)}"]
    if len(lines) > LISTED:
        lines[LISTED:] = [f"and {len(lines) - LISTED} more"]
    return ValueError(
        f"'{path}' does not fit model '{model.name}'. Nothing was loaded. It fits a model that is "
        "built with the arguments of the one it was saved from.\n" + "\n".join(lines)
    )


def differences(model, shapes):
    """Yields the differences of a file's layers from the model's, the likely cause first."""
    layers = layers_by_group(model)
    ours = {
        group: [tuple(v.shape) for v in layer.weights if is_float(v.dtype)]
        for group, layer in layers.items()
    }
    theirs = {}
    for name, shape in shapes.items():
        theirs.setdefault(name.removeprefix("layers/").partition("/")[0], []).append(shape)
    head = next((group for group, layer in layers.items() if layer.name == "head"), "dense")
    counts = [classes(group.get(head)) for group in (theirs, ours)]
    if counts[0] != counts[1]:
        yield "The file has {} classes, the model {}.".format(*(n or "no" for n in counts))
    for group, layer in layers.items():
        found, wanted = (collections.Counter(g.get(group, ())) for g in (theirs, ours))
        if wanted and not found:
            yield f"  missing: {layer.name}"
        elif found != wanted and not hasattr(layer, "can_resample"):
            yield (
                f"  shape: {layer.name} has {listed(found - wanted)} in the file, "
                f"{listed(wanted - found)} in the model"
            )
    yield from (f"  unused: {printable(group)}" for group in theirs if group not in layers)


def listed(shapes):
    """Returns shapes as text for a message."""
    return printable(", ".join(map(str, shapes)) or "nothing else")


def classes(shapes):
    """Returns the number of classes of a head from its variables' shapes; `None` without a head."""
    kernels = [shape for shape in shapes or () if len(shape) == 2]
    return kernels[0][-1] if kernels else None


def layers_by_group(model):
    """Returns the model's layers by their group names in Keras's files: class and counter."""
    layers, numbers = {}, collections.Counter()
    for layer in model.layers:
        name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", type(layer).__name__)
        name = re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()
        layers[f"{name}_{numbers[name]}" if numbers[name] else name] = layer
        numbers[name] += 1
    return layers
