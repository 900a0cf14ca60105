"""Image files in folders that are named after their classes."""

from pathlib import Path

from training.sources.kinds import held_out_mask, of_files

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp")
HELD_OUT_FOLDERS = ("val", "validation", "test")
LAYOUT = (
    "<data_dir>/train/<class>/<image> and <data_dir>/val/<class>/<image> (or validation, test), "
    "or <data_dir>/<class>/<image> and --validation_share=0.1"
)


def folder(config, held_out):
    """A split of image files; its classes are the training split's folders, sorted.

    Raises:
        ValueError: if folders or images are missing, or the held-out split has other classes.
    """
    root = Path(config.data_dir)
    if not root.is_dir():
        raise ValueError(f"--data_dir={root} is no directory. The layout is {LAYOUT}")
    train = root / (config.train_split or "train")
    if not class_folders(train):
        return flat_folder(config, root, held_out)
    names = class_folders(train)
    if config.validation_share:
        raise ValueError(
            f"--validation_share is for {root}/<class>/<image>, but there is {train}: leave it "
            f"out, or give --data_dir={train}"
        )
    split = held_out_folder(root, config.eval_split) if held_out else train
    unknown = sorted(set(class_folders(split)) - set(names))
    if unknown:
        raise ValueError(f"{split} has classes that {train} has not: {', '.join(unknown)}")
    files = sorted(
        (path, label)
        for label, name in enumerate(names)
        if (split / name).is_dir()
        for path in images_of(split / name)
    )
    if not files:
        raise ValueError(f"{split} holds no images. The layout is {LAYOUT}")
    paths, labels = zip(*files, strict=True)
    return of_files(paths, labels, names)


def flat_folder(config, root, held_out):
    """A split of `root/<class>/<image>`, drawn by the seed."""
    names = class_folders(root)
    if not names or config.train_split or config.eval_split:
        raise ValueError(f"--data_dir={root} holds no images in folders of classes: {LAYOUT}")
    if not config.validation_share:
        raise ValueError(
            f"--data_dir={root} has no folders train and val of class folders. Give "
            "--validation_share=0.1 to hold out a tenth of each class"
        )
    files = sorted(
        (path, label) for label, name in enumerate(names) for path in images_of(root / name)
    )
    paths, labels = zip(*files, strict=True)
    mask = held_out_mask(labels, names, config.validation_share, config.seed)
    chosen = [i for i, out in enumerate(mask) if out == held_out]
    return of_files([paths[i] for i in chosen], [labels[i] for i in chosen], names)


def class_folders(directory):
    """Names of the folders in a directory, in order of the alphabet, without hidden ones.

    Raises:
        ValueError: if one of them can be no class's name.
    """
    if not directory.is_dir():
        return []
    # Not above: importing the package takes longer than it takes to refuse a wrong flag.
    from keras_tnt.text import is_encodable, is_line

    names = sorted(p.name for p in directory.iterdir() if p.is_dir() and p.name[0] != ".")
    for name in names:
        if not is_line(name) or not is_encodable(name):
            raise ValueError(
                f"{directory} has the folder {name!r}, which can name no class: rename it to one "
                "line of UTF-8 text"
            )
    return names


def images_of(directory):
    """Paths of a class's images.

    Raises:
        ValueError: if there are none.
    """
    files = [path for path in directory.rglob("*") if path.is_file()]
    images = [str(path) for path in files if path.suffix.lower() in SUFFIXES]
    if not images:
        found = (
            f"the first of its {len(files)} files is {min(files).name}" if files else "it is empty"
        )
        raise ValueError(f"{directory} holds no images ({', '.join(SUFFIXES)}): {found}")
    return images


def held_out_folder(root, split):
    """The folder of the held-out split: the one that is named, or the first that there is."""
    for name in (split,) if split else HELD_OUT_FOLDERS:
        if (root / name).is_dir():
            return root / name
    raise ValueError(
        f"--data_dir={root} has no folder {split or ' or '.join(HELD_OUT_FOLDERS)}. The layout is "
        f"{LAYOUT}"
    )
