"""Selection of image files in a folder, shared by the trainer and the commands."""

import inspect
import os
import sys

import pytest

from keras_tnt.cli.images import find_images, report
from keras_tnt.images.folders import Skipped, match_held_out, match_name, walk_images

pytestmark = pytest.mark.one_backend


def touch(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


def walk(root):
    skipped = Skipped()
    return [os.path.relpath(path, root) for path in walk_images(root, skipped)], dict(skipped)


def test_images_are_sorted_and_suffixes_are_case_insensitive(tmp_path):
    touch(tmp_path, "b/2.JFIF", "b/1.jpe", "a.PNG", "c.webp", "notes.txt")
    assert walk(tmp_path) == (
        ["a.PNG", "b/1.jpe", "b/2.JFIF", "c.webp"],
        {"files without the suffix of an image": 1},
    )


def test_hidden_and_system_files_are_counted_by_reason(tmp_path):
    touch(tmp_path, "a/1.jpg", "a/._1.jpg", "a/.hidden.jpg", ".ipynb_checkpoints/1.jpg")
    touch(tmp_path, "__MACOSX/a/1.jpg", "a/@eaDir/1.jpg", "$RECYCLE.BIN/2.png", "._folder/1.jpg")
    assert walk(tmp_path) == (
        ["a/1.jpg"],
        {
            "system folders": 3,
            "hidden folders": 1,
            "hidden files": 1,
            "AppleDouble files": 1,
            "AppleDouble folders": 1,
        },
    )


def test_fifos_devices_and_broken_links_are_skipped(tmp_path):
    touch(tmp_path, "1.jpg")
    os.mkfifo(tmp_path / "2.jpg")
    (tmp_path / "3.jpg").symlink_to("/dev/zero")
    (tmp_path / "4.jpg").symlink_to("nowhere")
    (tmp_path / "5.jpg").symlink_to("5.jpg")
    (tmp_path / "6.jpg").symlink_to("1.jpg")
    (tmp_path / "7.jpg").symlink_to("2.jpg")
    images, skipped = walk(tmp_path)
    assert images == ["1.jpg", "6.jpg"]
    assert skipped["FIFOs, sockets and devices"] == 3 and sum(skipped.values()) == 5


def test_linked_folders_are_walked_once(tmp_path):
    root, other = tmp_path / "root", tmp_path / "other"
    touch(root, "a/1.jpg")
    touch(other, "2.jpg")
    for link in ("a/x", "a/y"):
        (root / link).symlink_to(other)
    (root / "a" / "up").symlink_to("..")
    (root / "above").symlink_to(tmp_path)
    (other / "back").symlink_to(root)
    images, skipped = walk(root)
    assert images == ["a/1.jpg", "a/x/2.jpg"]
    assert skipped == {"links to folders that are walked already": 4}


def test_folders_deeper_than_the_path_limit_are_counted(tmp_path, monkeypatch):
    touch(tmp_path, "1.jpg")
    monkeypatch.chdir(tmp_path)
    for _ in range(20):
        os.mkdir("d" * 250)
        os.chdir("d" * 250)
    images, skipped = walk(tmp_path)
    assert images == ["1.jpg"]
    assert skipped == {"folders that cannot be listed (File name too long)": 1}


def test_folders_nested_deeper_than_the_recursion_limit_are_walked(tmp_path):
    path = "/".join("d" * 200)
    touch(tmp_path, f"{path}/1.jpg")
    limit = sys.getrecursionlimit()
    try:
        sys.setrecursionlimit(len(inspect.stack(0)) + 100)
        found = list(walk_images(tmp_path))
    finally:
        sys.setrecursionlimit(limit)
    assert len(found) == 1


def test_commands_walk_equally_and_print_what_they_skip(tmp_path, capsys):
    touch(tmp_path, "a/1.jpg", "a/._1.jpg", ".git/x.png")
    skipped = Skipped()
    assert list(find_images([str(tmp_path), "b.txt"], skipped)) == [
        str(tmp_path / "a/1.jpg"),
        "b.txt",
    ]
    report(skipped)
    assert "skipped 1 hidden folders, 1 AppleDouble files" in capsys.readouterr().err
    with pytest.raises(ValueError, match="holds no image: .*skipped 1 hidden files"):
        touch(tmp_path, "empty/.x.jpg")
        list(find_images([str(tmp_path / "empty")]))


def test_exact_case_has_precedence_in_name_matching():
    assert match_name("train", ["Train", "train"]) == "train"
    assert match_name("train", ["tRAIN"]) == "tRAIN" and match_name("train", ["trains"]) is None
    with pytest.raises(ValueError, match="differ in upper and lower case alone"):
        match_name("train", ["Train", "TRAIN"])
    assert match_held_out(["test", "dev", "Valid"]) == "Valid"
    assert match_held_out(["train"]) is None
