"""Recipes as data: command, source and values of each, and the published accuracy."""

import difflib

from training.recipes.deit import CAIT, CAIT_VALUES, DEIT, DEIT_VALUES
from training.recipes.digits import DIGITS
from training.recipes.finetune import FINETUNE, TRANSFER
from training.recipes.recipe import Recipe
from training.recipes.tnt import COMMAND, IMAGENET, PYRAMID, TNT

RECIPES = {**DIGITS, **TNT, **DEIT, **CAIT, **FINETUNE, **TRANSFER}
# Values for variants without a separate recipe, by family; other families use TNT's.
OF_FAMILY = {"pyramid_tnt": PYRAMID, "deit": DEIT_VALUES, "cait": CAIT_VALUES}


def get(name):
    """Returns the recipe of a name, or its family's for a variant without a separate one.

    Raises:
        ValueError: If there is none; the message suggests the nearest names and lists all.
    """
    if name in RECIPES:
        return RECIPES[name]
    if family := family_of(name):
        values = OF_FAMILY.get(family, IMAGENET)
        source, result = f"the recipe of family '{family}'", "no published result"
        return Recipe(COMMAND.format(name=name), source, result, {**values, "model": name})
    near = " or ".join(difflib.get_close_matches(name, RECIPES))
    raise ValueError(
        f"--recipe: there is no {name!r}. "
        + (f"Did you mean {near}? " if near else "")
        + f"There are: {', '.join(RECIPES)}"
    )


def family_of(variant):
    """Returns the name of the family of a variant, or `None`."""
    from keras_tnt.models import registry

    return next((each.name for each in registry.families() if variant in each.variants), None)
