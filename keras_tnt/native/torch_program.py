"""Inductor's programs for a CPU, called as they are and kept between processes.

What Inductor writes is a Python module with a function `call`, and tensors that the module holds:
the weights, some of them packed for oneDNN. Dynamo calls it behind guards, of which one compiles
another program for a single image. Here it is called without them, and kept as the module's source
and its tensors, which its own cache does not do with packed ones. What is found is tried against
the model before it is used.
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

from keras_tnt import native
from keras_tnt.files import replacing
from keras_tnt.native import cache, processor

# So many programs and bytes of them at once; those used longest ago make room.
KEPT, KEPT_BYTES = 8, 4 * 2**30
FILES = "torch-*.safetensors"
# By how much of the spread a program may differ from the model.
TOLERANCE, TOLERANCE_OF_HALF = 1e-3, 5e-2


def make(
    model: keras.Model, network: Callable, image_shape: tuple, precision: str, export: Callable
) -> Callable:
    """What `runtimes.inductor_program` describes."""
    # Inductor fails to pack int8, and chooses oneDNN for products of an unknown size: so even a
    # batch of one stays unknown.
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
    """What Inductor wrote.

    Args:
        module: that has `call`, a function of a list: the batch's size and the images.
        path: of its source.
        constants: its tensors by name.
        structure: of the model's outputs.
    """

    def __init__(self, module, path: str, constants: dict, structure):
        self.module, self.path, self.constants, self.structure = module, path, constants, structure

    def __call__(self, images):
        outputs = self.module.call([images.shape[0], images.contiguous()])
        return keras.tree.pack_sequence_as(self.structure, list(outputs))


def compile_program(export: Callable, packed: bool, structure=None):
    """Compile for batches of any size.

    Args:
        export: gives a function of `torch.compile`, not called before, and a batch of two images.
        packed: whether to pack the weights, as constants of the program.
        structure: of the outputs, with anything as leaves, where a `Program` is wanted.

    Returns:
        The function, compiled, and what Inductor wrote for it as a `Program`: None where none is
        wanted, or Inductor's module is not as it is known here.
    """
    function, images = export()
    with (
        config.patch(freezing=packed),
        symbols.patch(backed_size_oblivious=True),
        recording() as written,
    ):
        torch._dynamo.maybe_mark_dynamic(images, 0)  # to the program, whatever batch comes first
        expected = function(images)
    if structure is None:
        return function, None
    with contextlib.suppress(Exception):  # of whatever kind another module raises
        ((module, path, constants),) = written
        program = Program(module, path, constants, structure)
        pairs = zip(*map(keras.tree.flatten, (program(images), expected)), strict=True)
        if all(torch.equal(found, wanted) for found, wanted in pairs):
            return function, program
    return function, None


@contextlib.contextmanager
def recording() -> Iterator[list]:
    """Within the context, what Inductor writes is noted: modules, their paths and constants."""
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
    """Where the program of a model with its weights is kept; None if it cannot be told apart."""
    instructions = sorted(processor.features())
    if not instructions:
        return None
    try:
        network = model.to_json()
    except Exception:  # of whatever kind a user's layer raises
        return None
    sources = [*native.FOLDER.glob("*"), *(native.FOLDER.parent / "layers").glob("*.py")]
    environment = {k: v for k, v in os.environ.items() if k.startswith("TORCHINDUCTOR_")}
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)  # which Inductor itself sets
    settings = {
        "releases": [torch.__version__, keras.__version__],
        "machine": [platform.machine(), *instructions, torch.get_num_threads()],
        "environment": sorted(environment.items()),
        "compiler": os.environ.get("CXX"),
        "images": [image_shape, precision, keras.config.floatx()],
        "sources": [path.read_text("utf-8") for path in sorted(sources) if path.is_file()],
    }
    digest = hashlib.sha256(json.dumps([network, settings]).encode())
    for variable in model.weights:  # and not the states of random layers
        digest.update(np.ascontiguousarray(keras.ops.convert_to_numpy(variable)).view("uint8"))
    name = FILES.replace("*", digest.hexdigest()[:32])
    return os.path.join(native.cache_folder(), name)


def keep(program: Program, path: str) -> None:
    """Write a program, unless it cannot be kept."""
    with contextlib.suppress(Exception):  # no place for it, or tensors of other kinds
        tensors, layouts = {}, {}
        for name, tensor in program.constants.items():
            plain = tensor.to_dense() if tensor.is_mkldnn else tensor
            layouts[name] = [tensor.is_mkldnn, list(plain.shape), list(plain.stride())]
            for axis, stride in enumerate(plain.stride()):
                plain = plain if stride else plain.narrow(axis, 0, 1)  # the rest repeats it
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
    """The program that another process kept, if there is one and it is whole."""
    with contextlib.suppress(Exception):  # damaged, or not taken any more
        if not cache.is_regular(path):  # a FIFO would be waited for
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
    """The kinds of vectors that Inductor can compile for, the best first."""
    return [str(kind) for kind in cpu_vec_isa.valid_vec_isa_list()]


def take_for_working(instructions: list[str]) -> None:
    """Spare Inductor a second of processes that try what another process found to work.

    Args:
        instructions: what `instructions_that_work` gave that process, on a processor of the same.
    """
    with config.patch({"cpp.vec_isa_ok": True}):
        if instructions_that_work() != instructions:
            cpu_vec_isa.valid_vec_isa_list.cache_clear()


def unpacked(tensor, packed, shape, strides):
    """A tensor of the strides that the program takes it to have, packed for oneDNN if it was."""
    laid_out = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype)
    tensor = laid_out.copy_(tensor).expand(shape)
    return torch.ops.mkldnn._reorder_linear_weight(tensor) if packed else tensor


def agrees(program: Callable, images, expected, precision: str) -> bool:
    """Whether a program predicts for the first of some images, alone and among all, what it should.

    Args:
        program: to be tried.
        images: of any contents.
        expected: what the model predicts for the first.
        precision: in which the program multiplies.
    """
    tolerance = TOLERANCE if precision in ("float32", "float64") else TOLERANCE_OF_HALF
    with contextlib.suppress(Exception):  # of whatever kind a program raises that does not fit
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
    """Of what a file holds: its metadata, and its tensors with their names, types and shapes."""
    digest = hashlib.sha256()
    for name in ("source", "layouts", "instructions"):
        digest.update(json.dumps([name, told[name]]).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
