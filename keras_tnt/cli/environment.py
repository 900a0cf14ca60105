"""Description of the installation: versions, backend and devices."""

import importlib.metadata
import json
import os
import platform
import sys

from keras_tnt import files

# Packages whose presence and version determine the available features.
PACKAGES = ("keras", "numpy", "tensorflow", "jax", "torch", "pillow", "onnxruntime", "openvino")


def describe(devices=True):
    """Returns the description of the installation, as a JSON-serializable dict.

    Args:
        devices: whether to list the backend's devices, which imports it. Defaults to `True`.
    """
    backend = configured_backend()
    found = {
        "version": sys.modules["keras_tnt"].__version__,
        "python": platform.python_version(),
        "backend": " ".join(filter(None, (backend, version_of(backend) or "(not installed)"))),
        "devices": list_devices() if devices else [],
    }
    packages = {name: version_of(name) for name in PACKAGES}
    found["packages"] = {name: version for name, version in packages.items() if version}
    return found


def configured_backend():
    """Returns the backend that Keras will use, without importing Keras."""
    if os.environ.get("KERAS_BACKEND"):
        return os.environ["KERAS_BACKEND"]
    home = os.environ.get("KERAS_HOME") or os.path.join(os.path.expanduser("~"), ".keras")
    try:
        data = files.read_regular(os.path.join(home, "keras.json"), 1 << 20)
        return json.loads(data.decode("utf-8")).get("backend", "tensorflow")
    except (OSError, ValueError, AttributeError, RecursionError):
        return "tensorflow"


def version_of(package):
    """Returns the version of an installed package, or `None`."""
    try:
        return importlib.metadata.version(package)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return None


def list_devices():
    """Returns the names of the devices that Keras's backend finds."""
    import keras

    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        return [
            device.name.removeprefix("/physical_device:")
            for device in tf.config.list_physical_devices()
        ]
    if backend == "jax":
        import jax

        return [f"{device.platform.upper()}:{device.id}" for device in jax.devices()]
    import torch

    names = [f"CUDA:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        names.append("MPS")
    return [*names, "CPU"]


def show_version(options, devices=True):
    """Prints version, backend and devices in one line each, and returns exit status 0."""
    found = describe(devices)
    print(f"keras-tnt {found['version']}")
    print(f"backend: {found['backend']}, keras {found['packages'].get('keras', 'not installed')}")
    if devices:
        print(f"devices: {', '.join(found['devices'])}")
    return 0
