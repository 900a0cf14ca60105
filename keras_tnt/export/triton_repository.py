"""Export to a Triton model repository; MLServer can serve the model for encoded images, too."""

import errno
import json
import os
import re
import shutil
import struct
from pathlib import Path

import keras
import numpy as np

from keras_tnt.export import files
from keras_tnt.export.card import describe
from keras_tnt.export.network import serving_network
from keras_tnt.export.onnx_file import SIGNATURES, TOLERANCES, onnx
from keras_tnt.export.pictures import TOP, PictureModel
from keras_tnt.export.requirements import require
from keras_tnt.export.triton_config import configuration
from keras_tnt.export.verification import draw_picture, picture_examples, verify, verify_names
from keras_tnt.files import check_space, flush_to_disk, scratch, telling_of_a_full_disk

PACKAGE = Path(__file__).parent.parent
SERVERS = PACKAGE / "export" / "servers"
# Modules that a server runs, which do not import Keras. They are copied into each version.
RUNTIME = (
    "files.py", "images/decoding.py", "kernels", "export/onnx_blocks.py", "export/onnx_runtime.py",
    "export/pictures.py", "export/requirements.py",
)  # fmt: skip
COMPILED = shutil.ignore_patterns("__pycache__")
# Metadata that all versions of a model must share, for clients and for `config.pbtxt`.
INTERFACE = ("labels", "image_size", "channels", "data_format", "input", "outputs")


def triton(
    model: keras.Model,
    repository: str | os.PathLike,
    version: int | None = None,
    labels: list[str] | None = None,
    *,
    name: str | None = None,
    opset: int | None = None,
    precision: str = "float32",
    weights: str | None = None,
    max_batch_size: int | None = None,
    max_queue_delay: float | None = None,
    instances: int | None = None,
) -> str:
    """Exports a model into a Triton model repository, and verifies what was written.

    Writes two models, each with `config.pbtxt`, `labels.txt`, warm-up requests and a folder for
    each version:

    - `<name>`, for the ONNX Runtime backend: `images`, float32, as the model takes them, to
      `probabilities` and `logits`.
    - `<name>_bytes`, for the Python backend: `image_bytes`, encoded images of any size, through the
      evaluation transform of `keras_tnt.load_image` to `classes` and `scores` of the best five, and
      `probabilities`. It runs in `onnx_session`, and contains the modules of this package that it
      needs; the server's Python needs NumPy, Pillow, ONNX and ONNX Runtime. Each version contains
      a `model-settings.json`, with which MLServer can serve it, too.

    For a model without a classifier, both return `features`. If it takes other than 1 or 3
    channels, there is no model for encoded images.

    `max_batch_size`, `max_queue_delay` and `instances` are stored in `config.pbtxt`, which later
    versions leave unchanged.

    Args:
        model: a functional model of this package, or one built around it.
        repository: the server's `--model-repository`. It is created if it does not exist.
        version: version number, a positive integer that neither model has yet. Defaults to the
            next free number.
        labels: class names. Defaults to the model's own names, or numbers if it has none.
        name: name of the model on the server. Defaults to `model.name`.
        opset: opset of the ONNX file, as in `keras_tnt.export.onnx`. Defaults to 18.
        precision: precision of the ONNX file, as in `keras_tnt.export.onnx`. Defaults to
            `"float32"`.
        weights: description of the weights' origin, for the metadata. Defaults to None.
        max_batch_size: largest batch that the server computes. Defaults to 8.
        max_queue_delay: seconds that a request waits for others to be batched with. Defaults to
            0.001.
        instances: number of model instances that run in parallel. Defaults to 1.

    Returns:
        The repository's absolute path.

    Raises:
        ValueError: if the model or an argument is not supported, or the repository contains
            another model of this name.
        FileExistsError: if the version exists.
        NotADirectoryError: if `repository` is a file.
        OSError: if the disk is full. No version is left behind.
        RuntimeError: if the outputs differ from the model's. No version is left behind.

    Example:
        >>> keras_tnt.export.triton(model, "repository")
    """
    require("tensorflow", "tf2onnx", "onnx", "onnxruntime", "PIL")
    repository = os.path.abspath(os.path.expanduser(os.fspath(repository)))
    files.check_directory(repository)
    network = serving_network(model)
    card = describe(model, network, labels, weights)
    settings = checked_settings(max_batch_size, max_queue_delay, instances)
    parts = models_of(model.name if name is None else name, network, card)
    check_repository(repository)
    for part in parts:
        part.check(repository, version, settings)
    needed = len(parts) * files.size_of(network)
    check_space(repository, needed, "The export")

    os.makedirs(repository, exist_ok=True)
    with telling_of_a_full_disk(repository, files.WHAT), scratch(beside(repository)) as aside:
        for part in parts:
            part.write_home(aside, settings)
        path = onnx(
            model, os.path.join(parts[0].version, "model.onnx"), opset, precision=precision,
            labels=labels, weights=weights,
        )  # fmt: skip
        for part in parts[1:]:
            shutil.copy(path, part.version)
            part.write_runtime()
            check_pictures(part, picture_examples(model, network, card), precision)
        publish(parts, repository, version)
    return repository


def checked_settings(max_batch_size, max_queue_delay, instances):
    """Returns the settings of `config.pbtxt` that were given, after checking them."""
    for name, value in (("max_batch_size", max_batch_size), ("instances", instances)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"`{name}` must be a positive integer or None. Received: {value!r}")
    if max_queue_delay is not None and not 0 <= max_queue_delay <= 60:
        raise ValueError(
            f"`max_queue_delay` must lie in 0 to 60 seconds. Received: {max_queue_delay!r}"
        )
    given = {
        "max_batch_size": max_batch_size,
        "max_queue_delay": max_queue_delay,
        "instances": instances,
    }
    return {name: value for name, value in given.items() if value is not None}


def models_of(name, network, card):
    """Returns the `Part`s of a model: one for arrays and, if possible, one for encoded images."""
    if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII):
        raise ValueError(
            "A model's name in a repository is letters, digits and any of `_.-`. Received: "
            f"{name!r}. Say another `name`."
        )
    shapes = {key: dims_of(tensor) for key, tensor in network.output.items()}
    outputs = [key for key in SIGNATURES["images"] if key in shapes] or ["features"]
    images = {"images": ("TYPE_FP32", dims_of(network.inputs[0]))}
    floats = {key: ("TYPE_FP32", shapes[key]) for key in outputs}
    parts = [Part(name, "onnxruntime", images, floats, card)]
    if card["channels"] in (1, 3):
        floats = {outputs[0]: floats[outputs[0]]}
        if card["labels"]:
            best = (min(TOP, len(card["labels"])),)
            floats |= {"classes": ("TYPE_STRING", best), "scores": ("TYPE_FP32", best)}
        pictures = {"image_bytes": ("TYPE_STRING", (1,))}
        parts.append(Part(f"{name}_bytes", "python", pictures, floats, card))
    return parts


def dims_of(tensor):
    """Returns a tensor's shape without the batch axis; -1 for an unknown size."""
    return tuple(-1 if size is None else size for size in tensor.shape[1:])


class Part:
    """One of the Triton models to which a Keras model is exported.

    Args:
        name: name on the server.
        backend: Triton backend that runs it.
        inputs: (type, shape without the batch axis) by name.
        outputs: (type, shape without the batch axis) by name.
        card: metadata as returned by `describe`.
    """

    def __init__(self, name, backend, inputs, outputs, card):
        """Adds the computed outputs and their shapes to the metadata."""
        self.name, self.backend, self.inputs, self.outputs = name, backend, inputs, outputs
        computed = [key for key in outputs if key not in ("classes", "scores")]
        self.card = {**card, "outputs": {key: list(outputs[key][1]) for key in computed}}

    def check(self, repository, version, settings):
        """Raises an error if a repository cannot take a new version of this model."""
        self.home = os.path.join(repository, self.name)
        files.check_directory(self.home, version)
        if not os.path.isdir(self.home):
            return
        found = card_in(self.home)
        differ = [key for key in INTERFACE if found.get(key) != self.card[key]]
        if differ:
            raise ValueError(
                f"'{self.home}' holds another model: {told(differ[0], found)} instead of "
                f"{told(differ[0], self.card)}. Say another `name`, or another `repository`."
            )
        if settings:
            with open(os.path.join(self.home, "config.pbtxt"), encoding="utf-8") as file:
                if file.read() != self.configuration(settings):
                    raise ValueError(
                        f"'{self.home}/config.pbtxt' exists, and holds for every version. Edit it, "
                        f"and leave `{next(iter(settings))}` out."
                    )

    def configuration(self, settings):
        """Returns the text of `config.pbtxt`."""
        return configuration(
            self.name,
            self.backend,
            self.inputs,
            self.outputs,
            bool(self.card["labels"]),
            **settings,
        )

    def write_home(self, aside, settings):
        """Writes the model's directory into a folder, with the metadata alone in its version."""
        self.aside = os.path.join(aside, self.name)
        self.version = os.path.join(self.aside, "version")
        os.makedirs(self.version)
        write(os.path.join(self.aside, "config.pbtxt"), self.configuration(settings))
        if self.card["labels"]:
            lines = "".join(f"{label}\n" for label in self.card["labels"])
            write(os.path.join(self.aside, "labels.txt"), lines)
        if "image_bytes" in self.inputs:
            picture = draw_picture(0)
            os.makedirs(os.path.join(self.aside, "warmup"))
            write(
                os.path.join(self.aside, "warmup", "picture"),
                struct.pack("<I", len(picture)) + picture,
            )
        write(os.path.join(self.version, "model.json"), json.dumps(self.card, indent=1))

    def write_runtime(self):
        """Copies the modules that a server's Python runs into the version."""
        version, package = Path(self.version), Path(self.version) / PACKAGE.name
        shutil.copytree(SERVERS, version, ignore=COMPILED, dirs_exist_ok=True)
        for folder in (package, package / "export", package / "images"):
            folder.mkdir()
            (folder / "__init__.py").touch()
        for name in RUNTIME:
            if (PACKAGE / name).is_dir():
                shutil.copytree(PACKAGE / name, package / name, ignore=COMPILED)
            else:
                shutil.copy(PACKAGE / name, package / name)
        # A file of this name prevents Python from caching bytecode there: Triton reloads a version
        # when a file is written into it.
        for folder in {path.parent for path in version.rglob("*.py")}:
            (folder / "__pycache__").touch()

    def number(self, number):
        """Writes the `model-settings.json` of the Python backend's version, with its number."""
        if self.backend == "python":
            kinds = {"TYPE_FP32": "FP32", "TYPE_STRING": "BYTES"}
            ends = {
                end: [
                    {"name": name, "datatype": kinds[kind], "shape": [-1, *shape]}
                    for name, (kind, shape) in tensors.items()
                ]
                for end, tensors in (("inputs", self.inputs), ("outputs", self.outputs))
            }
            settings = {
                "name": self.name,
                "implementation": "mlserver_runtime.PictureRuntime",
                "parameters": {"uri": ".", "version": str(number)},
                **ends,
            }
            path = os.path.join(self.version, "model-settings.json")
            write(path, json.dumps(settings, indent=1))

    def move(self, number):
        """Moves the version, or the whole directory of a new model, into the repository."""
        if os.path.isdir(self.home):
            os.rename(self.version, os.path.join(self.home, str(number)))
            flush_to_disk(self.home)
        else:
            numbered = os.path.join(self.aside, str(number))
            os.rename(self.version, numbered)
            self.version = numbered
            os.rename(self.aside, self.home)
            flush_to_disk(os.path.dirname(self.home))


def write(path, data):
    """Writes bytes, or text in UTF-8, to a file."""
    with open(path, "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)


def check_repository(repository):
    """Raises an error for a folder that is the directory of a model, and not a repository."""
    inside = os.listdir(repository) if os.path.isdir(repository) else []
    own = [name for name in inside if name == "config.pbtxt" or name.isdigit()]
    if own:
        raise ValueError(
            f"'{repository}' is the directory of one model, for it holds {own[0]}. A repository "
            "holds such directories: say another path."
        )


def card_in(home):
    """Returns the metadata of the last version in a model's directory.

    Raises:
        ValueError: if the directory was not written by this package.
    """
    for version in reversed(files.versions(home)):
        try:
            with open(os.path.join(home, str(version), "model.json"), encoding="utf-8") as file:
                card = json.load(file)
            if isinstance(card, dict) and os.path.isfile(os.path.join(home, "config.pbtxt")):
                return card
        except (OSError, ValueError):
            continue
    raise ValueError(
        f"'{home}' holds another model, not exported by keras_tnt. Say another `name`, or another "
        "`repository`."
    )


def told(key, card):
    """Returns a value of the metadata in words, for error messages."""
    value = card.get(key)
    if key == "labels" and value:
        return f"{len(value)} classes, '{value[0]}' to '{value[-1]}',"
    return f"{key} {json.dumps(value)}"


def beside(repository):
    """Returns the directory to write to before versions are moved into a repository.

    This is the parent directory, because servers take every folder in a repository for a model. If
    the parent is on another disk or not writable, it is the repository.
    """
    parent = os.path.dirname(repository)
    on_the_same_disk = os.stat(parent).st_dev == os.stat(repository).st_dev
    return parent if on_the_same_disk and os.access(parent, os.W_OK) else repository


def check_pictures(part, examples, precision):
    """Raises a RuntimeError if the written model for encoded images differs from the model."""
    what = "The model for encoded images"
    written = PictureModel(part.version)
    for example in examples:
        images = written.read(list(example.pictures))
        if not np.allclose(images, example.images, atol=1e-3):
            raise RuntimeError(f"{what} does not read images as load_image. Nothing was kept.")
        outputs = written.run(images)
        names = [outputs.pop(name, None) for name in ("classes", "scores")]
        verify(outputs, example, what, TOLERANCES[precision])
        if precision == "float32" and part.card["labels"]:
            verify_names(*names, example, part.card["labels"], what)


def publish(parts, repository, version):
    """Moves a version of each part into place, all with the same number."""
    for part in parts:
        for folder, _, names in os.walk(part.aside, topdown=False):
            for name in (*names, ""):
                flush_to_disk(os.path.join(folder, name))
    while True:
        number = version or 1 + max(max(files.versions(p.home), default=0) for p in parts)
        for part in parts:
            part.number(number)
        try:
            for part in parts:
                part.move(number)
            return
        except OSError as error:
            # A concurrent export took the number before the first part was moved.
            raced = error.errno in (errno.ENOTEMPTY, errno.EEXIST) and part is parts[0]
            if not raced or version is not None:
                raise
