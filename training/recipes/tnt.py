r"""Trains TNT (arXiv 2103.00112) and PyramidTNT (arXiv 2201.00978) on ImageNet.

    python training/train.py --recipe=tnt_small --strategy=mirrored --precision=bfloat16 \
        --data_dir=<tensorflow-datasets directory> --workdir=runs/tnt_small

The published accuracies and their sources are in keras_tnt/models/published.csv.

Values: the command in Efficient-AI-Backbones f90e129, tnt_pytorch/readme.md:16 (PyramidTNT: line
36), and the defaults of its train.py for what the command does not set. timm 0.3.2's scheduler adds
10 cooldown epochs at the minimum rate (scheduler_factory.py:41), which train.py trains (line 597):
310 epochs in all.
"""

from training.recipes import published
from training.recipes.recipe import Recipe

IMAGENET = {
    "dataset": "imagenet2012",
    "epochs": 300,
    "cooldown_epochs": 10,
    "batch_size": 1024,
    "learning_rate": 1e-3,
    "learning_rate_batch": 1024,
    "warmup_epochs": 5.0,
    "warmup_learning_rate": 1e-6,
    "min_learning_rate": 1e-5,
    "weight_decay": 0.05,
    "label_smoothing": 0.1,
    "stochastic_depth": 0.1,
    "ema": 0.99996,
    "repeats": 3,
    "min_crop": 0.08,
    "flip": True,
    "color_jitter": 0.4,  # set by the command; has no effect with RandAugment
    "randaugment": True,
    "erasing": 0.25,
    "interpolation": "random",  # train.py's --train-interpolation
    "erase_after_mixing": True,  # timm 0.3.2: FastCollateMixup, then PrefetchLoader's erasing
    "mixup": 0.8,
    "cutmix": 1.0,
    "crop": 0.9,
}
PYRAMID = {**IMAGENET, "warmup_epochs": 20.0}

# name: (values, image size of the published result, source)
TNT_SOURCE = "Efficient-AI-Backbones f90e129, tnt_pytorch/readme.md:16 and train.py:72-275"
PYRAMID_SOURCE = "Efficient-AI-Backbones f90e129, tnt_pytorch/readme.md:36 and train.py:72-275"
ROWS = {
    "tnt_tiny": (IMAGENET, 224, TNT_SOURCE),
    "tnt_small": (IMAGENET, 224, TNT_SOURCE),
    "tnt_base": (IMAGENET, 224, TNT_SOURCE),
    "pyramid_tnt_tiny": (PYRAMID, 192, PYRAMID_SOURCE),
    "pyramid_tnt_small": (PYRAMID, 256, PYRAMID_SOURCE),
    "pyramid_tnt_medium": (PYRAMID, 256, PYRAMID_SOURCE),
    "pyramid_tnt_base": (PYRAMID, 256, PYRAMID_SOURCE),
}

COMMAND = (
    "python training/train.py --recipe={name} --strategy=mirrored --precision=bfloat16 "
    "--data_dir=<tensorflow-datasets directory> --workdir=runs/{name}"
)

TNT = {
    name: Recipe(
        COMMAND.format(name=name), source, published.result(name, size), {**values, "model": name}
    )
    for name, (values, size, source) in ROWS.items()
}
TNT["tnt_small_distilled"] = Recipe(
    COMMAND.format(name="tnt_small_distilled"),
    "TNT's recipe with DeiT's hard distillation (arXiv 2012.12877, section 4)",
    "no published result; DeiT-S gains 1.3 points by it",
    {
        **IMAGENET,
        "model": "tnt_small",
        "distilled": True,
        "distill": "hard",
        "teacher": "cait_s24",
        "distill_alpha": 0.5,
    },
)
