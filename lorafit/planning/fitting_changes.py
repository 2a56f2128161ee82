"""What would make a recipe smaller, each change planned anew; and the changes that make it fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedConfig

from lorafit.builders.lora_config import trains_a_tied_embedding
from lorafit.planning.estimate import Estimate, Estimator
from lorafit.planning.plan_result import Advice
from lorafit.planning.recipe_changes import Changes, changed
from lorafit.planning.targets import target_table
from lorafit.recipe import Recipe
from lorafit.recipe.rules.run import WITH_SHARDED_WEIGHTS

LOW_RANK = 8
"""The lowest rank that is proposed; `lorafit rank-sweep` tells what a rank costs."""
LEAST_SAVING = 0.005
"""Share of what is allocated, below which a change is not worth a line."""
STORAGE = "quantization.bnb_4bit_quant_storage"
"""FSDP2 shards floating types only; that of the other weights."""


@dataclass(frozen=True)
class Change:
    """A proposal: what it does, in words, and the keys."""

    what: str
    keys: Changes


def proposals(estimate: Estimate, *, config: PreTrainedConfig, count: int) -> Iterator[Change]:
    """What could be changed, in the order it is tried: first what changes nothing but time."""
    recipe = estimate.recipe
    training, lora = recipe.training, recipe.lora
    if not estimate.checkpointing:
        yield Change("recompute activations in the backward pass", {"training.gradient_checkpointing": True})
    if estimate.peak_at == "evaluation" and training.per_device_eval_batch_size > 1:
        yield Change("evaluate one row at a time", {"training.per_device_eval_batch_size": 1})
    yield from _smaller_batches(recipe)
    if training.optim.startswith("adamw_torch"):
        yield Change("optimizer states in 8 bits", {"training.optim": "paged_adamw_8bit"})
    if count > 1 and recipe.launch.strategy == "ddp" and not trains_a_tied_embedding(lora, config):
        keys: Changes = {"launch.strategy": "fsdp2", "launch.num_processes": count}
        if recipe.quantization is not None:
            keys[STORAGE] = "bfloat16"
        if training.optim not in WITH_SHARDED_WEIGHTS:
            keys["training.optim"] = "adamw_torch_fused"
        yield Change(f"weights spread over {count} GPUs (FSDP2)", keys)
    if recipe.quantization is None:
        keys = {"quantization.load_in_4bit": True}
        if recipe.launch.strategy == "fsdp2":
            keys[STORAGE] = "bfloat16"
        yield Change("base weights in 4 bits (QLoRA)", keys)
    if lora.use_dora:
        yield Change("plain LoRA instead of DoRA", {"lora.use_dora": False})
    if recipe.adalora is None and lora.r > LOW_RANK:
        keys = {"lora.r": LOW_RANK}
        if lora.lora_alpha is not None:
            keys["lora.lora_alpha"] = max(1, lora.lora_alpha * LOW_RANK // lora.r)
        yield Change(f"rank {LOW_RANK}", keys)
    attention = list(target_table(config).attention().names)
    if lora.target_modules == "all-linear" and attention:
        yield Change("adapters on attention only", {"lora.target_modules": attention})
    if training.max_length >= 512:
        yield Change("rows half as long", {"training.max_length": training.max_length // 2})


def _smaller_batches(recipe: Recipe) -> Iterator[Change]:
    """Fewer rows at once, as many in a step."""
    size, passes = recipe.training.per_device_train_batch_size, recipe.training.gradient_accumulation_steps
    for smaller in dict.fromkeys((size // 2, 1)):
        if 0 < smaller < size and size % smaller == 0:
            keys = {
                "training.per_device_train_batch_size": smaller,
                "training.gradient_accumulation_steps": passes * size // smaller,
            }
            what = f"{smaller} row{'s' * (smaller > 1)} at once, {size * passes} a step as before"
            yield Change(what, keys)


def advice(estimator: Estimator, estimate: Estimate, *, config: PreTrainedConfig) -> tuple[Advice, ...]:
    """Each proposal alone, the largest saving first."""
    given = []
    for change in proposals(estimate, config=config, count=estimator.count):
        recipe = changed(estimate.recipe, change.keys)
        if recipe is None:
            continue
        then = estimator.estimate(recipe)
        speed = then.tokens_per_second
        given.append(
            Advice(
                what=change.what,
                change=change.keys,
                allocated_bytes=then.allocated,
                saving_bytes=estimate.allocated - then.allocated,
                verdict=then.verdict,
                tokens_per_second=None if speed is None else speed * estimator.count,
            )
        )
    useful = [one for one in given if one.saving_bytes > LEAST_SAVING * estimate.allocated]
    return tuple(sorted(useful, key=lambda one: one.saving_bytes, reverse=True))


def fitting(estimator: Estimator, estimate: Estimate, *, config: PreTrainedConfig) -> tuple[Changes, Estimate]:
    """Changes after which the recipe fits, as few as that takes in the order of `proposals`, and what it then takes.

    Rows are never shortened: that would change the data. Without enough to change, the smallest that was found.
    """
    made: Changes = {}
    best = estimate
    tried: set[str] = set()
    while best.verdict != "fits":
        change = next(
            (
                one
                for one in proposals(best, config=config, count=estimator.count)
                if one.what not in tried and "training.max_length" not in one.keys
            ),
            None,
        )
        if change is None:
            return made, best
        tried.add(change.what)
        recipe = changed(best.recipe, change.keys)
        then = None if recipe is None else estimator.estimate(recipe, replay=True)
        if then is not None and then.allocated < best.allocated:
            made, best = made | change.keys, then
    return made, best
