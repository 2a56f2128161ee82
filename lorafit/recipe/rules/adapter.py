"""Rules of `quantization`, `lora`, `adalora` and how they go together (peft 0.21, transformers 5.23)."""

import re
from collections.abc import Iterator

from lorafit.recipe.patterns import backtracks_for_ever
from lorafit.recipe.recipe import Recipe
from lorafit.recipe.rules.broken import Broken, Rule
from lorafit.recipe.suggest import nearest

HEADS = ("lm_head", "embed_out")
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")
SHARDED = ("fsdp2", "zero3")


def exactly_one_bit_width(recipe: Recipe) -> Iterator[Broken]:
    """4-bit with 8-bit is refused by the library late; neither would quantise nothing."""
    section = recipe.quantization
    if section is None or section.load_in_4bit != section.load_in_8bit:
        return
    others = ("quantization.load_in_8bit", "quantization.load_in_4bit")
    if section.load_in_4bit:
        yield Broken("quantization.load_in_8bit", "cannot be true with load_in_4bit; keep one of the two", others)
    else:
        message = "quantises nothing; write load_in_4bit: true (or load_in_8bit: true), or leave the section out"
        yield Broken("quantization", message, others)


def no_keys_of_the_other_bit_width(recipe: Recipe) -> Iterator[Broken]:
    """The library ignores them."""
    section = recipe.quantization
    if section is None or section.load_in_4bit == section.load_in_8bit:
        return
    for key in sorted(section.model_fields_set):
        if section.load_in_8bit and key.startswith("bnb_4bit_"):
            yield Broken(f"quantization.{key}", "is ignored with load_in_8bit; leave it out, or write load_in_4bit")
        if section.load_in_4bit and key == "llm_int8_threshold":
            yield Broken(f"quantization.{key}", "is ignored with load_in_4bit; leave it out, or write load_in_8bit")


def quantized_weights_can_be_sharded(recipe: Recipe) -> Iterator[Broken]:
    """FSDP2 and ZeRO-3 split parameters across GPUs; only floating-point storage can be split."""
    section, strategy = recipe.quantization, recipe.launch.strategy
    if section is None or strategy not in SHARDED:
        return
    if section.load_in_8bit:
        message = (
            f"8-bit weights cannot be sharded by {strategy}; write load_in_4bit with bnb_4bit_quant_storage: bfloat16"
        )
        yield Broken("quantization.load_in_8bit", message, ("launch.strategy",))
    elif section.bnb_4bit_quant_storage == "uint8":
        message = f"uint8 cannot be sharded by {strategy}; write the type of the other weights, bfloat16"
        others = ("launch.strategy", "quantization.load_in_8bit")
        yield Broken("quantization.bnb_4bit_quant_storage", message, others)


_FROM_THE_WHOLE_BASE = ("pissa", "olora", "corda", "eva", "loftq")


def adapter_can_be_sharded(recipe: Recipe) -> Iterator[Broken]:
    """What fails, or trains wrongly without a word, when no process holds a whole weight (tried with two processes)."""
    strategy, lora = recipe.launch.strategy, recipe.lora
    if strategy not in SHARDED:
        return
    others, mend = ("launch.strategy",), "leave it out, or write launch.strategy: ddp"
    if lora.init_lora_weights in _FROM_THE_WHOLE_BASE:
        message = f"{lora.init_lora_weights} is computed from whole base weights, {strategy} splits them; {mend}"
        yield Broken("lora.init_lora_weights", message, others)
    if recipe.adalora is not None:
        yield Broken("adalora", f"prunes whole matrices, {strategy} splits them; {mend}", others)
    if strategy != "fsdp2":
        return
    if recipe.quantization is not None and lora.use_dora:
        message = f"with quantization trains tensors of two types, fsdp2 takes one; {mend}"
        yield Broken("lora.use_dora", message, (*others, "quantization"))
    for head in {name.rpartition(".")[2] for name in lora.modules_to_save or ()} & {*HEADS}:
        # trl 1.16, add_fused_lm_head: `full_tensor()` sends no gradient to the other processes.
        message = (
            f"{head}: the loss reads it around fsdp2, each process would train a part on its own rows only; {mend}"
        )
        yield Broken("lora.modules_to_save", message, others)


def no_adapter_on_the_output_head(recipe: Recipe) -> Iterator[Broken]:
    """TRL computes the loss from `lm_head.weight`: an adapter there would never be trained."""
    targets = recipe.lora.target_modules
    if isinstance(targets, str):
        named = [head for head in HEADS if targets != "all-linear" and _matches(targets, head)][:1]
    else:
        named = [target for target in targets if target.rpartition(".")[2] in HEADS]
    for head in named:
        message = f"{head}: the loss reads the head's weight directly, an adapter there would not be trained; "
        mend = f"leave it out, or train it whole with lora.modules_to_save: [{head}]"
        yield Broken("lora.target_modules", message + mend)


def patterns_are_regular_expressions(recipe: Recipe) -> Iterator[Broken]:
    """PEFT compiles them only when the model is there, and waits for what backtracks for ever."""
    lora = recipe.lora
    written = [("target_modules", lora.target_modules), ("exclude_modules", lora.exclude_modules)]
    written += [(f"rank_pattern.{pattern}", pattern) for pattern in lora.rank_pattern]
    written += [(f"alpha_pattern.{pattern}", pattern) for pattern in lora.alpha_pattern]
    for key, pattern in written:
        if isinstance(pattern, str):
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                message = f'"{pattern}" is not a regular expression ({error}); escape it, or list names'
                yield Broken(f"lora.{key}", message)
                continue
            if backtracks_for_ever(pattern):
                message = f'"{pattern}" does not come to an end on the names of modules: a repeat within a repeat'
                yield Broken(f"lora.{key}", f"{message}; write it without, or list names")


def module_names_stand_in_lists(recipe: Recipe) -> Iterator[Broken]:
    """Text is a regular expression for whole module names: a bare word matches none."""
    for key in ("target_modules", "exclude_modules"):
        word = getattr(recipe.lora, key)
        if not isinstance(word, str) or word == "all-linear":
            continue
        listed = [name for name in re.split(r"[,\s]+", word) if name]
        if len(listed) > 1 and all(re.fullmatch(r"[\w.-]+", name) for name in listed):
            message = f'"{word}": text is a regular expression for whole names, and no name has commas or spaces'
            yield Broken(f"lora.{key}", f"{message}; write a list, [{', '.join(listed)}]")
        elif re.fullmatch(r"[\w-]+", word):
            guess = nearest(word, ["all-linear"]) if key == "target_modules" else None
            mend = f"did you mean {guess}?" if guess else f"write a list, [{word}]"
            message = f"{word}: text is a regular expression for whole names, and no module has this whole name; {mend}"
            yield Broken(f"lora.{key}", message)


def lists_of_modules_name_something(recipe: Recipe) -> Iterator[Broken]:
    """An empty list matches nothing."""
    lists = ("target_modules", "exclude_modules", "target_parameters", "modules_to_save", "layers_to_transform")
    for key in (*lists, "layers_pattern", "trainable_token_indices"):
        value = getattr(recipe.lora, key)
        if isinstance(value, tuple | str) and not value:
            yield Broken(f"lora.{key}", "is empty; name something, or leave the key out")


def no_module_adapted_and_saved_whole(recipe: Recipe) -> Iterator[Broken]:
    """PEFT leaves the adapter out without a word."""
    targets, whole = recipe.lora.target_modules, recipe.lora.modules_to_save or ()
    if isinstance(targets, str):
        return
    for name in whole:
        if name in targets:
            message = f"{name} is in target_modules, too; trained whole it gets no adapter: keep it in one of the two"
            yield Broken("lora.modules_to_save", message, ("lora.target_modules",))


def token_rows_or_the_whole_embedding(recipe: Recipe) -> Iterator[Broken]:
    """PEFT refuses a second way to train one embedding."""
    lora = recipe.lora
    if lora.trainable_token_indices is None:
        return
    listed = () if isinstance(lora.target_modules, str) else lora.target_modules
    ways = {"modules_to_save": lora.modules_to_save or (), "target_modules": listed}
    for name in lora.trainable_token_indices if isinstance(lora.trainable_token_indices, dict) else EMBEDDINGS:
        for key, names in ways.items():
            if name in names:
                message = f"{name} is also in {key}; keep it in one of the two"
                yield Broken("lora.trainable_token_indices", message, (f"lora.{key}",))


def layer_choice_needs_listed_targets(recipe: Recipe) -> Iterator[Broken]:
    """PEFT refuses `layers_to_transform` and `layers_pattern` unless `target_modules` is a list."""
    lora = recipe.lora
    for key in ("layers_to_transform", "layers_pattern"):
        if getattr(lora, key) is not None and isinstance(lora.target_modules, str):
            message = (
                f"needs target_modules as a list of names, not {lora.target_modules}; `lorafit targets` shows them"
            )
            yield Broken(f"lora.{key}", message, ("lora.target_modules",))
    if lora.layers_pattern is not None and lora.layers_to_transform is None:
        message = "only says where the layers of layers_to_transform are; write that too, or leave it out"
        yield Broken("lora.layers_pattern", message, ("lora.layers_to_transform",))


def initialisation_has_its_settings(recipe: Recipe) -> Iterator[Broken]:
    """Settings of another initialisation are ignored."""
    for method in ("eva", "corda"):
        key = f"{method}_config"
        if getattr(recipe.lora, key) is not None and recipe.lora.init_lora_weights != method:
            message = f"is ignored without init_lora_weights: {method}; write that, or leave it out"
            yield Broken(f"lora.{key}", message, ("lora.init_lora_weights",))


def initialisation_fits_the_base_weights(recipe: Recipe) -> Iterator[Broken]:
    """PiSSA, CorDA and the orthogonal start compute with full-precision weights; LoftQ mends 4-bit ones."""
    method, section = recipe.lora.init_lora_weights, recipe.quantization
    others = ("quantization", "quantization.load_in_4bit")
    full_precision = ["pissa", "corda"]
    if section is not None and (section.load_in_8bit or section.bnb_4bit_quant_storage == "uint8"):
        full_precision.append("orthogonal")  # takes the type of the stored weights for its own
    if section is not None and method in full_precision:
        message = (
            f"{method} cannot start from quantised weights; write true, olora, eva or loftq, or leave quantization out"
        )
        yield Broken("lora.init_lora_weights", message, others)
    if method == "loftq" and (section is None or not section.load_in_4bit):
        message = "loftq fits the adapter to what 4-bit weights lose; it needs quantization.load_in_4bit: true"
        yield Broken("lora.init_lora_weights", message, others)


_CONVERTED = ("pissa", "olora", "corda")


def start_goes_with_what_else_is_trained(recipe: Recipe) -> Iterator[Broken]:
    """What such a start moved out of the base is taken out of the adapter again when it is saved, and peft saves
    nothing but the factors then (peft 0.21, `subtract_mutated_init`); its EVA cannot read a layer of trained rows."""
    lora, method = recipe.lora, recipe.lora.init_lora_weights
    rows = {
        "lora.trainable_token_indices": lora.trainable_token_indices is not None,
        "model.add_tokens": bool(recipe.model.add_tokens),
    }
    besides = {
        "lora.use_dora": lora.use_dora,
        "lora.modules_to_save": bool(lora.modules_to_save),
        "lora.bias": lora.bias != "none",
    }
    lost = rows | besides if method in _CONVERTED else rows if method == "eva" else {}
    for key, is_trained in lost.items():
        if is_trained:
            what = "would not be saved" if method in _CONVERTED else "cannot be trained"
            message = f"{what} with init_lora_weights: {method}; write true there, or leave this out"
            yield Broken(key, message, ("lora.init_lora_weights",))


def orthogonal_ranks_are_even(recipe: Recipe) -> Iterator[Broken]:
    """PEFT splits the rank in two halves."""
    lora = recipe.lora
    if lora.init_lora_weights != "orthogonal":
        return
    ranks = {"lora.r": lora.r, **{f"lora.rank_pattern.{name}": rank for name, rank in lora.rank_pattern.items()}}
    for key, rank in ranks.items():
        if rank % 2:
            message = f"{rank} is odd; init_lora_weights: orthogonal needs an even rank"
            yield Broken(key, message, ("lora.init_lora_weights",))


def lora_bias_stands_alone(recipe: Recipe) -> Iterator[Broken]:
    """PEFT refuses `lora_bias` with DoRA and with every start but its own."""
    lora = recipe.lora
    if not lora.lora_bias:
        return
    if lora.use_dora:
        yield Broken("lora.lora_bias", "does not work with use_dora; keep one of the two", ("lora.use_dora",))
    if isinstance(lora.init_lora_weights, str):
        message = f"does not work with init_lora_weights: {lora.init_lora_weights}; write true there, or leave it out"
        yield Broken("lora.lora_bias", message, ("lora.init_lora_weights",))


def parameters_take_plain_lora(recipe: Recipe) -> Iterator[Broken]:
    """PEFT's adapter of a bare parameter knows no dropout, DoRA, bias or start from the weights."""
    lora = recipe.lora
    if not lora.target_parameters:
        return
    unfit = {
        "lora_dropout": lora.lora_dropout > 0,
        "use_dora": lora.use_dora,
        "lora_bias": lora.lora_bias,
        "init_lora_weights": isinstance(lora.init_lora_weights, str) and lora.init_lora_weights != "gaussian",
    }
    for key, is_unfit in unfit.items():
        if is_unfit:
            yield Broken(
                f"lora.{key}", "does not work with target_parameters; leave it out", ("lora.target_parameters",)
            )


def adalora_takes_no_lora_variant(recipe: Recipe) -> Iterator[Broken]:
    """AdaLoRA refuses some keys of `lora` and ignores others."""
    lora = recipe.lora
    if recipe.adalora is None:
        return
    refused = {
        "use_dora": lora.use_dora,
        "target_parameters": bool(lora.target_parameters),
        "use_rslora": lora.use_rslora,
        "lora_bias": lora.lora_bias,
        "init_lora_weights": isinstance(lora.init_lora_weights, str),
        "rank_pattern": bool(lora.rank_pattern),
        "alpha_pattern": bool(lora.alpha_pattern),
    }
    for key, is_set in refused.items():
        if is_set:
            yield Broken(f"lora.{key}", "does not work with adalora; leave one of the two out", ("adalora",))
    if "r" in lora.model_fields_set:
        yield Broken("lora.r", "is ignored with adalora; write adalora.init_r and adalora.target_r", ("adalora",))


def adalora_prunes(recipe: Recipe) -> Iterator[Broken]:
    """Ranks fall from `init_r` to `target_r` between `tinit` and the last `tfinal` steps."""
    adalora = recipe.adalora
    if adalora is not None and adalora.target_r >= adalora.init_r:
        message = f"{adalora.target_r} is not below init_r {adalora.init_r}: nothing would be pruned; raise init_r"
        yield Broken("adalora.target_r", message, ("adalora.init_r",))


def _matches(pattern: str, name: str) -> bool:
    try:
        compiled = re.compile(pattern)
        return not backtracks_for_ever(pattern) and any(compiled.fullmatch(full) for full in (name, f"model.{name}"))
    except (re.error, OverflowError, RecursionError):
        return False


RULES: tuple[Rule, ...] = (
    exactly_one_bit_width,
    no_keys_of_the_other_bit_width,
    quantized_weights_can_be_sharded,
    adapter_can_be_sharded,
    no_adapter_on_the_output_head,
    patterns_are_regular_expressions,
    module_names_stand_in_lists,
    lists_of_modules_name_something,
    no_module_adapted_and_saved_whole,
    token_rows_or_the_whole_embedding,
    layer_choice_needs_listed_targets,
    initialisation_has_its_settings,
    initialisation_fits_the_base_weights,
    start_goes_with_what_else_is_trained,
    orthogonal_ranks_are_even,
    lora_bias_stands_alone,
    parameters_take_plain_lora,
    adalora_takes_no_lora_variant,
    adalora_prunes,
)
