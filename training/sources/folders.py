"""Image files in class folders.

`keras_tnt.image_folders` defines which files count, for all commands. It is imported where it is
used, because importing the package takes longer than rejecting a wrong flag.
"""

import os
from pathlib import Path

from training.sources.kinds import held_out_mask, of_files

LAYOUT = (
    "<data_dir>/train/<class>/<image> and <data_dir>/val/<class>/<image> (or validation, valid, "
    "dev, else test), or <data_dir>/<class>/<image> and --validation_share=0.1"
)


def folder(config, held_out):
    """Returns a split of image files in class folders.

    The classes are the training split's folders, sorted as text, as in torchvision and Keras: "10"
    before "2".

    Args:
        config: A `training.configuration.Config`.
        held_out: Whether to return the held-out split, else the training split.

    Raises:
        ValueError: If folders or images are missing, or the held-out split has other classes.
    """
    root = Path(config.data_dir)
    if not root.is_dir():
        raise ValueError(f"--data_dir={root} is no directory. The layout is {LAYOUT}")
    train = find_folder(root, config.train_split or "train")
    if train is None or not class_folders(train):
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
    note = ""
    if held_out and not config.eval_split:
        from keras_tnt.images.folders import describe_fallback

        note = describe_fallback(split.name)
    paths, labels = list_images(split, names, held_out, note)
    if not paths:
        raise ValueError(f"{split} holds no images. The layout is {LAYOUT}")
    return of_files(paths, labels, names, real_paths(paths), classes_from_images=True)


def flat_folder(config, root, held_out):
    """Returns a random split of `root/<class>/<image>`, drawn by `--seed`.

    Args:
        config: A `training.configuration.Config`.
        root: A `Path`.
        held_out: Whether to return the held-out split, else the training split.
    """
    names = class_folders(root)
    if not names or config.train_split or config.eval_split:
        raise ValueError(f"--data_dir={root} holds no images in folders of classes: {LAYOUT}")
    if not config.validation_share:
        raise ValueError(
            f"--data_dir={root} has no folders train and val of class folders. Give "
            "--validation_share=0.1 to hold out a tenth of each class"
        )
    paths, labels = list_images(root, names, held_out, ", of which a share is held out")
    mask = held_out_mask(labels, names, config.validation_share, config.seed)
    chosen = [i for i, out in enumerate(mask) if out == held_out]
    paths = [paths[i] for i in chosen]
    labels = [labels[i] for i in chosen]
    return of_files(paths, labels, names, real_paths(paths), classes_from_images=True)


def list_images(split, names, held_out, note):
    """Lists a split's images, and prints the split and what was skipped.

    Args:
        split: Folder of the split.
        names: Class names; the split may lack some.
        held_out: Whether the split is the held-out one.
        note: Text to append to the printed line.

    Returns:
        (paths, labels), sorted by path.

    Raises:
        ValueError: If a class folder has no images, or two classes are the same folder.
    """
    from keras_tnt.images.folders import Skipped

    skipped, visited = Skipped(), {}
    for name in filter(lambda name: (split / name).is_dir(), names):
        other = visited.setdefault(os.path.realpath(split / name), name)
        if other != name:
            raise ValueError(
                f"{split}: the classes {other!r} and {name!r} are links to the same folder. "
                "Remove one"
            )
    class_folders(split, skipped)
    # Links within a class to another class's folder are not followed: an image has one label.
    visited = set(visited)
    files = sorted(
        (path, label)
        for label, name in enumerate(names)
        if (split / name).is_dir()
        for path in images_of(split / name, skipped, visited)
    )
    kind = "held-out" if held_out else "training"
    found = len({label for _, label in files})
    print(
        f"{kind} split {split}: {len(files):,} images in {found:,} classes; {skipped}{note}",
        flush=True,
    )
    return [path for path, _ in files], [label for _, label in files]


def class_folders(directory, skipped=None):
    """Returns the names of the class folders in a directory, sorted as text.

    Args:
        directory: A `Path`.
        skipped: A `keras_tnt.image_folders.Skipped` that counts what is ignored. Defaults to
            `None`.

    Raises:
        ValueError: If a folder's name is not a valid class name.
    """
    if not directory.is_dir():
        return []
    from keras_tnt.images.folders import list_folders
    from keras_tnt.text import is_encodable, is_line

    names = list_folders(directory, skipped)
    for name in names:
        if not is_line(name) or not is_encodable(name) or name != name.strip():
            raise ValueError(
                f"{directory} has the folder {name!r}, which can name no class: rename it to one "
                "line of UTF-8 text without spaces around it"
            )
    return names


def images_of(directory, skipped=None, visited=None):
    """Lists the paths of a class's images.

    Args:
        directory: Folder of the class.
        skipped: A `keras_tnt.image_folders.Skipped` that counts what is ignored. Defaults to
            `None`.
        visited: Real paths of folders that must not be walked. Defaults to `None`.

    Raises:
        ValueError: If there are none.
    """
    from keras_tnt.images.folders import SUFFIXES, walk_images

    images = list(walk_images(directory, skipped, visited))
    if not images:
        files = sorted(entry.name for entry in os.scandir(directory) if not entry.is_dir())
        found = f"the first of its {len(files)} files is {files[0]}" if files else "it is empty"
        raise ValueError(f"{directory} holds no images ({', '.join(SUFFIXES)}): {found}")
    return images


def real_paths(paths):
    """Returns paths with their folders resolved, so that links between splits are found."""
    folders = {}
    real = []
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in folders:
            folders[folder] = os.path.realpath(folder)
        real.append(os.path.join(folders[folder], name))
    return real


def find_folder(root, name):
    """Returns the folder of a name, in any case, in a directory, or `None`."""
    from keras_tnt.images.folders import list_folders, match_name

    found = match_name(name, list_folders(root))
    if found is None and (root / name).is_dir():  # a nested or hidden folder
        return root / name
    return None if found is None else root / found


def held_out_folder(root, split):
    """Returns the folder of the held-out split: the named one, or the first usual name that exists.

    Raises:
        ValueError: If there is none.
    """
    from keras_tnt.images.folders import HELD_OUT_NAMES, list_folders, match_held_out

    if split:
        found = find_folder(root, split)
    else:
        name = match_held_out(list_folders(root))
        found = None if name is None else root / name
    if found is None:
        raise ValueError(
            f"--data_dir={root} has no folder {split or ' or '.join(HELD_OUT_NAMES)}. "
            f"The layout is {LAYOUT}"
        )
    return found
