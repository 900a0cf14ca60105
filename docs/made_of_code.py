"""Parts of the site that are generated from code: tables, commands, import layers, the API.

In a page the line `<!-- made of the code: flags -->` stands for what `MADE["flags"]` writes. At the
end every public name that has no entry in the reference is a warning, which fails `make docs`.
"""

import base64
import dataclasses
import importlib
import inspect
import json
import os
import re
import types
from pathlib import Path

import import_layers_picture
from sphinx.util import logging

import keras_tnt
from keras_tnt import cli as command
from keras_tnt.inspection.explore import fill
from keras_tnt.models import checkpoint_table, registry

logger = logging.getLogger(__name__)

# Where users find what is public; each name without an underscore there, but for modules.
NAMESPACES = (
    "keras_tnt",
    "keras_tnt.export",
    "keras_tnt.finetuning",
    "keras_tnt.inspection",
    "keras_tnt.layers",
)


# === Tables ===


def table(head, rows):
    """A table in Markdown."""
    rows = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in row)} |" for row in rows)


def models():
    """Every variant by family, with what it is built of."""
    rows = [
        (
            f"{{py:obj}}`keras_tnt.{each.function_name(name)}`",
            f"`{name}`",
            f"{row.image_size}x{row.image_size}",
            ", ".join(f"`{key}={value}`" for key, value in row.architecture.items()),
        )
        for each in registry.families()
        for name, row in each.variants.items()
    ]
    return table(("function", "name", "image", "architecture"), rows)


def weights():
    """The public weights, with their published accuracy."""
    return checkpoint_table.list_weights().markdown()


def recipes():
    """Every recipe of the trainer, with the result that it aims for and its source."""
    from training.recipes import RECIPES

    rows = [(f"`{name}`", each.result, each.source) for name, each in RECIPES.items()]
    return table(("`--recipe=`", "result", "source"), rows)


def accuracies():
    """Every published accuracy with who measured it and at which crop."""
    from keras_tnt.models.published import accuracies

    rows = [
        (each.dataset, f"`{each.model}`", each.image_size, each.top1)
        + tuple("" if value is None else value for value in (each.top5, each.crop))
        + (each.evaluated_by, each.source)
        for each in accuracies()
    ]
    return table(
        ("data set", "model", "image", "top-1", "top-5", "crop", "evaluated by", "source"), rows
    )


def flags():
    """Every flag of the trainer under the headings of its table."""
    from training import configuration

    written, fields = inspect.getsource(configuration.Config), configuration.FIELDS
    parts, section = {}, "The run"
    for line in written.splitlines():
        if heading := re.fullmatch(r"\s+# === (.*) ===", line):
            section = heading.group(1)
        elif (field := re.match(r"    (\w+): \w+ = option\(", line)) and field.group(1) in fields:
            parts.setdefault(section, []).append(flag(fields[field.group(1)]))
    head = ("flag", "default", "what it says", "a run goes on under another value")
    return "\n\n".join(f"## {name}\n\n{table(head, rows)}" for name, rows in parts.items())


def flag(field):
    """A row of `flags`."""
    choices, change = field.metadata["choices"], field.metadata["change"]
    says = field.metadata["help"].replace("\n", "<br>").replace("|", "\\|").replace("<", "&lt;")
    says = says.replace("&lt;br>", "<br>")
    if choices:
        says += ": " + ", ".join(f"`{choice}`" for choice in choices)
    changes = "yes" if field.metadata["may_change"] else f"with `--{change}`" if change else "no"
    return f"`--{field.name}`", "" if field.default == "" else f"`{field.default}`", says, changes


def commands():
    """Returns the output of `keras-tnt COMMAND --help` of each command."""
    os.environ["COLUMNS"] = "88"
    parsers = command.parsers()
    return "\n\n".join(
        f"## `{command.NAME} {name}`\n\n```text\n{parsers[name].format_help()}```"
        for name in command.COMMANDS
    )


# === The reference ===


def public_names():
    """The full name of everything that a user may call."""
    found = []
    for namespace in NAMESPACES:
        module = importlib.import_module(namespace)
        for name in getattr(module, "__all__", None) or dir(module):
            value = getattr(module, name)
            ours = (getattr(value, "__module__", None) or "").startswith("keras_tnt")
            if not name.startswith("_") and ours and not isinstance(value, types.ModuleType):
                found.append(f"{namespace}.{name}")
    found += [f"{each.builder.__module__}.preprocess_input" for each in registry.families()]
    return found


def entry(name):
    """The directive that documents a name."""
    namespace, _, last = name.rpartition(".")
    value = getattr(importlib.import_module(namespace), last)
    kind = "autoclass" if inspect.isclass(value) else "autofunction"
    members = "\n   :members:" if dataclasses.is_dataclass(value) else ""
    return f".. {kind}:: {name}{members}\n"


def reference(names):
    """Entries for names, in reStructuredText, which docstrings are read as."""
    return "```{eval-rst}\n" + "\n".join(map(entry, names)) + "```"


def variants():
    """The functions of all variants."""
    return reference(
        f"keras_tnt.{each.function_name(name)}"
        for each in registry.families()
        for name in each.variants
    )


def builders():
    """The builder of each family, and its `preprocess_input`."""
    names = [f"keras_tnt.{each.builder.__name__}" for each in registry.families()]
    modules = [each.builder.__module__ for each in registry.families()]
    return reference([*names, *(f"{module}.preprocess_input" for module in modules)])


def layers():
    """Every layer."""
    return reference(name for name in public_names() if name.startswith("keras_tnt.layers."))


MADE = {
    function.__name__: function
    for function in (
        *(models, weights, recipes, accuracies, flags),
        *(commands, builders, variants, layers),
    )
} | {"import_layers": import_layers_picture.draw}
MARK = re.compile(r"^<!-- made of the code: (\w+) -->$", re.MULTILINE)


# === Sphinx ===


def fill_in(app, name, source):
    """Put into a page what its marks stand for."""
    source[0] = MARK.sub(lambda mark: MADE[mark.group(1)](), source[0])


def missing(documented):
    """The public names that are not among those documented."""
    return [name for name in public_names() if name not in documented]


def close_code(app, kind, name, value, options, lines):
    """Separates code from a letter that follows it, which Markdown allows and reST does not."""
    lines[:] = [re.sub(r"(?<!`)(`[^`]+`)(?=\w)", r"\1\\ ", line) for line in lines]


def check_reference(app, environment):
    """Warns about every public name without an entry."""
    for name in missing(environment.get_domain("py").objects):
        logger.warning("%s is public and has no entry in docs/api.", name)


def explored():
    """Returns the page of `explore` for explored.json: a TNT that classifies three digits.

    The file has the numbers alone, as explore passes them to its template.
    """
    kept = json.loads(Path(__file__).with_name("explored.json").read_text(encoding="utf-8"))
    return fill(kept["page"], [base64.b64decode(each) for each in kept["data"]])


def write_explored(app, error):
    """Writes the page of `explore` that why.md embeds."""
    if error is None and app.builder.format == "html":
        (Path(app.outdir) / "_static" / "explore.html").write_bytes(explored())


def setup(app):
    """Registers the hooks with Sphinx."""
    app.connect("source-read", fill_in)
    app.connect("build-finished", write_explored)
    app.connect("autodoc-process-docstring", close_code)
    app.connect("env-check-consistency", check_reference)
    return {"version": keras_tnt.__version__, "parallel_read_safe": True}
