"""Measures images/s of inference and training steps, for keras_tnt on each backend and for timm.

    python benchmarks/speed.py                              # TNT-S and DeiT-S, batch 8, 224x224
    python benchmarks/speed.py --models=tnt_small --modes=training --precision=bfloat16 --batch=256

Every row is a separate process, and the rows take turns, so drift in machine speed affects all rows
equally: compare ratios, not absolute numbers. timm's rows need `pip install --no-deps timm`.
"onnxruntime" is a file of opset 23 in `onnx_session`, "onnxruntime alone" the same file without the
C++ operator, "openvino" the file in `openvino_session`, "timm openvino" timm's ONNX file in
OpenVINO. `--precision=bfloat16` does not apply to ONNX Runtime, which has no bfloat16 GEMM.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

RESULTS = ROOT / "benchmarks" / "results"
BASE = {"batch": 8, "image_size": 224, "depth": 12}
PRECISIONS = ("float32", "bfloat16")
RUNTIMES = {
    "inference": (
        "tensorflow",
        "jax",
        "torch",
        "onnxruntime",
        "onnxruntime alone",
        "openvino",
        "timm",
        "timm onnx",
        "timm openvino",
        "timm compiled",
    ),
    "training": ("tensorflow", "jax", "torch", "timm", "timm compiled"),
}
FILES = ("onnxruntime", "openvino")  # runtimes of exported files
PEER = "timm compiled"
PAUSE = 0.1  # seconds between rows, because the last one's threads spin for a while


class Benchmarked(NamedTuple):
    """Benchmarked model: title, builder in keras_tnt, name in timm, and cost.

    Giga multiply-accumulates of a 224x224 image are from table 1 of arXiv 2103.00112 and table 5 of
    2012.12877.
    """

    title: str
    builder: str
    timm: str
    gmacs: float


MODELS = {
    "tnt_small": Benchmarked("TNT-S", "TNTSmall", "tnt_s_patch16_224", 5.2),
    "deit_small": Benchmarked("DeiT-S", "DeiTSmall", "deit_small_patch16_224", 4.6),
}


def main():
    """Measures every mode, model and installed runtime, and prints a table."""
    options = parse()
    if options.worker:
        return work(**json.loads(options.worker))
    rows = []
    for mode in options.modes:
        tasks = [
            {
                "mode": mode,
                "model": model,
                "runtime": runtime,
                "batch": options.batch,
                "image_size": options.image_size,
                "depth": BASE["depth"],
                "precision": options.precision,
            }
            for model in options.models
            for runtime in RUNTIMES[mode]
            if installed(runtime) and runtime in (options.runtimes or [runtime])
        ]
        rows += race(tasks, options.rounds)
    report(rows, options)


def parse():
    """Returns the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--models", type=words, default=list(MODELS))
    parser.add_argument("--modes", type=words, default=list(RUNTIMES))
    parser.add_argument("--runtimes", type=words, help="leave out the others")
    parser.add_argument("--batch", type=int, default=BASE["batch"])
    parser.add_argument("--image_size", type=int, default=BASE["image_size"])
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS / "speed.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    runtimes = dict.fromkeys(runtime for known in RUNTIMES.values() for runtime in known)
    for given, known in (
        (options.models, MODELS),
        (options.modes, RUNTIMES),
        (options.runtimes or (), runtimes),
    ):
        if unknown := set(given) - set(known):
            parser.error(f"{', '.join(unknown)}: there are {', '.join(known)}")
    return options


# === Measurement: one process per row, one batch each in turn ===


def race(tasks, rounds):
    """Runs each task in a separate process, with batches in turn.

    Returns:
        The tasks that did not fail, each with the seconds of its batches and the values that its
        process reported.
    """
    workers = []
    for task in tasks:
        say(f"{task['mode']}, {task['model']}: preparing {task['runtime']}")
        workers.append(Worker(task))
    workers = [worker for worker in workers if worker.ready]
    for number in range(rounds):
        say(f"round {number + 1}/{rounds}")
        for worker in workers:
            time.sleep(PAUSE)
            worker.seconds.append(worker.ask("run")["seconds"])
    return [
        {**worker.task, **worker.ready, **worker.stop(), "seconds": worker.seconds}
        for worker in workers
    ]


def say(line):
    """Prints progress to standard error."""
    print(line, file=sys.stderr, flush=True)


def installed(runtime):
    """Returns whether the packages of a runtime are installed."""
    modules = [word for word in runtime.split() if word not in ("alone", "onnx", "compiled")]
    return all(map(importlib.util.find_spec, modules))


def title(runtime):
    """Returns the label of a runtime in tables."""
    return runtime if runtime.startswith("timm") else f"ours on {runtime}"


class Worker:
    """Process that prepares a row, and runs a batch for each "run" that it reads."""

    def __init__(self, task):
        """Starts the process, and waits until it is ready; `ready` is `None` if it failed."""
        self.task, self.seconds = task, []
        backend = task["runtime"].split()[0]
        backend = backend if backend in ("tensorflow", "jax", "torch") else "torch"
        if task["runtime"].split()[0] in FILES:
            backend = "tensorflow"
        environment = {
            **os.environ,
            "KERAS_BACKEND": backend,
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", json.dumps(task)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.ready = self.answer()

    def ask(self, word):
        """Sends a command, and returns the answer."""
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        return self.answer()

    def stop(self):
        """Ends the process, and returns its peak memory."""
        answer = self.ask("stop")
        self.process.wait()
        return answer

    def answer(self):
        """Returns the next line of JSON; libraries print other lines."""
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        print(f"  it failed, with status {self.process.wait()}", file=sys.stderr)
        return None


def work(mode, **task):
    """Runs a worker: answers "run" with the seconds of a batch, and "stop" with peak memory."""
    import resource

    import numpy as np

    start = time.perf_counter()
    side = task.pop("image_size")
    shape = (task.pop("batch"), side, side, 3)
    images = np.random.default_rng(0).uniform(0, 255, shape).astype("float32")
    labels = np.random.default_rng(1).integers(0, 1000, len(images))
    prepare = prepare_timm if task["runtime"].startswith("timm") else prepare_ours
    step = prepare(mode=mode, images=images, labels=labels, **task)
    step()
    step()
    print(json.dumps({"ready_seconds": time.perf_counter() - start}), flush=True)
    for line in sys.stdin:
        if line.strip() == "stop":
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(json.dumps({"peak_memory_mib": peak}), flush=True)
            return
        start = time.perf_counter()
        step()
        print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)


def prepare_ours(runtime, model, mode, images, labels, depth, precision):
    """Returns a function that runs one batch of a keras_tnt model."""
    import keras
    import numpy as np

    import keras_tnt

    # On a CPU, `compile_inference` takes the precision of inference.
    compiled = mode == "inference" and "cpu" in str(keras.ops.zeros(()).device).lower()
    dtype = None if precision == "float32" or compiled else f"mixed_{precision}"
    network = keras_tnt.create_model(
        MODELS[model].builder, weights=None, input_shape=images.shape[1:], depth=depth, dtype=dtype
    )
    if mode == "training":
        # The usual setting of Keras users: XLA on TensorFlow and JAX.
        jit = keras.backend.backend() != "torch"
        network.compile(
            keras.optimizers.AdamW(1e-4), "sparse_categorical_crossentropy", jit_compile=jit
        )
        network.optimizer.build(network.trainable_variables)  # as in the trainer
        return lambda: network.train_on_batch(images, labels)
    for variable in network.trainable_variables:
        if variable.name == "bias":  # ONNX export would drop zero biases
            variable.assign(np.random.default_rng(0).normal(scale=0.02, size=variable.shape))
    if runtime.split()[0] in FILES:
        with tempfile.TemporaryDirectory() as folder:
            path = keras_tnt.export.onnx(network, os.path.join(folder, "model.onnx"), opset=23)
            if runtime == "openvino":
                session = keras_tnt.export.openvino_session(path, precision)
                return lambda: session(images)
            if runtime == "onnxruntime alone":
                return onnx_step(path, "images", images)
            session = keras_tnt.export.onnx_session(path)
            return lambda: session.run(None, {"images": images})
    predict = keras_tnt.compile_inference(network, precision=precision if compiled else None)
    return lambda: predict(images)


def onnx_step(path, name, images):
    """Returns a function that runs a batch in ONNX Runtime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=onnxruntime.get_available_providers())
    return lambda: session.run(None, {name: images})


def openvino_step(path, images, precision):
    """Returns a function that runs a batch in OpenVINO."""
    import openvino

    hint = {"float32": "f32", "bfloat16": "bf16"}[precision]
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": hint})
    return lambda: compiled([images])


def prepare_timm(runtime, model, mode, images, labels, depth, precision):
    """Returns a function that runs one batch of a timm model."""
    import torch

    stand_in_for_torchvision()
    import timm

    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = timm.create_model(MODELS[model].timm, img_size=images.shape[1], depth=depth).to(
        device
    )
    with torch.no_grad():
        for name, weights in network.named_parameters():
            if name.endswith("bias"):
                weights.normal_(std=0.02)
    forward = torch.compile(network) if runtime == "timm compiled" else network
    x = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(device) / 127.5 - 1
    y = torch.from_numpy(labels).to(device)
    half = torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16")
    if runtime in ("timm onnx", "timm openvino"):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "model.onnx")
            # The TorchScript exporter, because the other needs onnxscript.
            torch.onnx.export(network.eval(), (x,), path, dynamo=False, input_names=["images"])
            if runtime == "timm openvino":
                return openvino_step(path, x.numpy(), precision)
            return onnx_step(path, "images", x.numpy())
    if mode == "inference":
        network.eval()

        def step():
            with torch.no_grad(), half:
                return forward(x).softmax(-1).cpu()

    else:
        optimizer = torch.optim.AdamW(network.parameters(), 1e-4)

        def step():
            optimizer.zero_grad()
            with half:
                loss = torch.nn.functional.cross_entropy(forward(x), y)
            loss.backward()
            optimizer.step()
            return loss.item()

    return step


def stand_in_for_torchvision():
    """Installs a stub of torchvision, which timm imports for its data pipelines only."""
    if importlib.util.find_spec("torchvision"):
        return
    import types
    from importlib.machinery import ModuleSpec

    class Names(type):
        def __getattr__(cls, name):
            if name.startswith("__"):
                raise AttributeError(name)
            return f"{cls.__name__}.{name}"

    class StandIn(types.ModuleType):
        def __getattr__(self, name):
            if name.startswith("__"):
                raise AttributeError(name)
            return Names(name, (), {})

    for path in (
        "torchvision",
        *(f"torchvision.{name}" for name in ("transforms", "ops", "datasets", "io", "models")),
        *(f"torchvision.{name}" for name in ("transforms.functional", "ops.misc", "utils")),
        "torchvision.models.feature_extraction",
    ):
        module = StandIn(path)
        module.__spec__ = ModuleSpec(path, None, is_package=True)
        module.__path__ = []
        sys.modules[path] = module
        parent, _, name = path.rpartition(".")
        if parent:
            setattr(sys.modules[parent], name, module)


# === Machine limits and the table ===


def machine_limits():
    """Returns GFLOP/s of float32 GEMM and GB/s of copying, the best of several tries on the CPU."""
    import numpy as np

    a = np.random.default_rng(0).random((2048, 2048), "float32")
    products = [best_of(9, lambda: a @ a)]
    if installed("torch"):  # MKL, while NumPy uses OpenBLAS
        import torch

        tensor = torch.from_numpy(a)
        products.append(best_of(9, lambda: tensor @ tensor))
    if installed("jax"):  # XLA
        import jax

        product, array = jax.jit(lambda x: x @ x), jax.device_put(a, jax.devices("cpu")[0])
        products.append(best_of(9, lambda: product(array).block_until_ready()))
    source, target = np.zeros(1 << 26, "float32"), np.ones(1 << 26, "float32")
    copy = best_of(5, lambda: np.copyto(target, source))
    gflops = 2 * 2048**3 / min(products) / 1e9
    return {"gflops": gflops, "gb_per_second": 2 * source.nbytes / copy / 1e9}


def best_of(times, function):
    """Returns the shortest time of several calls in seconds."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def report(rows, options):
    """Prints the table and writes the rows."""
    limits = machine_limits()
    print(
        f"\nbatch {options.batch}, {options.image_size}x{options.image_size}, {options.precision}; "
        f"this machine: {limits['gflops']:.0f} GFLOP/s float32, "
        f"{limits['gb_per_second']:.0f} GB/s copied\n"
    )
    print(
        f"| mode | model | | images/s | slowest to fastest | / {PEER} | of the limit | ready, s "
        "| peak, MiB |\n|---|---|---|---|---|---|---|---|---|"
    )
    for row in rows:
        speed = sorted(options.batch / seconds for seconds in row.pop("seconds"))
        row["images_per_second"] = statistics.median(speed)
        row["slowest"], row["fastest"] = speed[0], speed[-1]
    peers = {
        (row["mode"], row["model"]): row["images_per_second"]
        for row in rows
        if row["runtime"] == PEER
    }
    for row in rows:
        model, speed = MODELS[row["model"]], row["images_per_second"]
        row["ratio_to_peer"] = speed / peers.get((row["mode"], row["model"]), float("nan"))
        work = (options.image_size / 224) ** 2 * (3 if row["mode"] == "training" else 1)
        row["share_of_limit"] = 2 * model.gmacs * work * speed / limits["gflops"]
        print(
            f"| {row['mode']} | {model.title} | {title(row['runtime'])} | {speed:.2f} "
            f"| {row['slowest']:.2f} to {row['fastest']:.2f} | {row['ratio_to_peer']:.2f} "
            f"| {row['share_of_limit']:.0%} | {row['ready_seconds']:.0f} "
            f"| {row['peak_memory_mib']:.0f} |"
        )
    write(options.out, {"limits": limits, "rows": rows})
    print(f"\n{options.out}")


def write(path, record):
    """Writes a record as JSON."""
    from keras_tnt.files import write_atomically

    write_atomically(path, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
