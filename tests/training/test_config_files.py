"""`--config`: files of values, their precedence, and errors."""

import json
import sys

import pytest

from training import config_files, configuration, sources


@pytest.fixture
def written(tmp_path):
    """Returns a function that writes a file and returns its path."""

    def write(text, name="run.yaml"):
        path = tmp_path / name
        path.write_text(text if isinstance(text, str) else json.dumps(text), encoding="utf-8")
        return str(path)

    return write


def test_precedence_is_flags_file_recipe_defaults(written):
    path = written("recipe: tnt_small\nepochs: 7\nseed: 3\n")
    config = configuration.make(config=path, seed=5)
    assert (config.recipe, config.epochs, config.seed) == ("tnt_small", 7, 5)
    recipe = configuration.make("tnt_small")
    assert config.ema == recipe.ema != configuration.Config().ema
    assert config.keep == configuration.Config().keep
    assert configuration.make("digits", config=path).recipe == "digits"
    assert configuration.make(config=path, recipe="deit_tiny").model == "deit_tiny"


def test_recipe_defaults_to_that_of_the_data_set(written):
    path = written("dataset: folder\ndata_dir: images\n")
    assert configuration.make(config=path).recipe == "finetune"


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("learning_rate: 1e-3", "learning_rate", 1e-3),
        ("learning_rate: 2", "learning_rate", 2.0),
        ('learning_rate: "5E-4"', "learning_rate", 5e-4),
        ("jit: on", "jit", "on"),
        ("jit: off", "jit", "off"),
        ("freeze: 2", "freeze", "2"),
        ("data_dir: 1:30", "data_dir", "1:30"),
        ("train_split: 2026-01-02", "train_split", "2026-01-02"),
        ("steps_per_epoch: 010", "steps_per_epoch", 10),
        ("profile_steps: 10,20", "profile_steps", "10,20"),
        ("profile_steps: [3, 4]", "profile_steps", "3,4"),
        ("logger: [wandb, mlflow]", "logger", "wandb,mlflow"),
        ("weights: null", "weights", ""),
        ("weights: none", "weights", ""),
        ("model_args: {depth: 4}", "model_args", '{"depth": 4}'),
        ("remat: true", "remat", True),
        ("", "epochs", 60),
    ],
)
def test_values_have_the_types_of_flags(written, line, name, value):
    found = getattr(configuration.make("digits", config=written(line + "\n")), name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epocs: 3", r"no value 'epocs'. Did you mean --epochs"),
        ("batch-size: 3", r"no value 'batch-size'. Did you mean --batch_size\?"),
        ("lr: 0.1", r"Did you mean --learning_rate\?"),
        ("epochs: 3.5", "epochs must be a whole number. Received: 3.5"),
        ("epochs: true", "epochs must be a whole number. Received: True"),
        ('epochs: "3"', "epochs must be a whole number. Received: '3'"),
        ("remat: 1", "remat must be true or false. Received: 1"),
        ("remat: yes", "remat must be true or false. Received: 'yes'"),
        ("learning_rate: fast", "learning_rate must be a number. Received: 'fast'"),
        ("learning_rate: null", "learning_rate must be a number. Received: None"),
        ("model: {depth: 3}", "model must be text"),
        ("model: 1.5", "model must be text"),
        ("epochs: 3\nepochs: 4", "'epochs' is given twice"),
        ("a: &x [1]\nb: *x", "aliases"),
        ("- epochs", "must hold values by name"),
        ("3", "must hold values by name"),
        ("epochs: [", "cannot be read"),
        ("epochs: !!python/object/apply:os.getcwd []", "cannot be read"),
        ("? [1]\n: 2", "cannot be read"),
        ("config: other.yaml", "must not name another file"),
        ("epochs: 0", "--epochs must be at least 1"),
        ("learning_rate: .nan", "--learning_rate must be a finite number"),
        ("schedule: cosin", "--schedule must be one of"),
        ("[" * 5000, "nested too deeply"),
    ],
)
def test_invalid_file_error_names_the_file(written, text, message):
    path = written(text + "\n")
    with pytest.raises(ValueError, match=message) as caught:
        configuration.make("digits", config=path)
    assert path in str(caught.value) or "--" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"epochs": 1, "epochs": 2}', "given twice"),
        ('{"epochs": "1"}', "whole number"),
        ('{"learning_rate": 1' + "0" * 400 + "}", "finite"),
        ("[1]", "values by name"),
        ("{", "cannot be read"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_json_is_validated_too(written, text, message):
    with pytest.raises(ValueError, match=message):
        configuration.make("digits", config=written(text, "run.json"))


def test_missing_or_unsupported_file_raises(tmp_path, written):
    for path, message in (
        (tmp_path / "none.yaml", "there is no file"),
        (written("epochs: 3", "run.txt"), "must be a .yaml, .yml or .json file"),
    ):
        with pytest.raises(ValueError, match=message):
            configuration.make("digits", config=str(path))
    (tmp_path / "directory.yaml").mkdir()
    with pytest.raises(OSError, match="directory"):
        configuration.make("digits", config=str(tmp_path / "directory.yaml"))


def test_recorded_config_of_a_run_can_be_used(written):
    values = vars(configuration.make("digits", epochs=3, change=True, find_learning_rate=True))
    path = written({"config": values, "command": ["train.py"], "classes": 10}, "config.json")
    config = configuration.make(config=path, workdir="elsewhere")
    assert config.epochs == 3 and config.recipe == "digits" and config.workdir == "elsewhere"
    assert not config.change and not config.find_learning_rate


@pytest.mark.parametrize(
    "values",
    [
        {"train_split": "on", "eval_split": "1e3", "data_dir": "007", "weights": "null"},
        {"train_split": "Überlauf: # 'x'", "eval_split": " a\nb\t\x85", "data_dir": "😀\udc80"},
        {"learning_rate": 1e-30, "ema": 0.99996, "label_smoothing": 1 / 3},
        {"model_args": '{"depth": 4, "legacy": "~"}', "repeats": 3, "deterministic": False},
        {"train_split": "x" * 500 + " " + "y" * 500},
    ],
)
def test_yaml_round_trip_preserves_values(tmp_path, values):
    config = vars(configuration.Config(**values))
    path = tmp_path / "config.yaml"
    path.write_bytes(config_files.to_yaml(config, ["resumes"]).encode("utf-8"))
    kinds = {name: type(field.default) for name, field in configuration.FIELDS.items()}
    read = config_files.read(str(path), kinds)
    assert read == {k: v for k, v in config.items() if k not in config_files.ONCE}
    assert {k: type(v) for k, v in read.items()} == {k: kinds[k] for k in read}


@pytest.mark.parametrize("way", ["flags", "make"])
def test_plugin_in_the_file_is_loaded_before_validation(written, tmp_path, monkeypatch, way):
    (tmp_path / "plug_of_file.py").write_text(
        "from training import loggers, sources\n"
        "loggers.register_logger('of_file', print)\n"
        "sources.register_dataset('of_file', sources.digits)\n"
    )
    monkeypatch.delitem(sys.modules, "plug_of_file", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    from training import loggers

    monkeypatch.setattr(loggers, "LOGGERS", dict(loggers.LOGGERS))
    monkeypatch.setattr(sources.registry, "DATASETS", dict(sources.DATASETS))
    path = written("plugins: plug_of_file\nlogger: of_file\ndataset: of_file\n")

    class Flag:
        def __init__(self, value):
            self.value = value

    given = {name: Flag(None) for name in configuration.FIELDS} | {"config": Flag(path)}
    config = configuration.from_flags(given) if way == "flags" else configuration.make(config=path)
    loggers.check(config)
    assert config.logger == config.dataset == "of_file"
