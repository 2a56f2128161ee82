"""`lora` (and `adalora`) in, `peft.LoraConfig` out, with every name checked against the model it is for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft import AdaLoraConfig, LoraConfig
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from lorafit.builders.adapter_fit import Where, names_without_match
from lorafit.builders.model_modules import modules_of
from lorafit.errors import AdapterError
from lorafit.recipe.rules.adapter import EMBEDDINGS
from lorafit.recipe.sections import AdaLoraSection, LoraSection
from lorafit.tasks import DEFAULT_TASK, Task

# Set before the number of steps is known; `set_total_steps` in the adapter builder puts the real one in.
_UNKNOWN_TOTAL_STEPS = 2**31


def lora_config(
    lora: LoraSection,
    *,
    adalora: AdaLoraSection | None,
    model: PreTrainedModel,
    where: Where,
    by_fsdp: bool = False,
    token_ids: Sequence[int] = (),
    task: Task = DEFAULT_TASK,
) -> LoraConfig:
    """The `LoraConfig` (`AdaLoraConfig` with `adalora`) of a model; `by_fsdp` where FSDP shards it.

    The rows of `token_ids` are trained in embedding and head. `where(key, message)` places a problem in the recipe.
    Raises AdapterError when a listed name matches nothing, or FSDP would train something else.
    """
    problems = list(names_without_match(lora, modules_of(model), where))
    if by_fsdp and (key := trains_a_tied_embedding(lora, model.config)):
        # accelerate ties again what peft keeps apart: the trained embedding becomes the output head, too.
        message = "the output head shares its weight with the embedding; fsdp2 would train another model than ddp does"
        problems.append(where(key, f"{message}; leave it out, or write launch.strategy: ddp"))
    if problems:
        raise AdapterError(problems)
    shared = {
        "task_type": task.model.peft_type,
        "lora_alpha": lora.lora_alpha if lora.lora_alpha is not None else 2 * (adalora.init_r if adalora else lora.r),
        "lora_dropout": lora.lora_dropout,
        "target_modules": _target_modules(lora, model),
        "exclude_modules": _as_list(lora.exclude_modules),
        "target_parameters": _as_list(lora.target_parameters),
        "use_rslora": lora.use_rslora,
        "use_dora": lora.use_dora,
        "init_lora_weights": _init_method(lora),
        "loftq_config": {},
        "eva_config": (lora.eva_config or {}) if lora.init_lora_weights == "eva" else None,
        "corda_config": (lora.corda_config or {}) if lora.init_lora_weights == "corda" else None,
        "rank_pattern": dict(lora.rank_pattern),
        "alpha_pattern": dict(lora.alpha_pattern),
        "layers_to_transform": _as_list(lora.layers_to_transform),
        "layers_pattern": _as_list(lora.layers_pattern),
        "modules_to_save": _as_list(lora.modules_to_save),
        "trainable_token_indices": _token_indices(lora, model, token_ids),
        "bias": lora.bias,
        "lora_bias": lora.lora_bias,
        "fan_in_fan_out": _has_conv1d(model),
        **lora.extra,
    }
    try:
        if adalora is None:
            return LoraConfig(r=lora.r, **shared)
        schedule: dict[str, Any] = {
            "target_r": adalora.target_r,
            "init_r": adalora.init_r,
            "tinit": adalora.tinit,
            "tfinal": adalora.tfinal,
            "deltaT": adalora.delta_t,
            "orth_reg_weight": adalora.orth_reg_weight,
            "total_step": _UNKNOWN_TOTAL_STEPS,
        }
        return AdaLoraConfig(**shared, **schedule)
    except (TypeError, ValueError, ImportError) as error:
        raise AdapterError(where("lora", f"peft refuses this section: {error}")) from error


def trains_a_tied_embedding(lora: LoraSection, config: PreTrainedConfig) -> str | None:
    """The key that trains an embedding, or rows of it, that is the output head, too; None where none does."""
    if not getattr(config, "tie_word_embeddings", False):
        return None
    if lora.trainable_token_indices is not None:
        return "lora.trainable_token_indices"
    saved = {name.rpartition(".")[2] for name in lora.modules_to_save or ()}
    return "lora.modules_to_save" if saved & {*EMBEDDINGS} else None


def _as_list(value: object) -> object:
    """PEFT wants lists where a recipe holds tuples."""
    return list(value) if isinstance(value, tuple) else value


def _target_modules(lora: LoraSection, model: PreTrainedModel) -> object:
    """What peft is told to adapt. Its CorDA preparation does not know `all-linear`, so it gets the names."""
    if lora.init_lora_weights == "corda" and lora.target_modules == "all-linear":
        head = model.get_output_embeddings()
        return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]
    return _as_list(lora.target_modules)


def _init_method(lora: LoraSection) -> bool | str:
    """LoftQ starts as plain LoRA: its factors are fitted to the 4-bit weights after the model is built."""
    return True if lora.init_lora_weights == "loftq" else lora.init_lora_weights


def _token_indices(
    lora: LoraSection, model: PreTrainedModel, added: Sequence[int]
) -> list[int] | dict[str, list[int]] | None:
    """What the section says, and `added` in embedding and head: alone, peft trains the rows of the embedding."""
    indices = lora.trainable_token_indices
    if isinstance(indices, dict):
        chosen = {name: list(ids) for name, ids in indices.items()}
    elif not added:
        return None if indices is None else list(indices)
    else:
        chosen = {} if indices is None else {_short_name(model, model.get_input_embeddings()): list(indices)}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    matrices = [embedding] if head.weight is embedding.weight else [embedding, head]
    for name in (_short_name(model, matrix) for matrix in matrices if added):
        chosen[name] = sorted({*chosen.get(name, ()), *added})
    return chosen


def _short_name(model: PreTrainedModel, module: nn.Module) -> str:
    """`embed_tokens`; the whole name where another module is called so, too."""
    name = next(name for name, one in model.named_modules() if one is module)
    last = name.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other, _ in model.named_modules()) == 1 else name


def _has_conv1d(model: nn.Module) -> bool:
    """GPT-2 keeps its weights transposed (`Conv1D`); PEFT must know before it merges."""
    return any(type(module).__name__ == "Conv1D" for module in model.modules())
