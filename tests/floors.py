"""The floors of the house, and the imports as they are."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
# The scripts of the repository stand on the library; keras_tnt imports none of them.
SCRIPTS = ("training", "savedmodels", "benchmarks")

# From the ground up: a module or package imports only what stands on a floor below, or on its own.
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
    """The modules and names that a file imports, also within functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def modules():
    """{full name: path} of the package's modules."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in (ROOT / "keras_tnt").rglob("*.py")
    }


def imports():
    """The modules of the package that each module imports."""
    files = modules()
    found = {}
    for module, path in files.items():
        # The package itself is asked for its version and for what users call, at run time.
        names = named(path) & (set(files) - {"keras_tnt", module})
        # A package is no module of its own: importing one of its modules is no import of it.
        found[module] = {n for n in names if not module.startswith(n + ".")}
    del found["keras_tnt"]
    return found


def room_imports():
    """{room: the other rooms that it imports}, the scripts with them."""
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
