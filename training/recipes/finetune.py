"""Fine-tunes published weights at another resolution or on a smaller data set.

    python training/train.py --recipe=finetune --data_dir=<class folders> --workdir=runs/finetune

The published accuracies of finetune_384 and the transfer_ recipes, and their sources, are in
keras_tnt/models/published.csv.
"""

from training.recipes import published
from training.recipes.recipe import Recipe
from training.recipes.tnt import IMAGENET

FINETUNE = {
    "finetune_384": Recipe(
        command="python training/train.py --recipe=finetune_384 --strategy=mirrored "
        "--data_dir=<tensorflow-datasets directory> --workdir=runs/tnt_small_384",
        source="section 4.1 of arXiv 2103.00112: 30 epochs, rate 5e-6, weight decay 1e-8; the rest "
        "as DeiT's (facebookresearch/deit 7e160fe, README_deit.md:246): 5 warm-up epochs from 1e-6",
        result=f"{published.result('tnt_small', 384)}; with --model=tnt_base "
        f"{published.result('tnt_base', 384)}",
        values={
            **IMAGENET,
            "model": "tnt_small",
            "weights": "imagenet",
            "image_size": 384,
            "epochs": 30,
            "cooldown_epochs": 0,
            "batch_size": 512,
            "learning_rate": 5e-6,
            "learning_rate_batch": 512,
            "min_learning_rate": 5e-6,
            "weight_decay": 1e-8,
            "crop": 1.0,
        },
    ),
    "finetune": Recipe(
        command="python training/train.py --recipe=finetune --data_dir=<class folders> "
        "--workdir=runs/finetune",
        source="chosen here: AdamW at a low rate, lower still in the early blocks",
        result="no published figure; those of the paper's data sets: the transfer_ recipes",
        values={
            "model": "tnt_small",
            "weights": "imagenet",
            "dataset": "folder",
            "epochs": 50,
            "batch_size": 64,
            "learning_rate": 5e-5,
            "warmup_epochs": 3.0,
            "min_learning_rate": 1e-6,
            "weight_decay": 0.05,
            "layer_decay": 0.75,
            "clip_norm": 1.0,
            "label_smoothing": 0.1,
            "stochastic_depth": 0.1,
            "min_crop": 0.35,
            "flip": True,
            "randaugment": True,
            "mixup": 0.2,
            "mix_off_epochs": 5,
        },
    ),
}


# === Table 9 of arXiv 2103.00112: smaller data sets at 384, with the settings of pre-training ===

DIRECTORIES = {"folder": "class folders"}
MODELS = {"": "tnt_small", "_base": "tnt_base"}

# name: (data set, training split, held-out split, epochs)
TRANSFERS = {
    "transfer_cifar10": ("tfds:cifar10", "train", "test", 64),
    "transfer_cifar100": ("tfds:cifar100", "train", "test", 64),
    "transfer_flowers": (
        "tfds:oxford_flowers102",
        "train+validation",
        "test",
        300,
    ),
    "transfer_pets": ("tfds:oxford_iiit_pet", "train", "test", 300),
    # iNaturalist 2019, which is not in tensorflow-datasets.
    "transfer_inaturalist": ("folder", "", "", 300),
}

TRANSFER = {
    name + suffix: Recipe(
        command=f"python training/train.py --recipe={name + suffix} --strategy=mirrored "
        f"--data_dir=<{DIRECTORIES.get(dataset, 'tensorflow-datasets directory')}> "
        f"--workdir=runs/{name + suffix}",
        source=f"section 4.4 of arXiv 2103.00112: the settings of pre-training, {epochs} epochs",
        result=published.result(model, 384, name.removeprefix("transfer_")),
        values={
            **IMAGENET,
            "model": model,
            "weights": "imagenet",
            "image_size": 384,
            "dataset": dataset,
            "train_split": train_split,
            "eval_split": eval_split,
            "epochs": epochs,
            "cooldown_epochs": 0,
            # There are few updates: without warm-up the moving average would stay close to the
            # initial weights.
            "ema_warmup": True,
            "crop": 1.0,
        },
    )
    for name, (dataset, train_split, eval_split, epochs) in TRANSFERS.items()
    for suffix, model in MODELS.items()
}
