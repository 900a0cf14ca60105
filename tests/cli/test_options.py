"""Command-line options: unknown or misplaced ones, `--version`, `--help`, and suggestions."""

import json
import re

import pytest
from PIL import Image

import keras_tnt
import keras_tnt.cli.runtime
from keras_tnt.cli import COMMANDS, info, main, parse, parsers
from keras_tnt.cli.cards import CARD
from keras_tnt.text import as_flags

pytestmark = pytest.mark.one_backend


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "x.png", "--batch-size=3"], "There is no option --batch-size. Did you mean"),
        (["predict", "x.png", "--bs=3"], "--bs. Did you mean --batch_size?"),
        (["x.png", "--topk", "3"], "--topk. Did you mean --top?"),
        (["predict", "x.png", "-o", "y.csv"], "-o. Did you mean --out?"),
        (["explain", "x.png", "--wieghts=none"], "--wieghts. Did you mean --weights?"),
        (["list", "--zzzzz"], "`keras-tnt list --help` lists the options"),
        (["--json", "list"], "Options stand after the command. Type: keras-tnt list --json"),
        (["--top=3", "predict", "x.png"], "Type: keras-tnt predict --top=3 x.png"),
        (["--jsn", "list"], "There is no option --jsn. Did you mean --json?"),
        (["--vresion"], "--vresion. Did you mean --version?"),
        (["list", "a", "b"], "What is 'b'?"),
        ([], "Name a command: predict"),
        (["rename", "x.keras"], "--classes"),
    ],
)
def test_unknown_option_is_a_one_line_error_with_a_suggestion(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(arguments)
    assert ended.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_images_may_follow_options():
    options = parse(["--top=3", "cat.jpg"])
    assert (options.images, options.top) == (["cat.jpg"], 3)


def test_version_prints_backend_and_devices(capsys):
    assert main(["--version"]) == 0
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == f"keras-tnt {keras_tnt.__version__}"
    assert second.startswith("backend: tensorflow 2.") and "keras 3." in second
    assert third.startswith("devices: ") and "CPU" in third


def test_info_without_a_model_describes_the_environment(capsys):
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["version"] == keras_tnt.__version__
    assert found["backend"].startswith("tensorflow")
    assert found["packages"]["keras"].startswith("3.") and found["devices"]
    assert main(["info"]) == 0
    assert "devices" in capsys.readouterr().out


def test_help_shows_each_default_once():
    for name in COMMANDS:
        text = parsers()[name].format_help()
        assert "None" not in text and "default: False" not in text
    text = " ".join(parsers()["predict"].format_help().split())
    assert text.count("(default: 5)") == 1 and text.count("(default: TNTSmall)") == 1


@pytest.mark.parametrize(
    ("name", "typed", "flags"),
    [
        (
            "tnt_s_patch16_224",
            "keras_tnt.create_model('tnt_small', weights='tnt_s_patch16_224.in1k')",
            "--model=tnt_small --weights=tnt_s_patch16_224.in1k",
        ),
        (
            "hf://timm/tnt_s_patch16_224.in1k@main",
            "keras_tnt.create_model('tnt_small', weights='tnt_s_patch16_224.in1k')",
            "--model=tnt_small --weights=tnt_s_patch16_224.in1k",
        ),
        (
            "timm/deit_base_patch16_384.fb_in1k",
            "keras_tnt.create_model('deit_base', weights='deit_base_patch16_384.fb_in1k')",
            "--model=deit_base --weights=deit_base_patch16_384.fb_in1k",
        ),
        (
            "deit_tiny_distilled_patch16_224",
            "weights='deit_tiny_distilled_patch16_224.fb_in1k', distilled=True)",
            "--model=deit_tiny --weights=deit_tiny_distilled_patch16_224.fb_in1k",
        ),
    ],
)
def test_weights_name_as_model_name_suggests_the_call(name, typed, flags):
    with pytest.raises(ValueError, match="is the weights name of") as error:
        keras_tnt.create_model(name)
    assert typed in str(error.value)
    assert as_flags(str(error.value)).endswith(f"Type {flags}")


def test_advice_for_a_weights_name_keeps_the_given_weights(tmp_path, capsys):
    name = "deit_tiny_distilled_patch16_224"
    with pytest.raises(ValueError, match=r"'deit_tiny', weights=None, distilled=True\)"):
        keras_tnt.create_model(name, weights=None)
    image = tmp_path / "x.png"
    Image.new("RGB", (8, 8)).save(image)
    for weights, expected in (
        ("none", "none"),
        ("x.pth", "x.pth"),
        ("imagenet", f"{name}.fb_in1k"),
    ):
        assert main([str(image), f"--model={name}", f"--weights={weights}"]) == 2
        printed = capsys.readouterr().err.rstrip()
        assert printed.endswith(f"Type --model=deit_tiny --weights={expected}")


@pytest.mark.parametrize(
    "name",
    ["tnt_s_patch16_224", "timm/tnt_s_patch16_224.in1k", "hf://timm/tnt_s_patch16_224.in1k@main"],
)
def test_info_describes_public_weights(name, capsys):
    assert main(["info", name, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["name"], found["model"]) == ("tnt_s_patch16_224.in1k", "tnt_small")
    assert (found["image_size"], found["parameters"]) == ("224x224", 23_768_584)
    small = info.about("tnt_small")
    assert found["multiply_accumulates"] == small["multiply_accumulates"]
    assert found["top1"] == small["top1"] and found["top5"] > 90


@pytest.mark.slow
def test_info_counts_the_cost_of_weights_with_other_arguments(capsys):
    assert main(["info", "deit_tiny_distilled_patch16_224", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["distilled"] == "yes"
    assert found["multiply_accumulates"] > info.about("deit_tiny")["multiply_accumulates"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pretrained": False}, "Pass weights=None"),
        ({"num_classes": 10}, "Pass `classes`"),
        ({"in_chans": 1}, r"Pass `input_shape`, \(height, width, channels\)"),
        ({"img_size": 384}, "Pass `input_shape`"),
        ({"drop_path_rate": 0.1}, "Pass `stochastic_depth`"),
        ({"global_pool": "avg"}, "Pass `pooling`"),
        ({"clases": 10}, "Did you mean `classes`"),
    ],
)
@pytest.mark.parametrize("name", ["tnt_small", "DeiTTiny", "cait", "PyramidTNT"])
def test_timm_argument_error_names_the_equivalent(name, arguments, message):
    with pytest.raises(TypeError, match=message):
        keras_tnt.create_model(name, **arguments)


@pytest.mark.parametrize("name", keras_tnt.models.registry.functions())
def test_advice_for_pretrained_is_accepted(name):
    with pytest.raises(TypeError, match="'pretrained'") as error:
        getattr(keras_tnt, name)(pretrained=True)
    message = str(error.value)
    [family] = [
        each
        for each in keras_tnt.models.registry.families()
        if name in (each.builder.__name__, *map(each.function_name, each.variants))
    ]
    public = {row.model for row in family.checkpoints}
    if name in public:
        assert "Pass weights='imagenet'" in message
    elif public:
        suggested = re.search(r"keras_tnt\.(\w+)\(weights='imagenet'\)", message)[1]
        assert suggested in public and "pass weights=None" in message
    else:
        assert f"no public weights of {name}: pass weights=None" in message
        assert "imagenet" not in message


def test_advice_is_rewritten_as_flags():
    assert as_flags("Say weights=None for random weights") == (
        "Say --weights=none for random weights"
    )
    assert as_flags("or weights='x.pth', `weights` must") == "or --weights=x.pth, --weights must"
    assert as_flags("--weights=none") == "--weights=none"


def test_list_sorts_and_filters_a_table(capsys):
    assert main(["list", "--sort=-parameters", "--json"]) == 0
    found = [row["parameters"] for row in json.loads(capsys.readouterr().out)]
    known = [value for value in found if value is not None]
    assert known == sorted(known, reverse=True) and found[: len(known)] == known
    assert main(["list", "--max_parameters=10", "--with_weights", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows and all(row["parameters"] < 10e6 and row["weights"] for row in rows)
    assert main(["list", "tnt*"]) == 0
    heading, *lines = capsys.readouterr().out.splitlines()
    assert heading.split() == ["name", "image", "parameters", "GMACs", "top-1", "weights"]
    assert [line.split()[0] for line in lines] == ["tnt_tiny", "tnt_small", "tnt_base"]
    assert lines[1].split()[1:5] == ["224x224", "23.8M", "4.97", "81.5"]


def test_info_of_a_variant_does_not_build_a_model(monkeypatch, capsys):
    def built(*arguments, **more):
        raise AssertionError("a model is built")

    monkeypatch.setattr(keras_tnt.cli.runtime, "load_model", built)
    assert main(["info", "TNTSmall", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["parameters"], found["blocks"], found["classes"]) == (23768584, 12, 1000)
    assert found["multiply_accumulates"] == 4973847552 and found["top1"] == 81.5


@pytest.mark.parametrize(
    "words", [["--sort", "-top1"], ["--sort=-top1"], ["tnt*", "--sort", "-top1"]]
)
def test_sort_accepts_a_descending_column_as_the_next_word(words):
    assert parse(["list", *words]).sort == "-top1"


@pytest.mark.parametrize("words", [["--sort"], ["--sort", "--json"], ["--sort", "-size"]])
def test_sort_without_a_column_is_an_error(words, capsys):
    with pytest.raises(SystemExit):
        parse(["list", *words])
    assert "--sort" in capsys.readouterr().err


@pytest.mark.parametrize("export", ["tnt.onnx", "served"])
def test_explain_refuses_exports(export, tmp_path, capsys):
    card = tmp_path / "served" / "1" / CARD
    card.parent.mkdir(parents=True)
    card.write_text("{}")
    assert main(["explain", "x.png", f"--model={tmp_path / export}"]) == 2
    printed = capsys.readouterr().err
    assert "--model must be a Keras model for explain" in printed and "no attention" in printed


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("{0}", "must be the path of a file. Received: '{0}', which is a directory"),
        ("/dev/null", "'/dev/null', which is a device"),
        ("/dev/null/x.html", "'/dev/null' is no directory"),
        ("{0}/file/a/x.html", "'{0}/file' is no directory"),
        ("{0}/new/", "which ends as a directory"),
    ],
)
def test_explain_checks_its_page_before_any_work(out, message, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    out, message = out.format(tmp_path), message.format(tmp_path)
    assert main(["explain", "no.png", "--model=no.keras", f"--out={out}"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --out must be") and message in line
