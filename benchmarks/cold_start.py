"""Measures seconds from process start to the first prediction, without and with caches.

    python benchmarks/cold_start.py
    python benchmarks/cold_start.py --models=TNTSmall --runtimes=jax,onnxruntime --rounds=3

Each measurement is a separate process. The first has an empty cache directory, and --rounds more
processes use what it cached: C++ libraries, and compiled programs of JAX and torch. A process
starts Python, imports, builds the model with weights from a file or opens an exported file, and
predicts one image; its shutdown does not count. The files are written before the measurement.
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
import numpy as np
import keras_tnt
model = keras_tnt.create_model({model!r}, weights={weights!r})
predict = keras_tnt.compile_inference(model)
predict(np.zeros((1, *model.input_shape[1:]), "float32"))
print("predicted", flush=True)
"""
FILE = """
import numpy as np
import keras_tnt
images = np.zeros((1, *{shape}), "float32")
{predict}
print("predicted", flush=True)
"""
PREDICT = {
    "onnxruntime": 'keras_tnt.export.onnx_session({path!r}).run(["logits"], {{"images": images}})',
    "openvino": "keras_tnt.export.openvino_session({path!r})(images)",
}


def main():
    """Measures every model on every runtime, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="TNTSmall,DeiTSmall")
    parser.add_argument("--runtimes", default=",".join((*BACKENDS, *FILES)))
    parser.add_argument("--rounds", type=int, default=3, help="with caches")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/cold_start.json")
    options = parser.parse_args()
    runtimes = options.runtimes.split(",")
    if unknown := set(runtimes) - {*BACKENDS, *FILES}:
        parser.error(f"{', '.join(unknown)}: there are {', '.join((*BACKENDS, *FILES))}")

    print("| model | | no caches, s | with caches, s |\n|---|---|---|---|")
    rows = []
    for model in options.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            files = write(model, folder)
            for runtime in runtimes:
                code = MODEL.format(model=model, **files)
                if runtime in FILES:
                    code = FILE.format(predict=PREDICT[runtime].format(**files), **files)
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


def write(model, folder):
    """Writes a model's weights and ONNX file; returns the values for the programs' templates."""
    weights, path = (os.path.join(folder, name) for name in ("model.weights.h5", "model.onnx"))
    code = f"""
import json, keras_tnt
model = keras_tnt.create_model({model!r}, weights=None)
model.save_weights({weights!r})
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
    shape = tuple(json.loads(output.splitlines()[-1]))
    return {"weights": weights, "path": path, "shape": shape}


def seconds(runtime, code, caches):
    """Returns the seconds from the start of a process to the end of its first prediction."""
    settings = {
        **environment(runtime),
        "XDG_CACHE_HOME": caches,
        "TORCHINDUCTOR_CACHE_DIR": os.path.join(caches, "inductor"),
    }
    start = time.perf_counter()
    with subprocess.Popen([sys.executable, "-c", code], env=settings, stdout=-1, text=True) as run:
        said = run.stdout.readline()
        taken = time.perf_counter() - start
    if said != "predicted\n" or run.returncode:
        raise RuntimeError(f"{runtime} ended with status {run.returncode} and said: {said}")
    return taken


def environment(runtime):
    """Returns a process's environment; files use the backend that starts fastest, NumPy."""
    return {
        **os.environ,
        "KERAS_BACKEND": runtime if runtime in BACKENDS else "numpy",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }


if __name__ == "__main__":
    main()
