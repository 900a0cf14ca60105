"""Compares TNT, DeiT and PyramidTNT of equal size as backbones for detection and segmentation.

    KERAS_BACKEND=jax python benchmarks/dense.py
    KERAS_BACKEND=jax python benchmarks/dense.py --tasks=segmentation --seeds=2 --steps=600

Each backbone is initialized from a classifier of single digits. With KerasHub's heads, it is
fine-tuned, or frozen except for the layers that resample its maps; examples/detection.py and
examples/segmentation.py do the work. The seed determines initial weights and data order; the scenes
are always the same. Completed runs are saved in --workdir, from which an interrupted benchmark
resumes.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import keras  # noqa: E402

import keras_tnt  # noqa: E402
from examples import dense_task, detection, scenes, segmentation  # noqa: E402
from keras_tnt.files import write_atomically  # noqa: E402

# Parameters as the backbone of a detector: 557,232, 551,720 and 550,277.
ARCHITECTURES = {
    "tnt": dense_task.TNT_SCENES,
    "deit": {"patch_size": 8, "depth": 4, "embed_dim": 104, "num_heads": 4},
    "pyramid_tnt": {
        "depths": (2, 2, 2),
        "outer_dims": (40, 72, 96),
        "inner_dims": (5, 9, 12),
        "outer_heads": (2, 4, 4),
        "inner_heads": (1, 1, 1),
        "reductions": (2, 1, 1),
    },
}
MODELS = {"tnt": "TNT", "deit": "DeiT", "pyramid_tnt": "PyramidTNT"}
TASKS = {"detection": (detection, "AP50"), "segmentation": (segmentation, "mean IoU")}
TRAINED = {"frozen": ["--freeze=head"], "fine-tuned": []}


def main():
    """Trains every task, mode and model with every seed, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", default="segmentation,detection")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--workdir", type=Path, default=ROOT / "runs" / "dense")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/dense.json")
    options = parser.parse_args()
    tasks = options.tasks.split(",")
    if unknown := set(tasks) - set(TASKS):
        parser.error(f"{', '.join(sorted(unknown))}: there are {', '.join(TASKS)}")

    rows = {}
    for seed in range(options.seeds):  # the outer loop, so that every row soon has a result
        for task in tasks:
            for trained in TRAINED:
                for model in ARCHITECTURES:
                    found = run(task, trained, model, seed, options)
                    rows.setdefault((task, trained, model), []).append(found)
    report(rows, options)


def run(task, trained, model, seed, options):
    """Returns the held-out metric of a detector or segmenter, trained now or in an earlier run."""
    example, metric = TASKS[task]
    folder = options.workdir / f"seed_{seed}" / model
    workdir = folder / f"{task}_{trained}_{options.steps}"
    if not (workdir / "results.json").exists():
        start = time.perf_counter()
        keras.utils.clear_session()
        common = [
            f"--model={model}",
            f"--architecture={json.dumps(ARCHITECTURES[model])}",
            f"--seed={seed}",
        ]
        parsed = dense_task.parse("", example.SETTINGS, [*common, f"--workdir={folder}"])
        weights = dense_task.digits_weights(parsed)
        example.main(
            [
                *common,
                f"--workdir={workdir}",
                f"--weights={weights}",
                f"--steps={options.steps}",
                "--no_export",
                *TRAINED[trained],
            ]
        )
        seconds = time.perf_counter() - start
        print(f"{MODELS[model]}, {task}, {trained}, seed {seed}: {seconds:.0f} s", flush=True)
    return json.loads((workdir / "results.json").read_text())["reloaded"][metric]


def backbone_parameters(model):
    """Returns the parameters of a detector's backbone; a segmenter's has fewer levels."""
    size = (scenes.SIZE, scenes.SIZE, 3)
    levels = ("P3", "P4", "P5")
    built = keras_tnt.backbone(
        model, levels, weights=None, input_shape=size, **ARCHITECTURES[model]
    )
    return built.count_params()


def report(rows, options):
    """Prints the table and writes the rows."""
    print(f"\n| task | backbone | parameters | | {options.seeds} seeds | each |")
    print("|---|---|---|---|---|---|")
    table = []
    for (task, trained, model), values in rows.items():
        mean = statistics.mean(values)
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        parameters, metric = backbone_parameters(model), TASKS[task][1]
        each = ", ".join(f"{value:.3f}" for value in values)
        print(
            f"| {task}, {trained} | {MODELS[model]} | {parameters:,} | {metric} "
            f"| {mean:.3f} ± {spread:.3f} | {each} |"
        )
        named = {"task": task, "trained": trained, "model": model, "parameters": parameters}
        table.append({**named, "metric": metric, "mean": mean, "spread": spread, "each": values})
    settings = {"steps": options.steps, "seeds": options.seeds}
    settings |= {"backend": keras.backend.backend(), "keras": keras.__version__}
    write_atomically(options.out, json.dumps({"settings": settings, "rows": table}, indent=2))


if __name__ == "__main__":
    main()
