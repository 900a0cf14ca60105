"""`keras-tnt list`: the models that there are."""

import json

HELP = "the models of published sizes and their public weights"


def add_arguments(parser):
    parser.add_argument("pattern", nargs="?", metavar="PATTERN", help="such as 'deit*'")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options):
    from keras_tnt import registry

    names = registry.list_models(options.pattern)
    if not names:
        raise ValueError(
            f"No model is called {options.pattern!r}. "
            f"{registry.nearest(options.pattern.strip('*'), registry.list_models())}"
        )
    found = [about(name, registry) for name in names]
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    width = max(map(len, names))
    for model in found:
        weights = ", ".join(model["weights"]) or "no public weights"
        print(f"{model['name']:{width}}  {model['image_size']}x{model['image_size']}  {weights}")
    return 0


def about(name, registry):
    family = next(family for family in registry.families() if name in family.variants)
    function = family.function_name(name)
    return {
        "name": name,
        "function": f"keras_tnt.{function}",
        "image_size": family.variants[name].image_size,
        "weights": [row.name for row in family.checkpoints if row.model == function],
    }
