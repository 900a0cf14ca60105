"""`keras-tnt predict`: writes the predictions for images to a table."""

import collections
import concurrent.futures
import hashlib
import itertools
import json
import math
import os
import re
import sys
import time

import numpy as np

from keras_tnt.cli.images import evaluation_array, find_images, report
from keras_tnt.cli.table import Table, check_path, held, shard_path
from keras_tnt.images.folders import Skipped
from keras_tnt.text import first_line, printable

DEFAULT_TOP = 5
LONGEST = 4096  # characters of a name that are shown
HELP = "name what images show, or give their features"


def add_arguments(parser):
    """Adds the subcommand's arguments to a parser."""
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image file, or folder of them")
    parser.add_argument(
        "--model",
        default="TNTSmall",
        help="a name that `keras-tnt list` gives, a .keras or .onnx file, the directory of a run, "
        "of save_pretrained or of a SavedModel",
    )
    parser.add_argument(
        "--weights",
        default="imagenet",
        help="of a model that is named: imagenet, another name of keras_tnt.list_weights(), "
        "hf://owner/repository, a file, or none for random ones",
    )
    parser.add_argument(
        "--top", type=int, help=f"how many classes to name (default: {DEFAULT_TOP})"
    )
    parser.add_argument("--features", action="store_true", help="what the classifier reads instead")
    parser.add_argument("--out", help="table to write: .csv, .jsonl or .parquet; else it is shown")
    parser.add_argument(
        "--shard", help="3/16: the third of sixteen shares of the images, in a table of its own"
    )
    parser.add_argument("--batch_size", type=int, help="images at once")
    parser.add_argument("--json", action="store_true", help="show JSON")


def run(options):
    """Prints the predictions or writes the table, and returns the exit status."""
    options.is_top_given = options.top is not None
    if not options.is_top_given:
        options.top = DEFAULT_TOP
    if options.top < 1:
        raise ValueError(f"--top must be 1 or more. Received: {options.top}")
    if options.batch_size is not None and options.batch_size < 1:
        raise ValueError(f"--batch_size must be 1 or more. Received: {options.batch_size}")
    if not any(map(os.path.exists, options.images)):
        raise ValueError(f"There is no image file '{options.images[0]}'.")
    shard, shards = parse_shard(options.shard)
    if options.shard and not options.out:
        raise ValueError("--shard needs --out: the table that `keras-tnt merge` joins.")
    if not options.out:
        return show(options, prepare(options)[0])
    path = shard_path(options.out, shard, shards) if options.shard else options.out
    check_path(path)
    with held(path) as reason:
        if reason:
            say(f"'{path}' cannot be locked ({reason}): start no second command on it.")
        make(path, options, shard, shards)
    return 0


def prepare(options):
    """Returns (number of images, hash of their list); sets the batch size and `skipped`."""
    count, digest, options.skipped = survey(options.images)
    from keras_tnt.cli import runtime

    options.batch_size = options.batch_size or runtime.default_batch_size(options.model)
    return count, digest


def make(path, options, shard, shards):
    """Computes a table that this process has locked."""
    from keras_tnt.cli import runtime

    count, digest = prepare(options)
    table = Table(
        path,
        {
            "model": options.model,
            "content of the model": runtime.identity(options.model),
            "weights": options.weights,
            "content of the weights": runtime.identity(options.weights),
            "features": options.features,
            "top": options.top,
            "batch_size": options.batch_size,
            "number of images": count,
            "list of images": digest,
            "shard": [shard, shards],
        },
    )
    if table.finished:
        say(f"'{path}' is done.")
    else:
        fill(table, options, *share(count, options.batch_size, shard, shards))


def share(count, batch_size, shard, shards):
    """Returns (first, last + 1) of the images of a shard, in whole batches.

    The same images form a batch for any number of shards and after any interruption, so that
    results are bit-identical.
    """
    batches = -(-count // batch_size)
    return tuple(min(count, batches * k // shards * batch_size) for k in (shard - 1, shard))


def fill(table, options, start, stop):
    """Predicts the images [start, stop) that are missing in the table."""
    runtime = open_model(options, stop - start)
    batch = options.batch_size
    with table.rows(width_of(runtime, options), stop - start, batch) as journal:
        missing = journal.missing()
        if journal.damaged:
            say(f"Damaged rows of '{journal.path}' are made again: {journal.damaged:,} records.")
        left = (b for b, is_missing in enumerate(missing) if is_missing)
        remaining = sum(
            min(batch, stop - start - b * batch)
            for b, is_missing in enumerate(missing)
            if is_missing
        )
        images = itertools.islice(find_images(options.images), start, stop)
        images = (path for i, path in enumerate(images) if missing[i // batch])
        progress = Progress(stop - start - remaining, stop - start)
        unreadable = 0
        for rows in predictions(images, runtime, options):
            journal.add(next(left) * batch, rows)
            progress.add(len(rows))
            unreadable += sum("error" in row for row in rows)
        progress.end(unreadable)


def show(options, count):
    """Prints the predictions without a table, and returns the exit status."""
    runtime = open_model(options, count)
    status, shown = 0, 0
    batches = predictions(find_images(options.images), runtime, options)
    for row in itertools.chain.from_iterable(batches):
        if "error" in row:
            print(f"error: {first_line(row['error'])}", file=sys.stderr)
            status = 1
            continue
        if options.json:
            text = json.dumps(row, indent=2).replace("\n", "\n  ")
            print("[\n  " if not shown else ",\n  ", text, sep="", end="")
        else:
            print(as_text(row), flush=True)
        shown += 1
    if options.json:
        print("\n]" if shown else "[]")
    return status


def as_text(row):
    """Returns a row as text for the terminal."""
    lines = [printable(row["file"], LONGEST)]
    if "features" in row:
        lines.append("  " + " ".join(f"{as_float(value):.4g}" for value in row["features"]))
    for found in row.get("predictions", ()):
        name = found.get("name", f"class {found['class']}")
        lines.append(f"  {as_float(found['score']):6.1%}  {printable(name, LONGEST)}")
    return "\n".join(lines)


# === Predictions ===


def open_model(options, count):
    """Returns the `Runtime` of the model, and reports skipped files and a too large `--top`."""
    from keras_tnt.cli.runtime import open_runtime

    runtime = open_runtime(options.model, options.weights, options.features, count)
    report(options.skipped)
    if options.is_top_given and not options.features and options.top > runtime.width:
        say(f"--top={options.top}: the model has {runtime.width} classes, and all are given.")
    return runtime


def width_of(runtime, options):
    """Returns the number of predictions or features in a row."""
    return runtime.width if options.features else min(options.top, runtime.width)


def predictions(paths, runtime, options):
    """Yields a list of rows per batch, while the images of the next ones are decoded."""
    images = decoded(paths, runtime.transform, 2 * options.batch_size)
    describe = features_of if options.features else best_of
    while batch := list(itertools.islice(images, options.batch_size)):
        readable = [pixels for _, pixels in batch if not isinstance(pixels, str)]
        if not readable:
            yield [{"file": text_of(path), "error": error} for path, error in batch]
            continue
        # Unreadable images are replaced by zeros, so that the batch has a compiled size.
        blank = np.zeros_like(readable[0])
        pixels = np.stack([blank if isinstance(x, str) else x for _, x in batch])
        results = np.asarray(runtime.predict(pixels), "float32")
        if results.shape != (len(batch), runtime.width):
            raise ValueError(
                f"The model gives results of shape {results.shape} for {len(batch)} images, where "
                f"({len(batch)}, {runtime.width}) is its own description."
            )
        yield [
            {"file": text_of(path), "error": found}
            if isinstance(found, str)
            else {"file": text_of(path), **describe(result, runtime, options.top)}
            for (path, found), result in zip(batch, results, strict=True)
        ]


def text_of(path):
    r"""Returns a path as text; bytes that are not UTF-8 become `\xff` and the like."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def decoded(paths, transform, ahead):
    """Yields (path, pixels or error message) in order, decoding up to `ahead` images in advance."""
    workers = max(1, os.cpu_count() or 1)
    pool = concurrent.futures.ThreadPoolExecutor(workers)
    pending = collections.deque()
    try:
        for path in paths:
            pending.append((path, pool.submit(read, path, transform)))
            if len(pending) > ahead:
                path, future = pending.popleft()
                yield path, future.result()
        for path, future in pending:
            yield path, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def read(path, transform):
    """Returns the pixels of an image file, or the error message if it cannot be read."""
    try:
        return evaluation_array(path, transform)
    except (ValueError, OSError, MemoryError) as error:
        return first_line(error) or type(error).__name__


def features_of(result, runtime, top):
    """Returns the features of an image as the content of a row."""
    return {"features": [rounded(value) for value in result]}


def best_of(scores, runtime, top):
    """Returns the `top` most likely classes of an image as the content of a row."""
    best = np.argsort(-scores, kind="stable")[:top]
    return {"predictions": [runtime.about(int(i)) | {"score": rounded(scores[i])} for i in best]}


def rounded(value):
    """Returns a number as stored in tables; `None` for NaN and infinity, which JSON lacks."""
    return float(f"{value:.6g}") if np.isfinite(value) else None


def as_float(value):
    """Returns a number of a row, or NaN for `None`."""
    return math.nan if value is None else value


# === Selection of images ===


def parse_shard(text):
    """Returns (3, 16) for "3/16", and (1, 1) for `None`.

    Args:
        text: value of `--shard`.

    Raises:
        ValueError: for other text.
    """
    if text is None:
        return 1, 1
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError(f"--shard must be like 3/16, from 1/16 to 16/16. Received: {text!r}")
    return int(found[1]), int(found[2])


def survey(images):
    """Returns the number of images, a hash of their paths in order, and the `Skipped` files."""
    total, count, skipped = hashlib.sha256(), 0, Skipped()
    for path in find_images(images, skipped):
        total.update(path.encode("utf-8", "surrogateescape") + b"\0")
        count += 1
    return count, total.hexdigest(), skipped


# === Progress ===


class Progress:
    """Progress reports on stderr: continuous on a terminal, else twice a minute.

    Args:
        done: number of images that are already done.
        total: total number of images.
    """

    def __init__(self, done, total):
        """Starts the clock, and reports the images that are already done."""
        self.before, self.done, self.total = done, done, total
        self.begun = self.said = time.monotonic()
        self.terminal = sys.stderr.isatty()
        if done:
            say(f"{done:,} of {total:,} images are done.")

    def add(self, count):
        """Adds to the number of images that are done, and reports if it is time."""
        self.done += count
        now = time.monotonic()
        if now - self.said >= (0.5 if self.terminal else 30):
            self.said = now
            rate = (self.done - self.before) / (now - self.begun)
            left = time.strftime("%H:%M:%S", time.gmtime((self.total - self.done) / rate))
            text = f"{self.done:,}/{self.total:,} images, {rate:.1f} images/s, {left} left"
            say(f"\r{text}\x1b[K" if self.terminal else text, end="" if self.terminal else "\n")

    def end(self, unreadable):
        """Reports the total, and the number of images that could not be read."""
        rate = (self.done - self.before) / max(time.monotonic() - self.begun, 1e-9)
        say(
            f"{chr(13) if self.terminal else ''}{self.done:,} images, {rate:.1f} images/s"
            + (f"; {unreadable:,} could not be read, as their rows say" if unreadable else "")
        )


def say(text, end="\n"):
    """Prints a message on stderr."""
    print(text, end=end, file=sys.stderr, flush=True)
