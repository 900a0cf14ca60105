"""Import layers of the package, and its actual imports."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
# The scripts use the library; keras_tnt imports none of them.
SCRIPTS = ("training", "savedmodels", "benchmarks")

# Lowest layer first: a module or package imports only from lower layers or from its own layer.
FLOORS = (
    ("files", "text", "image_folders", "imagenet", "native", "registry", "published"),
    ("layers", "figures"),
    ("weights",),
    ("anatomy",),
    ("pretrained",),
    ("building",),
    ("tnt", "pyramid_tnt", "deit", "cait"),
    ("images", "preprocessing", "inference", "teacher", "distillation", "inspection", "export"),
    ("finetuning", "backbone", "bundle", "classifier", "folder"),
    ("command", "__main__"),
    SCRIPTS,
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def named(path):
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
        names = named(path) & (set(files) - {"keras_tnt", module})
        # Importing a submodule is not counted as importing its package.
        found[module] = {n for n in names if not module.startswith(n + ".")}
    del found["keras_tnt"]
    return found


def room_imports():
    """Returns {top-level module or package: set of the others that it imports}, plus scripts."""
    rooms = {room: set() for room in FLOOR}
    for module, names in imports().items():
        room = module.split(".")[1]
        rooms[room] |= {name.split(".")[1] for name in names} - {room}
    for script in SCRIPTS:
        for path in (ROOT / script).rglob("*.py"):
            for name in named(path):
                first, _, rest = name.partition(".")
                used = rest.partition(".")[0] if first == "keras_tnt" else first
                rooms[script] |= {used} & rooms.keys() - {script}
    return rooms
