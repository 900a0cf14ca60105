"""Reads and writes configuration files: `--config` and a run's `config.yaml`, as YAML or JSON.

YAML follows version 1.2, where `1e-3` is a number and `on` is text, unlike PyYAML's 1.1.
"""

import json
import math
import os
import re
from pathlib import Path

from training import commands

MAX_BYTES = 2**20
# One-time requests, which are not properties of a run.
ONCE = ("config", "change", "extend", "start_afresh", "find_learning_rate")
FLOAT = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan")
# (tag, pattern, first characters) of the core schema of YAML 1.2.
SCALARS = (
    ("bool", re.compile(r"true|True|TRUE|false|False|FALSE"), "tTfF"),
    ("int", re.compile(r"[-+]?[0-9]+"), "-+0123456789"),
    ("float", FLOAT, "-+0123456789."),
    ("null", re.compile(r"~|null|Null|NULL|"), ["~", "n", "N", ""]),
)
WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def read(path, kinds):
    """Returns the validated values of a configuration file.

    Args:
        path: A `.yaml`, `.yml` or `.json` file, or a run's `config.json`.
        kinds: Dict from each valid name to the type of its value.

    Raises:
        ValueError: If it is not such a file, or a name or value in it is invalid.
        OSError: If it cannot be read.
    """
    values = parse(path)
    if isinstance(values.get("config"), dict):  # a run's config.json
        values = {name: value for name, value in values["config"].items() if name not in ONCE}
    checked = {}
    for name, value in values.items():
        if not isinstance(name, str) or name not in kinds:
            raise ValueError(
                f"--config={path}: there is no value {name!r}. "
                f"{commands.nearest(str(name), list(kinds))}"
            )
        if name == "config":
            raise ValueError(f"--config={path} must not name another file as `config`")
        checked[name] = convert(path, name, value, kinds[name])
    return checked


def parse(path):
    """Returns the mapping stored in a file.

    Raises:
        ValueError: If the file does not hold a mapping, is malformed, or does not exist.
        OSError: If it cannot be read.
    """
    from training import regular  # imports Keras, so not at the top of the module

    path = os.path.expanduser(path)
    suffix = Path(path).suffix.lower()
    if suffix not in (".yaml", ".yml", ".json"):
        raise ValueError(f"--config must be a .yaml, .yml or .json file. Received: {str(path)!r}")
    if not regular.exists(path):
        raise ValueError(f"--config: there is no file {str(path)!r}")
    data = regular.read_regular(path, MAX_BYTES)
    try:
        text = data.decode("utf-8-sig")
        values = parse_json(text) if suffix == ".json" else parse_yaml(text)
    except RecursionError as error:
        raise ValueError(f"--config={path} is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"--config={path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(
            f"--config={path} must hold values by name, such as `epochs: 300`. "
            f"Received: {short(values)}"
        )
    return values


def parse_json(text):
    """Returns the value of a JSON text; duplicate keys raise a ValueError."""

    def unique(pairs):
        check_unique([name for name, _ in pairs])
        return dict(pairs)

    return json.loads(text, object_pairs_hook=unique)


def check_unique(names):
    """Raises a ValueError if a name occurs twice."""
    seen = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{name!r} is given twice")
        seen.add(name)


def parse_yaml(text):
    """Returns the value of a YAML text, {} for an empty one; errors are ValueErrors."""
    yaml, loader = load_yaml(), make_loader()
    try:
        values = yaml.load(text, Loader=loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    return {} if values is None else values


def load_yaml():
    """Returns the module `yaml`.

    Raises:
        ImportError: If PyYAML is not installed; the message names the extra.
    """
    try:
        import yaml
    except ImportError as error:
        raise ImportError('YAML files need PyYAML: pip install "keras-tnt[train]"') from error
    return yaml


def make_loader():
    """Returns a `yaml.SafeLoader` for YAML 1.2 that rejects aliases and duplicate keys.

    Aliases are rejected because nested ones expand exponentially.
    """
    yaml = load_yaml()

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers = {}

        def compose_node(self, parent, index):
            if self.check_event(yaml.AliasEvent):
                raise ValueError("aliases (*name) are not read")
            return super().compose_node(parent, index)

        def construct_mapping(self, node, deep=False):
            names = [self.construct_object(key, deep=True) for key, _ in node.value]
            check_unique([name for name in names if isinstance(name, str)])
            return super().construct_mapping(node, deep)

    for kind, pattern, first in SCALARS:
        Loader.add_implicit_resolver(
            f"tag:yaml.org,2002:{kind}", re.compile(rf"(?:{pattern.pattern})\Z"), list(first)
        )
    Loader.add_constructor("tag:yaml.org,2002:int", lambda self, node: int(node.value))
    return Loader


def convert(path, name, value, kind):
    """Returns a value converted to the type of its flag.

    Args:
        path: Path of the file, for messages.
        name: Name of the flag.
        value: Value as parsed.
        kind: Type of the flag: bool, int, float or str.

    Raises:
        ValueError: If the value has another type.
    """
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value) if abs(value) < 2**1000 else math.inf
    if kind is float and isinstance(value, str) and FLOAT.fullmatch(value):
        return float(value.replace(".inf", "inf").replace(".nan", "nan"))
    if kind is str and value is None:
        return ""
    if kind is str and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if name == "model_args" and isinstance(value, dict):
        return json.dumps(value)
    if kind is str and isinstance(value, list) and all(type(each) in (str, int) for each in value):
        return ",".join(map(str, value))
    if type(value) is not kind:
        raise ValueError(f"--config={path}: {name} must be {WORDS[kind]}. Received: {short(value)}")
    return value


def short(value):
    """Returns `repr(value)`, truncated to 200 characters."""
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


def to_yaml(values, header):
    """Returns YAML text that `read` parses into the same values.

    Args:
        values: Dict from name to value. One-time requests (`ONCE`) are left out.
        header: Lines of the leading comment.
    """
    yaml = load_yaml()

    class Dumper(yaml.SafeDumper):
        """Dumper that quotes strings that YAML 1.1 or 1.2 would not read as text."""

    for kind, pattern, first in SCALARS:
        Dumper.add_implicit_resolver(
            f"tag:yaml.org,2002:{kind}", re.compile(rf"(?:{pattern.pattern})\Z"), list(first)
        )
    values = {name: value for name, value in values.items() if name not in ONCE}
    text = yaml.dump(values, Dumper=Dumper, sort_keys=False, width=float("inf"))
    lines = ["".join(c if c.isprintable() else "?" for c in line) for line in header]
    return "".join(f"# {line}\n" for line in lines) + text
