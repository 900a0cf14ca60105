"""DeiT (arXiv 2012.12877, Table 9) and CaiT (arXiv 2103.17239, Table 8) on ImageNet.

DeiT's recipe is TNT's but for the learning rate, 5e-4 * batch / 512; CaiT's is DeiT's with a
stochastic depth for each size, constant over the blocks, distilled hard.
"""

from training.recipes.recipe import Recipe
from training.recipes.tnt import COMMAND, IMAGENET

VALUES = {
    **IMAGENET,
    "learning_rate": 5e-4,
    "learning_rate_batch": 512,
    "interpolation": "bicubic",  # main.py's --train-interpolation
    "erase_after_mixing": False,  # erased in the transform, mixed in the training loop
}
DISTILLED = {"distilled": True, "distill": "hard", "distill_alpha": 0.5, "teacher": "tnt_base"}
TEACHER = "the paper's teacher is RegNetY-16GF: --teacher=<its .keras file>"

# name: (published top-1 plain, distilled)
DEIT_ROWS = {
    "deit_tiny": ("72.2%", "74.5%"),
    "deit_small": ("79.9%", "81.2%"),
    "deit_base": ("82.0%", "83.4%"),
}
# name: (side, stochastic depth, published top-1)
CAIT_ROWS = {
    "cait_xxs24": (224, 0.05, "78.4%"),
    "cait_xxs36": (224, 0.1, "79.8%"),
    "cait_xs24": (384, 0.05, "84.1%"),
    "cait_s24": (224, 0.1, "83.5%"),
    "cait_s36": (384, 0.2, "85.5%"),
    "cait_m36": (384, 0.3, "86.1%"),
    "cait_m48": (448, 0.4, "86.5%"),
}

DEIT = {}
for name, (plain, distilled) in DEIT_ROWS.items():
    DEIT[name] = Recipe(
        COMMAND.format(name=name),
        "Table 9 of arXiv 2012.12877",
        f"{plain} top-1 at 224",
        {**VALUES, "model": name},
    )
    DEIT[f"{name}_distilled"] = Recipe(
        COMMAND.format(name=f"{name}_distilled"),
        f"Table 9 and section 4 of arXiv 2012.12877; {TEACHER}",
        f"{distilled} top-1 at 224",
        {**VALUES, **DISTILLED, "model": name},
    )

CAIT = {
    name: Recipe(
        COMMAND.format(name=name),
        f"Tables 4 and 8 of arXiv 2103.17239; plain, add --distill=hard for its last points; "
        f"{TEACHER}",
        f"{result} top-1 at {side}, distilled where the paper's is",
        {**VALUES, "model": name, "image_size": side, "stochastic_depth": depth, "crop": 1.0},
    )
    for name, (side, depth, result) in CAIT_ROWS.items()
}
