"""Layers of the package, of pyproject.toml's import contract, and the imports that are made."""

import ast
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Scripts of the repository, above the library.
SCRIPTS = ("training", "savedmodels", "benchmarks")


def read_layers():
    """Returns the modules of each layer, from the lowest up, with the scripts on top."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = settings["tool"]["importlinter"]["contracts"]
    (layers,) = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    return (*[tuple(layer.split(" : ")) for layer in reversed(layers)], SCRIPTS)


LAYERS = read_layers()


def imported_names(path):
    """Returns the names of modules and attributes that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def modules():
    """Returns {full module name: path} for the package."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in (ROOT / "keras_tnt").rglob("*.py")
    }


def imports():
    """Returns {module: set of the package's modules that it imports}."""
    files = modules()
    found = {}
    for module, path in files.items():
        # The package itself is imported inside functions only, for its version and its public API.
        names = imported_names(path) & (set(files) - {"keras_tnt", module})
        # Importing a submodule is not counted as importing its package.
        found[module] = {n for n in names if not module.startswith(n + ".")}
    del found["keras_tnt"]
    return found


def imports_between_modules():
    """Returns {top-level module or package: set of the others that it imports}, plus scripts."""
    rooms = {room: set() for room in sum(LAYERS, ())}
    for module, names in imports().items():
        room = module.split(".")[1]
        rooms[room] |= {name.split(".")[1] for name in names} - {room}
    for script in SCRIPTS:
        for path in (ROOT / script).rglob("*.py"):
            for name in imported_names(path):
                first, _, rest = name.partition(".")
                used = rest.partition(".")[0] if first == "keras_tnt" else first
                rooms[script] |= {used} & rooms.keys() - {script}
    return rooms
