"""TNT (arXiv 2103.00112) and PyramidTNT (arXiv 2201.00978) on ImageNet.

Values: the papers' implementation details and the original command,
`--sched cosine --opt adamw -b 128 --warmup-epochs 5 --epochs 300 --lr 1e-3 --weight-decay .05
--aa rand-m9-mstd0.5-inc1 --cutmix 1.0 --reprob 0.25 --smoothing 0.1 --drop-path 0.1
--repeated-aug --model-ema --model-ema-decay 0.99996` on 8 GPUs.
"""

from training.recipes.recipe import Recipe

IMAGENET = {
    "dataset": "imagenet2012",
    "epochs": 300,
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
    "color_jitter": 0.4,  # named by the command; has no effect under RandAugment
    "randaugment": True,
    "erasing": 0.25,
    "interpolation": "random",  # train.py's --train-interpolation
    "erase_after_mixing": True,  # timm 0.3.2: FastCollateMixup, then PrefetchLoader's erasing
    "mixup": 0.8,
    "cutmix": 1.0,
    "crop": 0.9,
}
PYRAMID = {**IMAGENET, "warmup_epochs": 20.0}

# name: (values, published top-1 at size, source)
ROWS = {
    "tnt_tiny": (IMAGENET, "73.9% top-1 at 224", "Table 3 of arXiv 2103.00112"),
    "tnt_small": (IMAGENET, "81.5% top-1 at 224", "Table 3 of arXiv 2103.00112"),
    "tnt_base": (IMAGENET, "82.9% top-1 at 224", "Table 3 of arXiv 2103.00112"),
    "pyramid_tnt_tiny": (PYRAMID, "75.2% top-1 at 192", "Table 2 of arXiv 2201.00978"),
    "pyramid_tnt_small": (PYRAMID, "82.0% top-1 at 256", "Table 2 of arXiv 2201.00978"),
    "pyramid_tnt_medium": (PYRAMID, "83.5% top-1 at 256", "Table 2 of arXiv 2201.00978"),
    "pyramid_tnt_base": (PYRAMID, "84.1% top-1 at 256", "Table 2 of arXiv 2201.00978"),
}

COMMAND = (
    "python training/train.py --recipe={name} --strategy=mirrored --precision=bfloat16 "
    "--data_dir=<tensorflow-datasets directory> --workdir=runs/{name}"
)

TNT = {
    name: Recipe(COMMAND.format(name=name), source, result, {**values, "model": name})
    for name, (values, result, source) in ROWS.items()
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
