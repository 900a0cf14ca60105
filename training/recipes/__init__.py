"""Recipes as data: what to run, where its numbers stand, what it aims for."""

import difflib

from training.recipes.deit import CAIT, CAIT_VALUES, DEIT, DEIT_VALUES
from training.recipes.digits import DIGITS
from training.recipes.finetune import FINETUNE, TRANSFER
from training.recipes.recipe import Recipe
from training.recipes.tnt import COMMAND, IMAGENET, PYRAMID, TNT

RECIPES = {**DIGITS, **TNT, **DEIT, **CAIT, **FINETUNE, **TRANSFER}
# What a variant without a recipe of its own is trained by, by family; others by TNT's.
OF_FAMILY = {"pyramid_tnt": PYRAMID, "deit": DEIT_VALUES, "cait": CAIT_VALUES}


def get(name):
    """The recipe of a name; that of its family for a variant that has none of its own.

    Raises:
        ValueError: with the nearest names and all others.
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
    """The name of the family that has a variant; None if none has."""
    from keras_tnt import registry

    return next((each.name for each in registry.families() if variant in each.variants), None)
