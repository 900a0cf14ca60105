"""Seconds from a fresh process to its first prediction, by runtime, without caches and with them.

    python benchmarks/cold_start.py
    python benchmarks/cold_start.py --models=TNTSmall --runtimes=jax,onnxruntime --rounds=3

Each measurement is a process of its own with an empty folder of caches, then --rounds with what the
first left there: C++ libraries, JAX's programs and what Inductor keeps. A process starts Python,
imports, builds the model or opens the file, and predicts one image. Files are written before.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = ("tensorflow", "jax", "torch")
FILES = ("onnxruntime", "openvino")
MODEL = """
import keras
import numpy as np
import keras_tnt
keras.utils.set_random_seed(0)  # programs of torch are found by their weights
model = keras_tnt.create_model({model!r}, weights=None)
predict = keras_tnt.compile_inference(model)
predict(np.zeros((1, *model.input_shape[1:]), "float32"))
"""
FILE = """
import numpy as np
import keras_tnt
images = np.zeros((1, *{shape}), "float32")
"""
CODE = {
    **dict.fromkeys(BACKENDS, MODEL),
    "onnxruntime": FILE
    + 'keras_tnt.export.onnx_session({path!r}).run(["logits"], {{"images": images}})',
    "openvino": FILE + "keras_tnt.export.openvino_session({path!r})(images)",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="TNTSmall,DeiTSmall")
    parser.add_argument("--runtimes", default=",".join(CODE))
    parser.add_argument("--rounds", type=int, default=3, help="with caches")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/cold_start.json")
    options = parser.parse_args()
    runtimes = options.runtimes.split(",")
    if unknown := set(runtimes) - set(CODE):
        parser.error(f"{', '.join(unknown)}: there are {', '.join(CODE)}")

    print("| model | | no caches, s | with caches, s |\n|---|---|---|---|")
    rows = []
    for model in options.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            file = export(model, folder) if set(runtimes) & set(FILES) else {}
            for runtime in runtimes:
                code = CODE[runtime].format(model=model, **file)
                caches = os.path.join(folder, runtime)
                first, *later = [seconds(runtime, code, caches) for _ in range(options.rounds + 1)]
                rows.append({"model": model, "runtime": runtime, "first": first, "later": later})
                print(
                    f"| {model} | {runtime} | {first:.1f} | {statistics.median(later):.1f} "
                    f"({min(later):.1f} to {max(later):.1f}) |",
                    flush=True,
                )
    sys.path.insert(0, str(ROOT))
    from keras_tnt.files import write_atomically

    write_atomically(options.out, json.dumps({"rows": rows}, indent=1) + "\n")
    print(f"\n{options.out}")


def export(model, folder):
    """Write a model's ONNX file; returns what the code that opens it is told."""
    path = os.path.join(folder, "model.onnx")
    code = f"""
import json, keras_tnt
model = keras_tnt.create_model({model!r}, weights=None)
keras_tnt.export.onnx(model, {path!r}, opset=23)
print(json.dumps(model.input_shape[1:]))
"""
    output = subprocess.run(
        [sys.executable, "-c", code],
        env=environment("tensorflow"),
        check=True,
        stdout=-1,
        text=True,
    ).stdout
    return {"path": path, "shape": tuple(json.loads(output.splitlines()[-1]))}


def seconds(runtime, code, caches):
    settings = {
        **environment(runtime),
        "XDG_CACHE_HOME": caches,
        "TORCHINDUCTOR_CACHE_DIR": os.path.join(caches, "inductor"),
    }
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", code], env=settings, check=True, stdout=subprocess.DEVNULL
    )
    return time.perf_counter() - start


def environment(runtime):
    """Of a process: a file needs no backend, and Keras's on NumPy starts the quickest."""
    return {
        **os.environ,
        "KERAS_BACKEND": runtime if runtime in BACKENDS else "numpy",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }


if __name__ == "__main__":
    main()
