"""Every code block of the README and docs/ runs as printed, or has a note with the reason.

Each page is one session, in a directory with photographs, where published variants are shrunken and
a fake hub has their weights. Python blocks run; so do the `keras-tnt` lines in shell blocks. Blocks
under `<!-- needs ...: why -->` are not run, but their commands and flags must exist.
"""

import re
import shlex
import shutil
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
from huggingface_hub import constants

from keras_tnt import cli as command
from keras_tnt.models import registry
from tests.helpers import doc_sandbox
from tests.helpers.hub_server import Hub
from training import configuration, sources

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
START = ROOT / "docs" / "start.md"
BLOCK = re.compile(r"(?:<!-- (needs [^>]*?) ?-->\n)?^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
# Languages of blocks that are never run: output and example files.
SHOWN = ("text", "json", "yaml", "dockerfile")
CHECKPOINTS = (
    "deit_tiny_patch16_224.fb_in1k",
    "deit_tiny_distilled_patch16_224.fb_in1k",
    "tnt_s_patch16_224.in1k",
)


class Block(NamedTuple):
    needs: str
    language: str
    code: str


def blocks(page):
    return [Block(*found) for found in BLOCK.findall(page.read_text(encoding="utf-8"))]


WITH_CODE = [page for page in PAGES if blocks(page)]
APART = (START, CONTRIBUTING)  # pages with separate tests


def commands(code):
    """Returns the commands of a shell block, as lists of words."""
    lines = code.replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def identity(page):
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Yields a directory of files; the models are shrunken and the hub is fake."""
    folder = tmp_path_factory.mktemp("files")
    hub = Hub()
    hub.folder = tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", "hf_secret")
        patch.setenv("HF_ENDPOINT", hub.url)
        patch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache")))
        doc_sandbox.shrink(patch)
        doc_sandbox.photographs(folder)
        doc_sandbox.weights_files(folder)
        doc_sandbox.publish(hub, CHECKPOINTS, hub.folder)
        for name in ("config.json", "model.safetensors"):
            hub.add("owner/repo", name, folder / "repository" / name)
        yield folder
    hub.shutdown()
    hub.server_close()


@pytest.fixture
def eagerly():
    """Makes TensorFlow run functions eagerly, because tracing takes far longer than the run."""
    tensorflow = pytest.importorskip("tensorflow")
    tensorflow.config.run_functions_eagerly(True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not apply to tf.data")
        yield
    tensorflow.config.run_functions_eagerly(False)


@pytest.fixture
def session(world, tmp_path, monkeypatch):
    """Yields an empty namespace, in a working directory with the reader's files."""
    shutil.copytree(world, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    tables = [registry._families, sources.DATASETS, *(f.variants for f in registry.families())]
    before = [dict(table) for table in tables]
    yield {}
    for table, rows in zip(tables, before, strict=True):  # undoes registrations of a page
        table.clear()
        table.update(rows)


@pytest.mark.one_backend
@pytest.mark.parametrize("page", [page for page in WITH_CODE if page not in APART], ids=identity)
def test_code_runs_as_printed(page, session, eagerly):
    run(page, session)


def test_start_page_runs_as_printed_on_each_backend(session):
    run(START, session)


def run(page, session):
    for block in blocks(page):
        if block.needs:
            continue
        if block.language == "python":
            exec(compile(block.code, identity(page), "exec"), session)
        elif block.language in ("sh", "bash"):
            for words in commands(block.code):
                assert words[0] == command.NAME, f"say what this needs, or why: {words}"
                assert command.main(words[1:]) == 0, words
        else:
            assert block.language in SHOWN, block.language


@pytest.mark.one_backend
@pytest.mark.parametrize("page", WITH_CODE, ids=identity)
def test_skipped_code_has_a_reason_and_names_existing_commands(page):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for block in blocks(page):
        if block.needs:
            assert re.fullmatch(r"needs \w[^:]+(: .+)?", block.needs, re.DOTALL)
        if block.language == "python":
            compile(block.code, identity(page), "exec")
        for words in commands(block.code) if block.language in ("sh", "bash") else []:
            if words[0] == command.NAME:
                command.parse(words[1:])
            elif words[0] == "make":
                assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), words
            elif script := next((word for word in words if word.endswith(".py")), None):
                check_flags(
                    ROOT / script, [w for w in words[words.index(script) :] if w.startswith("--")]
                )


def check_flags(script, flags):
    """Asserts that a script accepts the flags."""
    known = script.read_text(encoding="utf-8")
    for flag in flags:
        name = flag.removeprefix("--").partition("=")[0]
        trainer = script.parent.name == "training" and name in configuration.FIELDS
        assert trainer or f'"--{name}"' in known or f'"{name}"' in known, (script, flag)


@pytest.mark.one_backend
@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_links_to_files_exist(name):
    """`make docs` checks the links of docs/."""
    text = (ROOT / name).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert links and [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.one_backend
def test_custom_optimizer_and_data_set_are_found_by_name(session, monkeypatch):
    pytest.importorskip("tensorflow")
    from training import optimizers

    monkeypatch.setattr(optimizers, "OPTIMIZERS", dict(optimizers.OPTIMIZERS))
    run(CONTRIBUTING, session)
    config = configuration.make(dataset="stripes", optimizer="nadam")
    assert optimizers.find_optimizer(config.optimizer) is session["nadam"]
    training, held_out = sources.open_sources(config)
    assert (training.size, held_out.size, training.classes) == (64, 16, 2)


# === Tables of equivalents in other packages ===

COMING_FROM = ROOT / "docs" / "coming_from.md"


def ours(page):
    """Returns the code in the last cell of every row."""
    rows = re.findall(r"^\| .* \| (.*) \|$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [code for cell in rows for code in re.findall(r"`([^`]+)`", cell)]


@pytest.mark.slow
@pytest.mark.one_backend
def test_every_equivalent_python_line_runs(session, eagerly):
    for block in blocks(COMING_FROM):
        exec(compile(block.code, COMING_FROM.name, "exec"), session)
    lines = [code for code in dict.fromkeys(ours(COMING_FROM)) if not code.startswith("--")]
    arguments = [code for code in lines if re.match(r"\w+=", code)]
    assert len(lines) > 60 and len(arguments) > 10
    lines.append(f"keras_tnt.TNT({', '.join(arguments)})")  # all architecture arguments at once
    for line in lines:
        if line not in arguments:
            exec(compile(line, COMING_FROM.name, "exec"), session)


@pytest.mark.one_backend
def test_every_equivalent_flag_is_accepted():
    lines = [code for code in ours(COMING_FROM) if code.startswith("--")]
    assert len(lines) > 10
    for words in map(shlex.split, lines):
        given = {}
        for name, _, value in (word.removeprefix("--").partition("=") for word in words):
            kind = type(configuration.FIELDS[name].default)
            given[name] = kind(value) if value else True
        configuration.make(**given)


@pytest.mark.one_backend
def test_functions_named_in_the_architecture_page_exist():
    text = re.sub(r"\s+", " ", (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"))
    named = re.findall(r"`((?:keras_tnt|training)/[\w/]+\.py)(?:: (\w+))?`", text)
    assert len(named) > 25
    for file, name in named:
        code = (ROOT / file).read_text(encoding="utf-8")
        assert not name or re.search(rf"^(def|class) {name}\b", code, re.MULTILINE), (file, name)


def test_tests_named_in_the_safety_table_exist():
    text = (ROOT / "docs" / "safety.md").read_text(encoding="utf-8")
    found = re.findall(r"(tests/[\w/]+\.py) -k (\w+)", text)
    assert len(found) > 5
    for path, word in found:
        names = re.findall(r"def (test_\w+)", (ROOT / path).read_text(encoding="utf-8"))
        assert any(word in name for name in names), f"{path} -k {word}"
