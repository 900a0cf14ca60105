r"""Trains DeiT (arXiv 2012.12877) and CaiT (arXiv 2103.17239) on ImageNet.

    python training/train.py --recipe=deit_small --strategy=mirrored --precision=bfloat16 \
        --data_dir=<tensorflow-datasets directory> --workdir=runs/deit_small

The published accuracies and their sources are in keras_tnt/models/published.csv.

DeiT's values are the defaults of main.py in facebookresearch/deit 7e160fe: TNT's except for the
learning rate, 5e-4 * batch / 512, the evaluation crop, 0.875, and the cooldown epochs, which
main.py does not train. CaiT's are DeiT's with 400 epochs and a stochastic depth for each size,
constant over the blocks. Every CaiT is trained at 224; those published at 384 and 448 are
fine-tuned from there.
"""

from training.recipes import published
from training.recipes.recipe import Recipe
from training.recipes.tnt import COMMAND, IMAGENET

DEIT_VALUES = {
    **IMAGENET,
    "learning_rate": 5e-4,
    "learning_rate_batch": 512,
    "cooldown_epochs": 0,
    "schedule_delay": 1,
    "color_jitter": 0.3,
    "crop": 0.875,
    "interpolation": "bicubic",  # main.py's --train-interpolation
    "erase_after_mixing": False,  # erased in the transform, mixed in the training loop
}
CAIT_VALUES = {**DEIT_VALUES, "epochs": 400, "crop": 1.0}
DISTILLED = {"distilled": True, "distill": "hard", "distill_alpha": 0.5, "teacher": "tnt_base"}
TEACHER = "the paper's teacher is RegNetY-16GF: --teacher=<its .keras file>"
# The command in README_deit.md:246, and main.py's defaults for everything else.
DEIT_FINETUNING = {
    "epochs": 30,
    "batch_size": 512,
    "learning_rate": 5e-6,
    "min_learning_rate": 5e-6,
    "weight_decay": 1e-8,
    "image_size": 384,
}
# CaiT-M48's, from its author in issue 108 of facebookresearch/deit, which does not give the minimum
# rate; it is that of DeiT's command.
CAIT_FINETUNING = {
    "epochs": 60,
    "batch_size": 256,
    "learning_rate": 5e-6,
    "min_learning_rate": 5e-6,
    "weight_decay": 0.05,
}
ISSUE = "issue 108 of facebookresearch/deit"

# name: (stochastic depth, image sizes for fine-tuning)
CAIT_ROWS = {
    "cait_xxs24": (0.05, (384,)),
    "cait_xxs36": (0.1, (384,)),
    "cait_xs24": (0.05, (384,)),
    "cait_s24": (0.1, (384,)),
    "cait_s36": (0.2, (384,)),
    "cait_m36": (0.3, (384,)),
    "cait_m48": (0.4, (448,)),
}

DEIT = {}
for name in ("deit_tiny", "deit_small", "deit_base"):
    DEIT[name] = Recipe(
        COMMAND.format(name=name),
        "facebookresearch/deit 7e160fe, main.py:32-181 and README_deit.md:211-242; Table 9 of "
        "arXiv 2012.12877",
        published.result(name, 224),
        {**DEIT_VALUES, "model": name},
    )
    DEIT[f"{name}_distilled"] = Recipe(
        COMMAND.format(name=f"{name}_distilled"),
        f"as {name}, with section 4 of arXiv 2012.12877; {TEACHER}",
        published.result(f"{name}_distilled", 224),
        {**DEIT_VALUES, **DISTILLED, "model": name},
    )
DEIT["deit_base_384"] = Recipe(
    COMMAND.format(name="deit_base_384"),
    "facebookresearch/deit 7e160fe, README_deit.md:246; --weights=runs/deit_base for your own",
    published.result("deit_base", 384),
    {
        **DEIT_VALUES,
        **DEIT_FINETUNING,
        "model": "deit_base",
        "weights": "deit_base_patch16_224.fb_in1k",
    },
)

CAIT = {}
for name, (depth, sizes) in CAIT_ROWS.items():
    result = published.result(name, 224)
    if result.startswith("no published"):
        result += f": fine-tune it by --recipe={name}_{sizes[0]}"
    CAIT[name] = Recipe(
        COMMAND.format(name=name),
        "README_cait.md at 4fcfe17 (400 epochs) and Tables 4 and 8 of arXiv 2103.17239; plain, "
        f"while the published models are distilled: --distill=hard; {TEACHER}",
        result,
        {**CAIT_VALUES, "model": name, "image_size": 224, "stochastic_depth": depth},
    )
    for size in sizes:
        own_depth = 0.3 if name == "cait_m48" else depth
        CAIT[f"{name}_{size}"] = Recipe(
            COMMAND.format(name=f"{name}_{size}") + f" --weights=runs/{name}",
            f"{ISSUE}; the least rate by README_deit.md:246"
            if name == "cait_m48"
            else f"no source for this size: those of CaiT-M48 ({ISSUE}), with the stochastic depth "
            "of the first stage",
            published.result(name, size),
            {
                **CAIT_VALUES,
                **CAIT_FINETUNING,
                "model": name,
                "weights": f"runs/{name}",
                "image_size": size,
                "stochastic_depth": own_depth,
            },
        )
