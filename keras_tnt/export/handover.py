"""Subprocesses on the TensorFlow backend, for work that other backends cannot do."""

import json
import os
import subprocess
import sys
import threading
import time

import keras
import numpy as np

from keras_tnt.export import files
from keras_tnt.export.network import all_layers
from keras_tnt.export.verification import Example
from keras_tnt.files import check_space, scratch, telling_of_a_full_disk

# Errors that are passed back to the calling process; any other ends the new process.
ERRORS = (RuntimeError, ValueError, OSError, ImportError)


def in_tensorflow(function, network, references, arguments, directory):
    """Calls a function of this package in a new process with Keras on TensorFlow.

    Args:
        function: "module:name" of a function of (network, references, **arguments).
        network: a `serving_network`.
        references: lists of `Example`, by kind.
        arguments: JSON-serializable keyword arguments.
        directory: output directory. The data for the process is stored there temporarily.

    Returns:
        The function's result.

    Raises:
        RuntimeError: if the process fails. Errors of the types in `ERRORS` are raised here with
            their own type.
    """
    check_space(directory, 2 * files.size_of(network), "The export")
    with telling_of_a_full_disk(directory, files.WHAT), scratch(directory) as folder:
        network.save(os.path.join(folder, "network.keras"))
        kinds = {
            kind: [save_example(folder, f"{kind}-{i}", e) for i, e in enumerate(examples)]
            for kind, examples in references.items()
        }
        modules = {type(layer).__module__.split(".")[0] for layer in all_layers(network)}
        task = {
            "function": function,
            "arguments": arguments,
            "examples": kinds,
            "data_format": keras.config.image_data_format(),
            "modules": sorted(modules - {"keras", "keras_tnt", "__main__", "builtins"}),
            "path": [os.path.abspath(entry or ".") for entry in sys.path],
        }
        write_json(os.path.join(folder, "task.json"), task)
        # The calling process may hold the GPU's memory.
        environment = {**os.environ, "KERAS_BACKEND": "tensorflow", "CUDA_VISIBLE_DEVICES": "-1"}
        environment.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        environment["PYTHONPATH"] = os.pathsep.join(task["path"])
        environment["TMPDIR"] = folder
        finished = subprocess.run(
            [sys.executable, "-c", f"from {__name__} import main; main()", folder],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        result = os.path.join(folder, "result.json")
        if finished.returncode or not os.path.isfile(result):
            raise RuntimeError(
                "The export failed in its TensorFlow process:\n" + finished.stderr[-3000:]
            )
        with open(result, encoding="utf-8") as file:
            answer = json.load(file)
    if "error" in answer:
        kinds = {kind.__name__: kind for kind in ERRORS}
        raise kinds[answer["error"]](*answer["arguments"])
    return answer["result"]


def main():
    """Runs the task in the folder that is named on the command line, in the new process."""
    import importlib

    folder = sys.argv[1]
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    with open(os.path.join(folder, "task.json"), encoding="utf-8") as file:
        task = json.load(file)
    keras.config.set_image_data_format(task["data_format"])
    for module in task["modules"]:
        importlib.import_module(module)
    network = keras.saving.load_model(os.path.join(folder, "network.keras"), compile=False)
    references = {
        kind: [load_example(folder, *saved) for saved in examples]
        for kind, examples in task["examples"].items()
    }
    module, _, name = task["function"].partition(":")
    function = getattr(importlib.import_module(module), name)
    try:
        answer = {"result": function(network, references, **task["arguments"])}
    except ERRORS as error:
        kind = next(kind.__name__ for kind in ERRORS if isinstance(error, kind))
        answer = {"error": kind, "arguments": [str(error)]}
        if getattr(error, "errno", None):
            answer["arguments"] = [error.errno, error.strerror, error.filename]
    write_json(os.path.join(folder, "result.json"), answer)


def end_with(parent):
    """Exits this process as soon as its parent process is gone."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def save_example(folder, name, example):
    """Saves an example, and returns the arguments that `load_example` needs after `folder`."""
    np.savez(os.path.join(folder, f"{name}.npz"), images=example.images, **example.outputs)
    for number, picture in enumerate(example.pictures):
        with open(os.path.join(folder, f"{name}-picture-{number}"), "wb") as file:
            file.write(picture)
    return name, len(example.pictures)


def load_example(folder, name, pictures):
    """Loads an `Example` saved by `save_example`."""
    arrays = dict(np.load(os.path.join(folder, f"{name}.npz")))
    encoded = []
    for number in range(pictures):
        with open(os.path.join(folder, f"{name}-picture-{number}"), "rb") as file:
            encoded.append(file.read())
    return Example(arrays.pop("images"), arrays, tuple(encoded))


def write_json(path, value):
    """Writes a value as JSON in UTF-8."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file)
