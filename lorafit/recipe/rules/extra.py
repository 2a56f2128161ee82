"""Rules of the `extra` mappings: only what the library object takes and the recipe does not say elsewhere."""

from collections.abc import Iterator

from lorafit.recipe.recipe import Recipe
from lorafit.recipe.rules.broken import Broken, Rule
from lorafit.recipe.suggest import GUESSES, extra_key


def extra_keys_reach_the_library(recipe: Recipe) -> Iterator[Broken]:
    """Libraries swallow keywords they do not know, or raise after the model is loaded."""
    extras = {"model": recipe.model.extra, "lora": recipe.lora.extra, "training": recipe.training.extra}
    if recipe.quantization is not None:
        extras["quantization"] = recipe.quantization.extra
    wrong = 0
    for section, extra in extras.items():
        for key in extra:
            if message := extra_key(section, key, guesses=wrong < GUESSES):
                wrong += 1
                yield Broken(f"{section}.extra.{key}", message)


def compiling_is_asked_for_by_its_key(recipe: Recipe) -> Iterator[Broken]:
    """The library compiles as soon as one of them is given, whatever `torch_compile` says."""
    for key in ("torch_compile_backend", "torch_compile_mode"):
        if key in recipe.training.extra and not recipe.training.torch_compile:
            message = "goes with training.torch_compile: true; write that, or leave it out"
            yield Broken(f"training.extra.{key}", message, ("training.torch_compile",))


RULES: tuple[Rule, ...] = (extra_keys_reach_the_library, compiling_is_asked_for_by_its_key)
