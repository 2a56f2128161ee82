"""Rules of the `extra` mappings: only what the library object takes and the recipe does not say elsewhere."""

import re
from collections.abc import Iterator, Mapping

from lorafit.recipe.recipe import Recipe
from lorafit.recipe.rules.broken import Broken, Rule
from lorafit.recipe.rules.values import Takes, refused_values
from lorafit.recipe.suggest import GUESSES, extra_key

_YES_OR_NO, _TEXT, _COUNT = Takes(bool), Takes(str, or_null=True), Takes(int, 1, or_null=True)
_BETA = Takes(float, 0, 1, is_below=True)
BACKENDS = ("inductor", "eager", "aot_eager", "cudagraphs", "openxla", "tvm")

TRAINING_EXTRA: Mapping[str, Takes] = {
    "optim_args": _TEXT,
    **{"adam_beta1": _BETA, "adam_beta2": _BETA},
    "adam_epsilon": Takes(float, 0, 1, is_above=True),  # 0 is 0 / 0 where nothing moves yet, as in A while B is 0
    "average_tokens_across_devices": _YES_OR_NO,
    **{"bf16_full_eval": _YES_OR_NO, "fp16_full_eval": _YES_OR_NO},
    "tf32": Takes(bool, or_null=True),
    "torch_compile_backend": Takes(str, choices=BACKENDS, or_null=True),
    "torch_compile_mode": Takes(
        str, choices=("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"), or_null=True
    ),
    "torch_empty_cache_steps": _COUNT,
    **dict.fromkeys(("project", "trackio_space_id", "trackio_bucket_id"), _TEXT),
    "trackio_static_space_id": _TEXT,
    "eval_delay": Takes(float, 0),
    "eval_accumulation_steps": _COUNT,
    "full_determinism": _YES_OR_NO,
    "data_seed": Takes(int, 0, 2**32, is_below=True, or_null=True),
    **dict.fromkeys(("dataloader_drop_last", "dataloader_persistent_workers", "dataloader_in_order"), _YES_OR_NO),
    "dataloader_prefetch_factor": _COUNT,
    "dataloader_multiprocessing_context": Takes(str, choices=("fork", "spawn", "forkserver"), or_null=True),
    "ddp_bucket_cap_mb": _COUNT,
    **dict.fromkeys(("ddp_broadcast_buffers", "ddp_static_graph"), Takes(bool, or_null=True)),
    "ddp_timeout": Takes(int, 1, 10**7),
    "router_aux_loss_coef": Takes(float, 0, or_null=True),
    "pad_to_multiple_of": Takes(int, 1, 10**5, or_null=True, or_text="auto"),
    "activation_offloading": _YES_OR_NO,
}
"""Values of what is left of the arguments; a test compares names and types."""

OPTIM_ARGS = {
    "sgd": ("momentum", "dampening", "weight_decay", "nesterov"),
    "adagrad": ("lr_decay", "weight_decay", "eps"),
    "rmsprop": ("momentum", "alpha", "eps", "weight_decay", "centered"),
    "ademamix": ("beta1", "beta2", "beta3", "alpha", "eps", "t_alpha", "t_beta3"),
}
"""What transformers' handler of an optimizer reads of `optim_args`; it leaves out the rest without a word."""
_SWITCHES = ("nesterov", "centered")


def extra_keys_reach_the_library(recipe: Recipe) -> Iterator[Broken]:
    """Libraries swallow keywords they do not know, or raise after the model is loaded."""
    extras = {"model": recipe.model.extra, "lora": recipe.lora.extra, "training": recipe.training.extra}
    if recipe.quantization is not None:
        extras["quantization"] = recipe.quantization.extra
    wrong = 0
    for section, extra in extras.items():
        for key in extra:
            if message := extra_key(section, key, type(recipe), guesses=wrong < GUESSES):
                wrong += 1
                yield Broken(f"{section}.extra.{key}", message)


def extra_values_are_taken(recipe: Recipe) -> Iterator[Broken]:
    """The library would raise after the model is loaded, or go on with them."""
    for key, message in refused_values(recipe.training.extra, TRAINING_EXTRA).items():
        yield Broken(f"training.extra.{key}", message)


def optim_args_are_read(recipe: Recipe) -> Iterator[Broken]:
    """They are split at `=` and `,` when the optimizer is made, and most optimizers read none."""
    written, optim = recipe.training.extra.get("optim_args"), recipe.training.optim
    if not isinstance(written, str):
        return
    key, others = "training.extra.optim_args", ("training.optim",)
    known = OPTIM_ARGS.get("ademamix" if "ademamix" in optim else optim, ())
    if not known:
        yield Broken(key, f"is not read by {optim}; leave it out", others)
        return
    for part in written.replace(" ", "").split(","):
        name, equals, value = part.partition("=")
        number = r"(?i:true|false)" if name in _SWITCHES else r"\d+(\.\d*)?([eE][+-]?\d+)?"
        if name not in known:
            message = f'"{name}" is not an argument of {optim}, it has {", ".join(known)}; write name=value'
            yield Broken(key, f"{message}, with commas between them", others)
        elif not equals or not re.fullmatch(number, value):
            what = "true or false" if name in _SWITCHES else "a number"
            yield Broken(key, f'"{part}" gives {name} no value; write {name}= and {what}', others)


def workers_are_there_to_be_told(recipe: Recipe) -> Iterator[Broken]:
    """torch refuses settings of its worker processes where there are none, after the model is loaded."""
    training = recipe.training
    for key in ("dataloader_prefetch_factor", "dataloader_persistent_workers", "dataloader_multiprocessing_context"):
        if training.extra.get(key) and not training.dataloader_num_workers:
            message = "is for worker processes; write training.dataloader_num_workers: 1 or more, or leave it out"
            yield Broken(f"training.extra.{key}", message, ("training.dataloader_num_workers",))


def compiling_is_asked_for_by_its_key(recipe: Recipe) -> Iterator[Broken]:
    """The library compiles as soon as one of them is given, whatever `torch_compile` says."""
    for key in ("torch_compile_backend", "torch_compile_mode"):
        if key in recipe.training.extra and not recipe.training.torch_compile:
            message = "goes with training.torch_compile: true; write that, or leave it out"
            yield Broken(f"training.extra.{key}", message, ("training.torch_compile",))


RULES: tuple[Rule, ...] = (
    extra_keys_reach_the_library,
    extra_values_are_taken,
    optim_args_are_read,
    workers_are_there_to_be_told,
    compiling_is_asked_for_by_its_key,
)
