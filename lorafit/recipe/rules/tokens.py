"""Rules of `model.add_tokens` and how it goes together with the rest (peft 0.21)."""

from collections.abc import Iterator

from lorafit.recipe.recipe import Recipe
from lorafit.recipe.rules.adapter import EMBEDDINGS, HEADS, SHARDED
from lorafit.recipe.rules.broken import Broken, Rule


def added_tokens_are_written_once(recipe: Recipe) -> Iterator[Broken]:
    """Nothing, white space, and the same twice add no token."""
    tokens = recipe.model.add_tokens
    for token in dict.fromkeys(tokens):
        if not token.strip():
            yield Broken("model.add_tokens", f'"{token}" is no token; write its text, as in ["<tool>"]')
        elif token != token.strip():
            message = f'"{token}" begins or ends with white space, which templates trim; write "{token.strip()}"'
            yield Broken("model.add_tokens", message)
        elif tokens.count(token) > 1:
            yield Broken("model.add_tokens", f'"{token}" stands {tokens.count(token)} times; write it once')


def rows_of_added_tokens_can_be_trained(recipe: Recipe) -> Iterator[Broken]:
    """peft trains rows of an embedding or head that is whole, in a float type, and trained in no other way."""
    if not recipe.model.add_tokens:
        return
    strategy, lora, quantization = recipe.launch.strategy, recipe.lora, recipe.quantization
    if strategy in SHARDED:
        message = f"{strategy} spreads embedding and head over processes, rows of them cannot be trained; write ddp"
        yield Broken("model.add_tokens", message, ("launch.strategy",))
    listed = () if isinstance(lora.target_modules, str) else lora.target_modules
    for key, names in {"modules_to_save": lora.modules_to_save or (), "target_modules": listed}.items():
        for name in names:
            if name.rpartition(".")[2] in (*EMBEDDINGS, *HEADS):
                message = f"trains rows of {name}, which is also in lora.{key}; keep it in one of the two"
                yield Broken("model.add_tokens", message, (f"lora.{key}",))
    kept = None if quantization is None else quantization.llm_int8_skip_modules
    if kept is not None and not any(name.rpartition(".")[2] in HEADS for name in kept):
        message = "quantises the output head, whose rows model.add_tokens trains; name lm_head there, or leave it out"
        yield Broken("quantization.llm_int8_skip_modules", message, ("model.add_tokens",))


RULES: tuple[Rule, ...] = (added_tokens_are_written_once, rows_of_added_tokens_can_be_trained)
