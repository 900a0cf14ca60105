"""Walks image folders, with one definition of an image for the trainer and every command.

Hidden files and folders, AppleDouble companions and system folders are skipped. Each real folder is
walked once, however many links lead to it.
"""

import collections
import os
import stat

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp")
# Folders that archivers, file systems and network storage create, in lower case.
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
# Names of held-out splits in order of preference. The last is the fallback.
HELD_OUT_NAMES = ("val", "validation", "valid", "dev", "test")


class Skipped(collections.Counter):
    """Counts of skipped files and folders, by reason."""

    def __str__(self):
        """Returns the counts for a message, such as `skipped 3 hidden files`."""
        if not self:
            return "nothing skipped"
        return "skipped " + ", ".join(f"{count:,} {reason}" for reason, count in self.items())


def is_ignored(name, is_folder, skipped=None):
    """Returns whether a name is that of a hidden or system file or folder.

    Args:
        name: name of the file or folder, without its path.
        is_folder: whether it is a folder.
        skipped: a `Skipped` in which to count it. If `None`, it is not counted.
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
    """Yields the paths of the images in a folder and its subfolders, sorted by name.

    Folders are listed as they are reached, so that no list of all files is in memory. Links to
    folders are followed; a folder that was visited before, or that contains the link, is skipped.

    Args:
        folder: path of the folder.
        skipped: a `Skipped` that counts skipped files and folders. If `None`, they are not counted.
        visited: set of the real paths of visited folders, which is extended. If `None`, it is
            empty.

    Yields:
        Paths, strings that begin with `folder`.
    """
    skipped = Skipped() if skipped is None else skipped
    visited = set() if visited is None else visited
    real = os.path.realpath(folder)
    visited.add(real)
    # A stack instead of recursion: folders may be nested deeper than Python's recursion limit.
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
    """Returns whether an entry is a folder or a link to one."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def is_image(entry, skipped=None):
    """Returns whether an entry that is not a folder is a regular file with an image's suffix."""
    skipped = Skipped() if skipped is None else skipped
    if is_ignored(entry.name, False, skipped):
        return False
    if not entry.name.lower().endswith(SUFFIXES):
        skipped["files without the suffix of an image"] += 1
        return False
    try:
        # Links may lead to FIFOs and devices, on which a read would block forever.
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
    """Returns the sorted names of the subfolders, without hidden and system folders."""
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if is_folder(entry))
    return [name for name in names if not is_ignored(name, True, skipped)]


def match_name(name, names):
    """Returns the name in `names` that equals `name`, exactly or else ignoring case.

    Args:
        name: the name to look for.
        names: the names to choose from.

    Returns:
        A name; `None` if there is none.

    Raises:
        ValueError: if several differ from it only in upper and lower case.
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
    """Returns the name of the held-out split: val, validation, valid, dev, else test.

    Args:
        names: the names to choose from.

    Returns:
        A name; `None` if there is none.

    Raises:
        ValueError: as for `match_name`.
    """
    for wanted in HELD_OUT_NAMES:
        found = match_name(wanted, names)
        if found is not None:
            return found
    return None


def describe_fallback(name):
    """Returns a note for messages if the held-out split is the test split; else an empty string."""
    if name.casefold() != HELD_OUT_NAMES[-1]:
        return ""
    return (
        f"; there is no {', '.join(HELD_OUT_NAMES[:-1])}: falling back to {name!r}, on which the "
        "best checkpoint is then chosen"
    )
