"""Classify image files from the shell: `python -m keras_tnt IMAGE...`."""

import argparse
import json
import sys


def main(arguments=None):
    """Run the command.

    Args:
        arguments: list of its arguments; None: the shell's.

    Returns:
        The exit status: 0, 1 if some images could not be read, 2 if nothing could be done.
    """
    options = parser().parse_args(arguments)
    if options.top < 1:
        return fail(f"--top must be 1 or more. Received: {options.top}")

    import keras_tnt

    try:
        model = keras_tnt.create_model(options.model, weights=options.weights)
    except (ValueError, OSError, ImportError) as error:
        return fail(str(error))
    results, status = [], 0
    for path in options.images:
        try:
            image = keras_tnt.load_image(path, model)
        except ImportError as error:
            return fail(str(error))
        except (ValueError, OSError) as error:
            status = fail(str(error), 1)
            continue
        scores = model.predict(image[None], verbose=0)
        results.append({"file": path, "predictions": name(scores, options.top)})
        if not options.json:
            print(as_text(results[-1]), flush=True)
    if options.json:
        print(json.dumps(results, indent=2))
    return status


def parser():
    result = argparse.ArgumentParser(
        prog="python -m keras_tnt", description="Classify image files with a pretrained model."
    )
    result.add_argument("images", nargs="+", metavar="IMAGE", help="image file")
    result.add_argument("--model", default="TNTSmall", help="a variant of keras_tnt")
    result.add_argument(
        "--weights",
        default="imagenet",
        help="imagenet, a name of keras_tnt.list_weights(), hf://owner/repository, or a file",
    )
    result.add_argument("--top", type=int, default=5, help="how many classes to name")
    result.add_argument("--json", action="store_true", help="print JSON")
    return result


def name(scores, top):
    """The likeliest classes of one image; without names where they are not ImageNet's."""
    import keras_tnt

    if scores.shape[1] == 1000:
        [named] = keras_tnt.decode_predictions(scores, top=min(top, 1000))
        return [{"id": i, "name": label, "score": score} for i, label, score in named]
    best = scores[0].argsort()[::-1][:top]
    return [{"class": int(i), "score": float(scores[0, i])} for i in best]


def as_text(result):
    lines = [result["file"]]
    for row in result["predictions"]:
        label = row.get("name", f"class {row.get('class')}")
        lines.append(f"  {row['score']:6.1%}  {label}")
    return "\n".join(lines)


def fail(message, status=2):
    print(f"error: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
