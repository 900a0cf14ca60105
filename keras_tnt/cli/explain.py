"""`keras-tnt explain`: writes a page with the attention and relevance of images."""

import itertools
import os
import sys

import numpy as np

from keras_tnt.cli.images import evaluation_array, find_images, report
from keras_tnt.files import check_destination
from keras_tnt.images.folders import Skipped

HELP = "write a page with the predictions for images, what the model attends to, and why"
MOST_IMAGES = 50


def add_arguments(parser):
    """Adds the subcommand's arguments to a parser."""
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image file, or folder of them")
    parser.add_argument(
        "--model",
        default="TNTSmall",
        help="a name that `keras-tnt list` gives, a .keras file, or the directory of a run or of "
        "save_pretrained",
    )
    parser.add_argument(
        "--weights",
        default="imagenet",
        help="of a model that is named: imagenet, another name of keras_tnt.list_weights(), "
        "hf://owner/repository, a file, or none for random ones",
    )
    parser.add_argument("--out", default="explore.html", help="page to write")


def run(options):
    """Writes the page, prints its path and returns exit status 0."""
    from keras_tnt.cli.cards import saved_model_folder

    check_destination(options.out, "--out")
    if options.model.endswith(".onnx") or saved_model_folder(options.model):
        raise ValueError(
            "--model must be a Keras model for explain: a name, a .keras file, the directory of a "
            f"run or of save_pretrained. Received: '{options.model}', an export, which gives no "
            "attention. Name the model that was exported."
        )
    skipped = Skipped()
    paths = list(itertools.islice(find_images(options.images, skipped), MOST_IMAGES + 1))
    if len(paths) > MOST_IMAGES:
        raise ValueError(f"A page shows {MOST_IMAGES} images at most. Name fewer.")
    missing = next((path for path in paths if not os.path.isfile(path)), None)
    if missing is not None:
        raise ValueError(f"There is no image file '{missing}'.")

    from keras_tnt.cli.runtime import load_model, open_keras
    from keras_tnt.inspection import explore

    report(skipped)
    say(f"loading {options.model}")
    model = load_model(options.model, options.weights)
    transform = open_keras(model, features=False, count=1).transform
    images = np.stack([evaluation_array(path, transform) for path in paths])
    say(f"explaining {len(paths)} image{'s' if len(paths) > 1 else ''}")
    explore(model, images, options.out, titles=[os.path.basename(path) for path in paths])
    print(options.out)
    return 0


def say(text):
    """Prints progress on stderr."""
    print(f"{text} ...", file=sys.stderr, flush=True)
