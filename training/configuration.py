"""Training configuration: one table of fields, from which defaults, help texts and flags are made.

Precedence, highest first: a flag, the `--config` file, the recipe, the default in this table.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
from typing import Any

from absl import flags

from training import config_files, recipes, sources

STRATEGIES = ("one_device", "mirrored", "multi_worker", "tpu")
SCHEDULES = ("cosine", "constant", "step", "linear")
CROP_MODES = ("random_resized", "simple")
INTERPOLATIONS = ("bicubic", "bilinear", "random")
PRECISIONS = ("float32", "bfloat16", "float16")
LOSSES = ("cross_entropy", "bce")
# The names of `keras_tnt.Distiller`'s `teacher_preprocessing`; "none" is an earlier name of "same".
TEACHER_PREPROCESSING = ("auto", "same", "pixels", "unit", "tf", "torch", "caffe", "none")
# Arguments of a builder that have a separate flag, or that the trainer sets.
SET_BY_FLAGS = {
    "classes": "--classes",
    "class_names": "",
    "weights": "--weights",
    "input_shape": "--image_size",
    "input_tensor": "",
    "include_top": "",
    "include_preprocessing": "",
    "pooling": "",
    "classifier_activation": "",
    "dtype": "--precision",
    "name": "",
    "stochastic_depth": "--stochastic_depth",
    "dropout": "--dropout",
    "distilled": "--distilled",
}
CROSS_DEVICE_OPS = ("auto", "nccl", "hierarchical_copy", "reduce_to_one")
COMMUNICATION = ("auto", "ring", "nccl")


def option(default, help, choices=None, may_change=False, change="") -> Any:
    """Returns a dataclass field of `Config`.

    Args:
        default: Value if no flag, file or recipe sets one; its type is the flag's type.
        help: Help text of the flag.
        choices: Allowed values. If `None`, any value of the type.
        may_change: Whether a run may be resumed with another value. Defaults to `False`.
        change: Name of the flag that permits resuming with another value. Defaults to "", no flag.
    """
    metadata = {"help": help, "choices": choices, "may_change": may_change, "change": change}
    return dataclasses.field(default=default, metadata=metadata)


# Fields that may be paths, in which `~` is expanded.
PATHS = ("workdir", "config", "data_dir", "weights", "teacher", "model")


@dataclasses.dataclass(frozen=True)
class Config:
    """Configuration of a run; each field is documented by its help text."""

    recipe: str = option(
        "digits",
        "name of a recipe in training/recipes; flags override its values. Without one: finetune "
        "for --dataset=folder, table and tfds, digits for all else",
    )
    config: str = option(
        "",
        "YAML or JSON file with values under the flags' names, such as a run's config.yaml or "
        "config.json; flags override it, and it overrides the recipe",
        may_change=True,
    )
    workdir: str = option("runs/train", "directory of the run", may_change=True)
    plugins: str = option(
        "",
        "modules to import first, by commas: those that register models, data sets, optimizers",
        may_change=True,
    )
    change: bool = option(
        False,
        "go on with the run under other learning rates, clip_norm, weight_decay or precision",
        may_change=True,
    )
    extend: bool = option(
        False, "go on with the run to more --epochs, by their schedule", may_change=True
    )
    start_afresh: bool = option(
        False, "begin at step 0 where all checkpoints of the run are damaged", may_change=True
    )

    # === Model ===
    model: str = option(
        "tnt_digits",
        "tnt_digits, or a model of keras_tnt: a published size such as tnt_small, or a family "
        "(tnt, pyramid_tnt, deit, cait), of any architecture by --model_args",
    )
    model_args: str = option(
        "", "arguments of the model's function as a JSON object, such as '{\"depth\": 4}'"
    )
    weights: str = option(
        "",
        "what to start from: imagenet, a weight file, hf://owner/repo; none or empty: random "
        "initial values",
    )
    freeze: str = option(
        "", "what does not learn: stem, so many blocks and the stem, or head, for all but the heads"
    )
    image_size: int = option(0, "side of the images in pixels; 0: the model's own")
    stochastic_depth: float = option(0.0, "rate of the last block; CaiT: of every block")
    dropout: float = option(0.0, "dropout rate")
    distilled: bool = option(False, "build the model with a distillation token and head")

    # === Data ===
    dataset: str = option("digits", f"where images come from:\n{sources.describe()}")
    data_dir: str = option("", "directory of the data set, or file of --dataset=table")
    train_split: str = option("", "name of the training split; empty: as the data set calls it")
    eval_split: str = option("", "name of the held-out split; empty: as the data set calls it")
    validation_share: float = option(
        0.0, "share of each class to hold out, by --seed, of images that are not split"
    )
    label_offset: int = option(
        0, "taken off the labels of --dataset=tfrecord (1 if they start at 1)"
    )
    classes: int = option(0, "number of classes; 0: as the data set has them")
    data_service: str = option(
        "", "address of a tf.data service that makes the training images: grpc://host:port"
    )
    max_corrupt: float = option(
        0.001, "share of the images that may be unreadable before the run stops", may_change=True
    )

    # === Devices ===
    strategy: str = option("one_device", "how devices share the work", STRATEGIES)
    cpu_devices: int = option(0, "split the CPU into so many logical devices; 0: leave it whole")
    tpu: str = option("", "name or address of the TPU, for --strategy=tpu", may_change=True)
    jit: str = option("auto", "compile the step with XLA; auto: on GPU", ("auto", "on", "off"))
    precision: str = option(
        "float32", "computation; weights stay float32", PRECISIONS, change="change"
    )
    remat: bool = option(False, "recompute the blocks in the backward pass, to save memory")
    cross_device_ops: str = option(
        "auto", "how --strategy=mirrored sums gradients over devices", CROSS_DEVICE_OPS
    )
    communication: str = option(
        "auto", "how --strategy=multi_worker sums gradients over workers", COMMUNICATION
    )
    tf32: bool = option(
        True, "let float32 products use TensorFloat-32 on GPUs that have it: 10 bits of mantissa"
    )
    steps_per_execution: int = option(
        1,
        "updates in one call of TensorFlow, between reports and checkpoints; their last bits may "
        "differ from those of single updates",
    )
    stall_minutes: float = option(
        30.0,
        "end the process, with status 1, when the start, images, an update, a batch of an "
        "evaluation or the final report take longer; 0: never",
        may_change=True,
    )
    deterministic: bool = option(True, "bit-identical results, at some speed")
    peak_tflops: float = option(
        0.0, "a device's peak, for model FLOPs utilisation; 0: look it up", may_change=True
    )

    # === Length and optimization ===
    epochs: int = option(60, "passes over the training images", change="extend")
    cooldown_epochs: int = option(
        0,
        "epochs after --epochs at the schedule's last rate; timm's scheduler adds 10",
        change="extend",
    )
    batch_size: int = option(128, "images per update, over all devices")
    seed: int = option(0, "of initial weights, order, augmentation and dropout")
    optimizer: str = option("adamw", "adamw, sgd, lion, lamb, muon, or one of --plugins")
    accumulation: int = option(1, "parts that a device's batch is computed in, one after the other")
    learning_rate: float = option(1e-3, "peak learning rate", change="change")
    learning_rate_batch: int = option(
        0, "batch size that --learning_rate is for, scaled linearly to yours; 0: no scaling"
    )
    schedule: str = option("cosine", "of the learning rate, after warm-up", SCHEDULES)
    step_epochs: float = option(30.0, "epochs between the steps of --schedule=step")
    step_factor: float = option(0.1, "factor of a step of --schedule=step")
    schedule_per_epoch: bool = option(
        False, "one learning rate for a whole epoch, as timm 0.3.2 has it, not one an update"
    )
    schedule_delay: int = option(
        0, "epochs by which --schedule_per_epoch lags its curve: 1 in DeiT's code, 0 in TNT's"
    )
    warmup_epochs: float = option(5.0, "epochs of linear warm-up", change="change")
    warmup_learning_rate: float = option(1e-6, "where warm-up starts", change="change")
    min_learning_rate: float = option(
        1e-5, "where --schedule=cosine and linear end", change="change"
    )
    weight_decay: float = option(
        0.05,
        "decoupled; on kernels, the distillation token and relative positions, as published",
        change="change",
    )
    beta_1: float = option(0.9, "decay of the gradients' mean: adamw, lamb, muon; lion's blend")
    beta_2: float = option(0.999, "decay of the gradients' square: adamw, lamb, muon; lion's mean")
    momentum: float = option(0.9, "Nesterov momentum: sgd, muon")
    clip_norm: float = option(0.0, "largest global norm of the gradients; 0: any", change="change")
    layer_decay: float = option(
        1.0, "factor on the learning rate from each block to the one before", change="change"
    )
    ema: float = option(0.0, "decay of the moving average of the weights; 0: none")
    ema_warmup: bool = option(
        False,
        "let the decay of --ema grow from 0 as timm's ModelEmaV3 does: 1 - (1 + updates)^(-2/3)",
    )
    loss: str = option(
        "cross_entropy",
        "of the class head; bce: binary cross-entropy, of the smoothed labels, as in timm, or with "
        "--label_smoothing=0 of labels in which every class of a mixed image counts as present "
        "(DeiT III)",
        LOSSES,
    )
    label_smoothing: float = option(0.0, "share of the label spread over all classes")

    # === Augmentation ===
    augmentation: str = option(
        "builtin", "whose RandAugment, mixup, cutmix and erasing", ("builtin", "keras_cv")
    )
    repeats: int = option(1, "repeated augmentation: how often an image stands in a batch")
    crop_mode: str = option(
        "random_resized",
        "random_resized: a crop of random area, from --min_crop on, and aspect ratio; simple: "
        "DeiT III's simple random crop, of the image resized to cover the model's and padded by 4",
        CROP_MODES,
    )
    min_crop: float = option(1.0, "smallest share of the area of a random crop; 1: no random crop")
    interpolation: str = option(
        "bicubic",
        "of random resized crops and RandAugment's geometric ops; random: bilinear or bicubic, "
        "drawn for each crop and op",
        INTERPOLATIONS,
    )
    flip: bool = option(False, "flip left to right with even odds")
    shift: int = option(0, "random shift by up to so many pixels")
    rotate: float = option(0.0, "random rotation by up to so many degrees")
    color_jitter: float = option(
        0.0, "brightness, contrast and saturation, in random order; off under RandAugment"
    )
    randaugment: bool = option(False, "RandAugment rand-m9-mstd0.5-inc1")
    three_augment: bool = option(
        False,
        "3-Augment of DeiT III: grayscale, solarize or Gaussian blur, before --color_jitter; in "
        "place of a recipe's --randaugment",
    )
    erasing: float = option(0.0, "probability of random erasing, in pixel mode")
    erase_after_mixing: bool = option(
        False, "mix in whole numbers and erase afterwards, as TNT's loader; off: erase, then mix"
    )
    mixup: float = option(0.0, "alpha of mixup; 0: none")
    cutmix: float = option(0.0, "alpha of cutmix; 0: none. With mixup, one of the two a group")
    mix_groups: int = option(
        0,
        "groups of a batch that each draw mixup or cutmix, image i mixed with the last but i, as "
        "each GPU did in the published training; 0: 8, or the next number that devices, "
        "accumulation and batch allow",
    )
    mix_off_epochs: int = option(0, "epochs at the end without mixup and cutmix")

    # === Distillation ===
    distill: str = option("none", "learn from a teacher", ("none", "hard", "soft"))
    teacher: str = option("", "a model of keras_tnt (its public weights), or a .keras file")
    teacher_preprocessing: str = option(
        "auto",
        "preprocessing of the teacher's images. auto: detected for models of keras_tnt, of "
        "keras.applications and models with a Rescaling layer; same: what the student takes; "
        "pixels: values in [0, 255]; unit: in [0, 1]; tf, torch, caffe: the modes of "
        "keras.applications",
        TEACHER_PREPROCESSING,
    )
    distill_alpha: float = option(0.5, "share of the distillation loss")
    temperature: float = option(1.0, "softens student and teacher, for --distill=soft")

    # === Evaluation, reports, checkpoints ===
    crop: float = option(
        0.0, "share of the side that evaluation crops from the middle; 0: the model's own"
    )
    early_stopping: int = option(
        0,
        "end after so many evaluations without a better accuracy, with the best weights; 0: never",
        may_change=True,
    )
    evaluate_epochs: int = option(1, "epochs between evaluations", may_change=True)
    steps_per_epoch: int = option(0, "updates an epoch; 0: as the data set has images")
    report_steps: int = option(0, "steps between reports; 0: 100, or an epoch", may_change=True)
    find_learning_rate: bool = option(
        False,
        "draw the loss over a ramp of learning rates and name one; no run is begun",
        may_change=True,
    )
    report: bool = option(
        True, "at the end: pictures and tables of the held-out images", may_change=True
    )
    tensorboard: bool = option(True, "write TensorBoard events too", may_change=True)
    logger: str = option(
        "",
        "experiment trackers that receive every report, by commas: wandb, mlflow, or one of "
        "--plugins",
        may_change=True,
    )
    profile_steps: str = option(
        "",
        "first and last update, counted from 1, of which a trace for TensorBoard is written, such "
        "as 10,20",
        may_change=True,
    )
    checkpoint_minutes: float = option(10.0, "minutes between checkpoints", may_change=True)
    checkpoint_steps: int = option(0, "steps between checkpoints; 0: by time", may_change=True)
    keep: int = option(2, "how many of the last checkpoints to keep", may_change=True)
    keep_best: int = option(
        0,
        "how many checkpoints of the best evaluations to keep in addition, for training/average.py;"
        " 0: best.safetensors alone",
        may_change=True,
    )
    max_rollbacks: int = option(
        3, "how often a run may go back after a NaN or a blow-up", may_change=True
    )
    max_skipped_updates: int = option(
        50,
        "stop after this number of updates in a row that --precision=float16 skipped, because "
        "their gradients overflowed; 0: never",
        may_change=True,
    )

    def __post_init__(self):
        """Expands `~` in paths, normalizes `model_args` and validates all fields.

        Raises:
            ValueError: If a value, or a combination of values, is invalid.
        """
        for name in PATHS:
            object.__setattr__(self, name, os.path.expanduser(getattr(self, name)))
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), field.metadata["choices"]
            if choices and value not in choices:
                raise ValueError(f"--{field.name} must be one of {', '.join(choices)}: {value!r}")
            if isinstance(value, int | float) and value < 0:
                raise ValueError(f"--{field.name} must not be negative: {value}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"--{field.name} must be a finite number: {value}")
        for name in (
            *("epochs", "batch_size", "accumulation", "repeats", "evaluate_epochs", "keep"),
            "steps_per_execution",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1: {getattr(self, name)}")
        rates = ("stochastic_depth", "dropout", "label_smoothing", "ema", "erasing", "max_corrupt")
        for name in (*rates, "distill_alpha", "min_crop", "crop", "validation_share"):
            if getattr(self, name) > 1:
                raise ValueError(f"--{name} is a share, at most 1: {getattr(self, name)}")
        if self.cpu_devices and self.strategy not in ("one_device", "mirrored"):
            raise ValueError("--cpu_devices goes with --strategy=one_device or mirrored")
        if (self.distill == "none") != (not self.teacher):
            raise ValueError(
                "--distill=hard|soft and --teacher go together; one of them is missing"
            )
        if self.teacher_preprocessing != "auto" and not self.teacher:
            raise ValueError("--teacher_preprocessing goes with --teacher, which is missing")
        if self.ema_warmup and not self.ema:
            raise ValueError(
                "--ema_warmup goes with --ema, the decay that it grows to, such as --ema=0.9999"
            )
        if self.schedule == "step" and not self.step_epochs:
            raise ValueError("--step_epochs must be more than 0 for --schedule=step: 0.0")
        object.__setattr__(self, "model_args", normalize_model_args(self.model_args))
        profile_steps(self)
        if self.three_augment and self.randaugment:
            raise ValueError(
                "--three_augment takes the place of --randaugment, which this run has too: add "
                "--norandaugment"
            )
        sources.check(self)
        if not self.workdir:
            raise ValueError("--workdir must name a directory")

    @property
    def total_epochs(self):
        """Number of epochs of the whole run, cooldown included."""
        return self.epochs + self.cooldown_epochs


FIELDS = {field.name: field for field in dataclasses.fields(Config)}


def model_arguments(config):
    """Returns `--model_args` as a dict."""
    return parse_model_args(config.model_args)


def normalize_model_args(text):
    """Returns `--model_args` as JSON with sorted names, so that equal arguments are equal text.

    Raises:
        ValueError: As `parse_model_args`.
    """
    arguments = parse_model_args(text)
    return json.dumps(arguments, sort_keys=True) if arguments else ""


def parse_model_args(given):
    """Returns the dict that `--model_args` describes, {} for an empty text.

    Args:
        given: Text of the flag.

    Raises:
        ValueError: If it is not a JSON object, has a name twice, or sets an argument that has its
            own flag.
    """
    if not given:
        return {}
    example = """--model_args='{"depth": 4}'"""
    try:
        arguments = config_files.parse_json(given)
    except RecursionError as error:
        raise ValueError(
            f"--model_args must be a JSON object, such as {example}. It is nested too deeply"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"--model_args must be a JSON object, such as {example}. Received: {given!r} ({error})"
        ) from error
    if not isinstance(arguments, dict):
        raise ValueError(
            f"--model_args must be a JSON object, such as {example}. Received: {given!r}"
        )
    for name in SET_BY_FLAGS.keys() & arguments.keys():
        flag = SET_BY_FLAGS[name]
        instead = f"give {flag}" if flag else "the trainer sets it"
        raise ValueError(f"--model_args must not set {name!r}: {instead}. Received: {given!r}")
    return arguments


def profile_steps(config):
    """Returns the first and last update of `--profile_steps`, counted from 1, or `None` if unset.

    Raises:
        ValueError: If it is not such a pair.
    """
    if not config.profile_steps:
        return None
    found = re.fullmatch(r"\s*([0-9]{1,12})\s*,\s*([0-9]{1,12})\s*", config.profile_steps)
    first, last = map(int, found.groups()) if found else (0, 0)
    if not 1 <= first <= last:
        raise ValueError(
            "--profile_steps must be the first and the last update to trace, counted from 1, such "
            f"as --profile_steps=10,20. Received: {config.profile_steps!r}"
        )
    return first, last


def warnings(config):
    """Returns a warning for each value that is valid but probably a mistake."""
    found = []
    if config.warmup_epochs >= config.epochs:
        found.append(
            f"--warmup_epochs={config.warmup_epochs:g} outlast the run of --epochs="
            f"{config.epochs}: the learning rate never reaches --learning_rate="
            f"{config.learning_rate:g}. Give fewer --warmup_epochs or more --epochs"
        )
    return found


def make(recipe=None, **values):
    """Returns the configuration of a recipe with some fields overridden; imports `plugins` first.

    Args:
        recipe: Name of the recipe. If `None`, the `recipe` of the file `config`; without one
            "finetune" for the data sets folder, table and tfds, else "digits".
        **values: Fields of `Config`. Those in the file that `config` names are used where neither
            `values` nor `recipe` sets them. `three_augment` replaces the recipe's RandAugment.

    Returns:
        A `Config`.

    Raises:
        ValueError: If the recipe or a field does not exist, or a value is invalid.
        OSError: If the file `config` cannot be read.
        ImportError: If a module of `plugins` cannot be imported.

    Example:
        >>> make("digits", epochs=3, workdir="/tmp/run").epochs
        3
    """
    unknown = sorted(set(values) - set(FIELDS))
    if unknown:
        raise ValueError(f"no such value: {', '.join(unknown)}. There are: {', '.join(FIELDS)}")
    values = with_file(values)
    load_plugins(values.get("plugins"))
    named = values.pop("recipe", None)
    recipe = named if recipe is None else recipe
    if recipe is None:
        own_images = values.get("dataset", "").partition(":")[0] in ("folder", "table", "tfds")
        recipe = "finetune" if own_images else "digits"
    if values.get("three_augment"):
        values.setdefault("randaugment", False)
    values = {**recipes.get(recipe).values, "recipe": recipe, **values}
    if values.get("weights") == "none":
        values["weights"] = ""
    return Config(**values)


def with_file(values):
    """Returns `values` merged with those in the file that `config` names; `values` win."""
    path = values.get("config")
    if not path:
        return values
    kinds = {name: type(field.default) for name, field in FIELDS.items()}
    return {**config_files.read(path, kinds), **values}


def define_flags(names=tuple(FIELDS)):
    """Defines absl flags for fields.

    Unset flags are `None`, so that the file's or the recipe's value is used.

    Args:
        names: Fields to define flags for. Defaults to all.
    """
    for name in names:
        field = FIELDS[name]
        help, choices, default = field.metadata["help"], field.metadata["choices"], field.default
        if default not in ("", 0) or isinstance(default, bool):
            help = f"{help} (default: {default}, or the recipe's)"
        if choices:
            flags.DEFINE_enum(name, None, choices, help)
        else:
            define = {
                bool: flags.DEFINE_bool,
                int: flags.DEFINE_integer,
                float: flags.DEFINE_float,
                str: flags.DEFINE_string,
            }[type(default)]
            define(name, None, help)


def from_flags(values):
    """Returns the configuration given by parsed flags.

    Args:
        values: An `absl.flags.FlagValues`.
    """
    given = {name: values[name].value for name in FIELDS if values[name].value is not None}
    return make(**given)


def load_plugins(modules):
    """Imports the modules of `--plugins`, which register models, data sets and optimizers.

    Call it before anything is looked up by name.

    Args:
        modules: Comma-separated module names.
    """
    if modules:
        from keras_tnt.models import registry

        registry.load_plugins(modules)


def differences(config, recorded):
    """Compares a configuration with a recorded one.

    Args:
        config: A `Config`.
        recorded: Dict of the recorded fields. Missing fields have their defaults.

    Returns:
        Dict from field name to (recorded, given), without the fields that may change freely.
    """
    old = {name: recorded.get(name, field.default) for name, field in FIELDS.items()}
    with contextlib.suppress(ValueError, TypeError):
        # Earlier versions recorded the text as it was given.
        old["model_args"] = normalize_model_args(old["model_args"])
    return {
        name: (old[name], getattr(config, name))
        for name, field in FIELDS.items()
        if not field.metadata["may_change"] and old[name] != getattr(config, name)
    }


def change_flag(name, old, new):
    """Returns the flag that permits resuming a run with a changed value, or "" if none does.

    Args:
        name: Field of `Config`.
        old: Recorded value.
        new: Given value.
    """
    if name in ("epochs", "cooldown_epochs") and new < old:
        return ""
    return FIELDS[name].metadata["change"]
