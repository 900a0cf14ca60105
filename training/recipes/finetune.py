"""From public weights to another resolution or another, smaller data set."""

from training.recipes.recipe import Recipe
from training.recipes.tnt import IMAGENET

FINETUNE = {
    "finetune_384": Recipe(
        command="python training/train.py --recipe=finetune_384 --strategy=mirrored "
        "--data_dir=<tensorflow-datasets directory> --workdir=runs/tnt_small_384",
        source="section 4.1 of arXiv 2103.00112: 30 epochs, rate 5e-6, weight decay 1e-8",
        result="published (Table 9): 83.1% top-1 at 384; 83.9% with --model=tnt_base",
        values={
            **IMAGENET,
            "model": "tnt_small",
            "weights": "imagenet",
            "image_size": 384,
            "epochs": 30,
            "batch_size": 512,
            "learning_rate": 5e-6,
            "learning_rate_batch": 512,
            "min_learning_rate": 5e-6,
            "warmup_epochs": 0.0,
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


# === Table 9 of arXiv 2103.00112: smaller data sets at 384, the settings of pre-training kept ===

DIRECTORIES = {"folder": "class folders"}
MODELS = {"": "tnt_small", "_base": "tnt_base"}

# name: (data set, training split, held-out split, epochs, published top-1 of TNT-S and TNT-B)
TRANSFERS = {
    "transfer_cifar10": ("tfds:cifar10", "train", "test", 64, ("98.7%", "99.1%")),
    "transfer_cifar100": ("tfds:cifar100", "train", "test", 64, ("90.1%", "91.1%")),
    "transfer_flowers": (
        "tfds:oxford_flowers102",
        "train+validation",
        "test",
        300,
        ("98.8%", "99.0%"),
    ),
    "transfer_pets": ("tfds:oxford_iiit_pet", "train", "test", 300, ("94.7%", "95.0%")),
    # iNaturalist 2019, which tensorflow-datasets does not have.
    "transfer_inaturalist": ("folder", "", "", 300, ("81.4%", "83.2%")),
}

TRANSFER = {
    name + suffix: Recipe(
        command=f"python training/train.py --recipe={name + suffix} --strategy=mirrored "
        f"--data_dir=<{DIRECTORIES.get(dataset, 'tensorflow-datasets directory')}> "
        f"--workdir=runs/{name + suffix}",
        source=f"section 4.4 of arXiv 2103.00112: the settings of pre-training, {epochs} epochs",
        result=f"published (Table 9): {result} top-1 at 384",
        values={
            **IMAGENET,
            "model": model,
            "weights": "imagenet",
            "image_size": 384,
            "dataset": dataset,
            "train_split": train_split,
            "eval_split": eval_split,
            "epochs": epochs,
            "crop": 1.0,
        },
    )
    for name, (dataset, train_split, eval_split, epochs, results) in TRANSFERS.items()
    for (suffix, model), result in zip(MODELS.items(), results, strict=True)
}
