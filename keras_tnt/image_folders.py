"""Walks folders of images: one definition of what counts for the trainer and every command.

Hidden files and folders, AppleDouble companions and folders that programs leave behind hold no
images of the user's. Each real folder is walked once, however many links lead to it.
"""

import collections
import os
import stat

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp")
# Folders that archivers, file systems and network storage leave behind, in lower case.
SYSTEM_FOLDERS = frozenset(
    (
        "__macosx",
        "__pycache__",
        "@eadir",
        "#recycle",
        "$recycle.bin",
        "lost+found",
        "system volume information",
    )
)
# The names of held-out splits, in the order in which they are looked for. The last is the fallback.
HELD_OUT_NAMES = ("val", "validation", "valid", "dev", "test")


class Skipped(collections.Counter):
    """How many files and folders were skipped, by reason."""

    def __str__(self):
        if not self:
            return "nothing skipped"
        return "skipped " + ", ".join(f"{count:,} {reason}" for reason, count in self.items())


def is_ignored(name, is_folder, skipped=None):
    """Returns whether a name is one of a hidden or system file or folder.

    Args:
        name: of the file or folder, without its path.
        is_folder: whether it is a folder.
        skipped: a `Skipped` in which to count it.
    """
    kind = "folders" if is_folder else "files"
    if name.startswith("._"):
        reason = f"AppleDouble {kind}"
    elif name.startswith("."):
        reason = f"hidden {kind}"
    elif is_folder and name.lower() in SYSTEM_FOLDERS:
        reason = "system folders"
    else:
        return False
    if skipped is not None:
        skipped[reason] += 1
    return True


def walk_images(folder, skipped=None, visited=None):
    """Yields the paths of the images in a folder and the folders below it, in order of their names.

    Folders are listed as they are reached, so that no list of all files is held. Links to folders
    are followed; a folder that was reached before, or that the link lies in, is skipped.

    Args:
        folder: path of the folder.
        skipped: a `Skipped` that counts what is left out.
        visited: set of the real paths of the folders that were walked; extended.

    Yields:
        Paths, strings that begin with `folder`.
    """
    skipped = Skipped() if skipped is None else skipped
    visited = set() if visited is None else visited
    real = os.path.realpath(folder)
    visited.add(real)
    # A stack and no recursion: folders may be nested deeper than Python's calls.
    stack = [(real, list_folder(os.fspath(folder), skipped))]
    while stack:
        real, entries = stack[-1]
        entry = next(entries, None)
        if entry is None:
            stack.pop()
        elif is_folder(entry):
            if is_ignored(entry.name, True, skipped):
                continue
            place = os.path.realpath(entry.path) if entry.is_symlink() else f"{real}/{entry.name}"
            if place in visited or (real + os.sep).startswith(place.rstrip(os.sep) + os.sep):
                skipped["links to folders that are walked already"] += 1
                continue
            visited.add(place)
            stack.append((place, list_folder(entry.path, skipped)))
        elif is_image(entry, skipped):
            yield entry.path


def list_folder(path, skipped):
    """Returns an iterator over a folder's entries, sorted by name; empty if it cannot be listed."""
    try:
        with os.scandir(path) as entries:
            return iter(sorted(entries, key=lambda entry: entry.name))
    except OSError as error:
        skipped[f"folders that cannot be listed ({error.strerror})"] += 1
        return iter(())


def is_folder(entry):
    try:
        return entry.is_dir()
    except OSError:
        return False


def is_image(entry, skipped=None):
    """Returns whether an entry that is no folder is the regular file of an image, by its name."""
    skipped = Skipped() if skipped is None else skipped
    if is_ignored(entry.name, False, skipped):
        return False
    if not entry.name.lower().endswith(SUFFIXES):
        skipped["files without the suffix of an image"] += 1
        return False
    try:
        # Links may lead to FIFOs and devices, on which a reader would wait for ever.
        if not entry.is_symlink() and entry.is_file():
            return True
        mode = entry.stat().st_mode
    except OSError as error:
        skipped[f"files that cannot be opened ({error.strerror})"] += 1
        return False
    if stat.S_ISREG(mode):
        return True
    skipped["FIFOs, sockets and devices"] += 1
    return False


def list_folders(folder, skipped=None):
    """Returns the names of the folders in a folder, sorted, without hidden and system folders."""
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if is_folder(entry))
    return [name for name in names if not is_ignored(name, True, skipped)]


def match_name(name, names):
    """Returns the one of some names that equals a name, else the one that does in lower case.

    Returns:
        A name; `None` if there is none.

    Raises:
        ValueError: if several differ from it in upper and lower case alone.
    """
    if name in names:
        return name
    found = sorted({other for other in names if other.casefold() == name.casefold()})
    if len(found) > 1:
        raise ValueError(
            f"{' and '.join(map(repr, found))} differ in upper and lower case alone, and either "
            f"may be {name!r}: rename or remove one"
        )
    return found[0] if found else None


def match_held_out(names):
    """Returns which of some names is the held-out split: val, validation, valid, dev, else test.

    Returns:
        A name; `None` if there is none.

    Raises:
        ValueError: as `match_name` does.
    """
    for wanted in HELD_OUT_NAMES:
        found = match_name(wanted, names)
        if found is not None:
            return found
    return None


def describe_fallback(name):
    """Returns a sentence about a held-out split that is the test split; empty for others."""
    if name.casefold() != HELD_OUT_NAMES[-1]:
        return ""
    return (
        f"; there is no {', '.join(HELD_OUT_NAMES[:-1])}: falling back to {name!r}, on which the "
        "best checkpoint is then chosen"
    )
