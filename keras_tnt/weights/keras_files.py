"""Files of weights that Keras wrote, into a model: all of a file, or nothing and the reason."""

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
# The name that Keras gives to the file of weights inside of a `.keras` file.
INSIDE = "model.weights.h5"
LISTED = 10


def load_keras_file(model, path):
    """Fill a model with the weights of a file that Keras wrote.

    Every variable of the model is filled and every tensor of the file used, but for the heads where
    the model has none.

    Args:
        model: a model built by this package.
        path: of a `.keras` or `.weights.h5` file.

    Raises:
        OSError: if there is no such file, or it may not be read.
        ValueError: if the file is damaged, or its weights do not fit the model or are no finite
            numbers. The model is unchanged then.
    """
    path = expand(path)
    shapes = without_unused_heads(model, read_shapes(path))
    # In this scope variables stay as they are, and what they are assigned is kept beside them.
    with keras.StatelessScope() as scope, warnings.catch_warnings():
        # Keras warns of groups that it looks for in vain before it says what it misses.
        warnings.simplefilter("ignore")
        try:
            model.load_weights(path)
        except Exception as error:  # Whatever h5py and the layers' own loading raise.
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
    """The model that a `.keras` file holds, not compiled.

    Raises:
        OSError: if there is no such file, or it may not be read.
        ValueError: if the file is damaged, or holds no model that can be built.
    """
    path = expand(path)
    read_shapes(path)
    try:
        return keras.saving.load_model(path, compile=False)
    except Exception as error:  # Whatever the layers of its configuration raise.
        reason = printable(str(error), longest=500)
        raise ValueError(f"'{path}' holds no model that Keras can build: {reason}") from error


def without_unused_heads(model, shapes):
    """A model without its top leaves the file's heads alone."""
    if any(layer.name == "head" for layer in model.layers):
        return shapes
    return {name: shapes[name] for name in shapes if not re.match(r"layers/dense(_\d+)?/", name)}


def is_float(dtype):
    return "float" in str(dtype)


# === The file ===


def read_shapes(path):
    """The shapes of a file's floating-point tensors by their paths, each found to be whole.

    Args:
        path: of a `.keras` or `.weights.h5` file.
    """
    return inside(path, shapes_inside)


def read_grid(path):
    """(rows, columns) that a file tells of its table of the patches' positions; None without.

    Args:
        path: of a `.keras` or `.weights.h5` file.
    """
    shapes = read_shapes(path)
    named = [re.fullmatch(r"(layers/position_embedding(?:_(\d+))?)/vars/0", x) for x in shapes]
    # A patch has more dimensions than each of its words, whose table there may be too.
    tables = [(shapes[x[0]][-1], int(x[2] or 0), x[1]) for x in named if x]
    if not tables:
        return None
    *_, group = max(tables)
    grid = inside(path, lambda content: np.ravel(content[f"{group}/vars/grid"][()]).tolist())
    tokens = shapes[f"{group}/vars/0"][0]
    fits = len(grid) == 2 and min(grid) > 0 and tokens - 2 <= grid[0] * grid[1] <= tokens
    return tuple(map(int, grid)) if fits else None


def inside(path, read):
    """What a function reads in a file's HDF5 content."""
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
        except Exception as error:  # A damaged file raises whatever its garbage leads to.
            raise damaged(path, str(error)) from error


def shapes_inside(content):
    import h5py

    shapes = {}

    def visit(name, item):
        if not isinstance(item, h5py.Dataset):
            return
        if item.shape is None or item.id.get_storage_size() < item.nbytes:
            raise ValueError(f"'{name}' claims more numbers than it has")
        # HDF5 has no bfloat16: Keras writes it as two bytes, and its name beside them.
        is_number = item.dtype.kind == "f" or item.attrs.get("dtype") == "bfloat16"
        if is_number and name.startswith("layers/"):  # The optimiser's lie beside them.
            shapes[name] = item.shape

    content.visititems(visit)
    return shapes


# === What does not fit ===


def misfit(model, path, shapes, error):
    """The error that says in what a file and a model differ, or else what Keras says."""
    lines = list(differences(model, shapes)) or [f"Keras says: {printable(str(error), 300)}"]
    if len(lines) > LISTED:
        lines[LISTED:] = [f"and {len(lines) - LISTED} more"]
    return ValueError(
        f"'{path}' does not fit model '{model.name}'. Nothing was loaded. It fits a model that is "
        "built with the arguments of the one it was saved from.\n" + "\n".join(lines)
    )


def differences(model, shapes):
    """In what a file's layers differ from the model's, a line each, the likely cause first."""
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
    return printable(", ".join(map(str, shapes)) or "nothing else")


def classes(shapes):
    """The number of classes of a head with variables of these shapes; None where it is none."""
    kernels = [shape for shape in shapes or () if len(shape) == 2]
    return kernels[0][-1] if kernels else None


def layers_by_group(model):
    """The model's layers by what Keras calls them in its files: their class, and a number."""
    layers, numbers = {}, collections.Counter()
    for layer in model.layers:
        name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", type(layer).__name__)
        name = re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()
        layers[f"{name}_{numbers[name]}" if numbers[name] else name] = layer
        numbers[name] += 1
    return layers
