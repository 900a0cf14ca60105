"""On-disk cache of CPU programs that Inductor compiled, called without Dynamo's guards.

Inductor generates a Python module with a function `call`, and constants: the weights, some of them
prepacked for oneDNN. Dynamo calls it behind guards, one of which recompiles for a batch of one;
here `call` is used directly. The module's source and its constants are cached in a safetensors
file; Inductor's own cache does not support prepacked weights. A cached program is checked against
the model's outputs before it is used.
"""

import contextlib
import hashlib
import itertools
import json
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import keras
import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch._inductor import config, cpu_vec_isa
from torch._inductor.codecache import PyCodeCache
from torch.fx.experimental import _config as symbols

from keras_tnt import kernels
from keras_tnt.files import replacing
from keras_tnt.kernels import cache, processor

# Limits of the cache, in programs and in bytes; the least recently used ones are evicted.
KEPT, KEPT_BYTES = 8, 4 * 2**30
FILES = "torch-*.safetensors"
# Tolerances of `agrees`: maximum absolute difference between program and model, relative to the
# standard deviation of the model's outputs plus 1e-3 of their maximum magnitude.
TOLERANCE, TOLERANCE_OF_HALF = 1e-3, 5e-2


def make(
    model: keras.Model, network: Callable, image_shape: tuple, precision: str, export: Callable
) -> Callable:
    """Compiles or loads a program; see `runtimes.inductor_program` for the arguments."""
    # Inductor fails to prepack int8 weights. It chooses oneDNN for GEMMs of dynamic size, so the
    # batch axis stays dynamic even for a batch of one.
    packed = all(keras.backend.is_float_dtype(weight.dtype) for weight in model.weights)
    if not packed or keras.ops.zeros(()).device.type != "cpu":
        return compile_program(export, packed)[0]
    pixels = 255 * np.random.default_rng(0).random((3, *image_shape))
    images = keras.ops.convert_to_tensor(pixels, model.inputs[0].dtype)
    expected = network(images[:1])
    path = path_of(model, image_shape, precision)
    program = path and find(path, expected)
    if program and agrees(program, images, expected, precision):
        return program
    function, program = compile_program(export, packed, expected)
    if program is None or not agrees(program, images, expected, precision):
        return function
    if path:
        keep(program, path)
    return program


class Program:
    """A program that Inductor generated.

    Args:
        module: the generated module, whose `call` takes a list: the batch size and the images.
        path: path of its source.
        constants: its tensors by name.
        structure: nested structure of the model's outputs.
    """

    def __init__(self, module, path: str, constants: dict, structure):
        """Stores the module and what `keep` needs to cache it."""
        self.module, self.path, self.constants, self.structure = module, path, constants, structure

    def __call__(self, images):
        """Returns the model's outputs for images `(batch, *image_shape)`."""
        outputs = self.module.call([images.shape[0], images.contiguous()])
        return keras.tree.pack_sequence_as(self.structure, list(outputs))


def compile_program(export: Callable, packed: bool, structure=None):
    """Compiles a network for any batch size.

    Args:
        export: function that returns a new function of `torch.compile` and a batch of two images.
        packed: whether to freeze the weights, as prepacked constants of the program.
        structure: nested structure of the outputs. Defaults to `None`: return no `Program`.

    Returns:
        The compiled function, and its `Program`. The latter is `None` without `structure`, or if
        the generated module is not of the expected form.
    """
    function, images = export()
    with (
        config.patch(freezing=packed),
        symbols.patch(backed_size_oblivious=True),
        recording() as written,
    ):
        torch._dynamo.maybe_mark_dynamic(images, 0)  # Do not specialize for the first batch size.
        expected = function(images)
    if structure is None:
        return function, None
    with contextlib.suppress(Exception):  # A module of another form may raise anything.
        ((module, path, constants),) = written
        program = Program(module, path, constants, structure)
        pairs = zip(*map(keras.tree.flatten, (program(images), expected)), strict=True)
        if all(torch.equal(found, wanted) for found, wanted in pairs):
            return function, program
    return function, None


@contextlib.contextmanager
def recording() -> Iterator[list]:
    """Returns a context that records the modules Inductor loads, their paths and constants."""
    written, load = [], PyCodeCache.__dict__["load_by_key_path"]

    def record(cls, key, path, linemap=None, attrs=None):
        module = load.__func__(cls, key, path, linemap, attrs)
        written.append((module, path, dict(attrs or {})))
        return module

    PyCodeCache.load_by_key_path = classmethod(record)
    try:
        yield written
    finally:
        PyCodeCache.load_by_key_path = load


def path_of(model: keras.Model, image_shape: tuple, precision: str) -> str | None:
    """Returns the cache path of a model's program, or `None` if the model cannot be identified.

    The file name is a hash of the model's config and weights, versions, CPU features, number of
    threads, settings of Inductor and this package's sources.

    Args:
        model: a Keras model.
        image_shape: shape of an image, without the batch axis.
        precision: dtype of the matrix products.
    """
    instructions = sorted(processor.features())
    if not instructions:
        return None
    try:
        network = model.to_json()
    except Exception:  # A user's layer may raise anything.
        return None
    sources = [*kernels.FOLDER.glob("*"), *(kernels.FOLDER.parent / "layers").glob("*.py")]
    environment = {k: v for k, v in os.environ.items() if k.startswith("TORCHINDUCTOR_")}
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)  # Inductor itself sets it.
    settings = {
        "releases": [torch.__version__, keras.__version__],
        "machine": [platform.machine(), *instructions, torch.get_num_threads()],
        "environment": sorted(environment.items()),
        "compiler": os.environ.get("CXX"),
        "images": [image_shape, precision, keras.config.floatx()],
        "sources": [path.read_text("utf-8") for path in sorted(sources) if path.is_file()],
    }
    digest = hashlib.sha256(json.dumps([network, settings]).encode())
    for variable in model.weights:  # without the states of seed generators
        digest.update(np.ascontiguousarray(keras.ops.convert_to_numpy(variable)).view("uint8"))
    name = FILES.replace("*", digest.hexdigest()[:32])
    return os.path.join(kernels.cache_folder(), name)


def keep(program: Program, path: str) -> None:
    """Writes a program to the cache, if possible, and evicts the least recently used ones."""
    with contextlib.suppress(Exception):  # The cache is not writable, or a tensor not supported.
        tensors, layouts = {}, {}
        for name, tensor in program.constants.items():
            plain = tensor.to_dense() if tensor.is_mkldnn else tensor
            layouts[name] = [tensor.is_mkldnn, list(plain.shape), list(plain.stride())]
            for axis, stride in enumerate(plain.stride()):
                plain = plain if stride else plain.narrow(axis, 0, 1)  # Undo broadcasting.
            tensors[name] = plain.clone(memory_format=torch.contiguous_format)
        source = Path(program.path).read_text("utf-8")
        metadata = {"source": source, "layouts": json.dumps(layouts)}
        metadata["instructions"] = json.dumps(instructions_that_work())
        metadata["sha256"] = checksum(metadata, tensors)
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata)
        found = filter(cache.is_regular, Path(path).parent.glob(FILES))
        found = sorted(found, key=os.path.getmtime, reverse=True)
        sizes = itertools.accumulate(each.stat().st_size for each in found)
        for place, (each, so_far) in enumerate(zip(found, sizes, strict=True)):
            if place >= KEPT or so_far > KEPT_BYTES:
                each.unlink()


def find(path: str, structure) -> Program | None:
    """Loads a cached program, or returns `None` if it is missing, damaged or incompatible."""
    with contextlib.suppress(Exception):  # A damaged file may raise anything.
        if not cache.is_regular(path):  # Opening a FIFO would block.
            return None
        with safe_open(path, "pt") as file:
            told = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if checksum(told, tensors) != told["sha256"]:
            return None
        layouts = json.loads(told["layouts"])
        constants = {name: unpacked(tensors[name], *layouts[name]) for name in layouts}
        key, source_path = PyCodeCache.write(told["source"])
        take_for_working(json.loads(told["instructions"]))
        module = PyCodeCache.load_by_key_path(key, source_path, attrs=constants)
        os.utime(path)
        return Program(module, source_path, constants, structure)


def instructions_that_work() -> list[str]:
    """Returns the vector ISAs that Inductor's probe found to work, the best first."""
    return [str(kind) for kind in cpu_vec_isa.valid_vec_isa_list()]


def take_for_working(instructions: list[str]) -> None:
    """Seeds Inductor's probe of vector ISAs with a cached result, which saves about a second.

    Args:
        instructions: the result of `instructions_that_work` in another process, on a CPU with the
            same features.
    """
    with config.patch({"cpp.vec_isa_ok": True}):
        if instructions_that_work() != instructions:
            cpu_vec_isa.valid_vec_isa_list.cache_clear()


def unpacked(tensor, packed, shape, strides):
    """Restores a constant's shape and strides, and prepacks it for oneDNN if it was packed."""
    laid_out = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype)
    tensor = laid_out.copy_(tensor).expand(shape)
    return torch.ops.mkldnn._reorder_linear_weight(tensor) if packed else tensor


def agrees(program: Callable, images, expected, precision: str) -> bool:
    """Returns whether a program's outputs match the model's, for a batch of one and of several.

    Args:
        program: the program to check.
        images: a batch of images, `(batch, *image_shape)`.
        expected: the model's outputs for the first image.
        precision: dtype of the matrix products, which determines the tolerance.
    """
    tolerance = TOLERANCE if precision in ("float32", "float64") else TOLERANCE_OF_HALF
    with contextlib.suppress(Exception):  # A program that does not fit may raise anything.
        for given in (images[:1], images):
            pairs = zip(*map(keras.tree.flatten, (program(given), expected)), strict=True)
            for found, wanted in pairs:
                apart = (found[:1] - wanted).abs().max()
                spread = wanted.float().std(correction=0) + 1e-3 * wanted.abs().max()
                if not apart <= tolerance * spread:
                    return False
        return True
    return False


def checksum(told: dict, tensors: dict) -> str:
    """Returns the SHA-256 of a file's metadata and of its tensors, names, dtypes and shapes."""
    digest = hashlib.sha256()
    for name in ("source", "layouts", "instructions"):
        digest.update(json.dumps([name, told[name]]).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
