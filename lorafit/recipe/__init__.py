"""What the user wrote: sections, rules between fields, loading with line numbers. Never torch, environment, network."""

from lorafit.recipe.advice import Advice, advise
from lorafit.recipe.load import LoadedRecipe, load
from lorafit.recipe.recipe import Recipe

__all__ = ["Advice", "LoadedRecipe", "Recipe", "advise", "load"]
