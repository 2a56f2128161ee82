"""The base model with its adapter attached and initialised: a `peft.PeftModel`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from peft import (
    AdaLoraConfig,
    LoraConfig,
    PeftModel,
    get_peft_model,
    initialize_lora_eva_weights,
    replace_lora_weights_loftq,
)
from peft.tuners.adalora import AdaLoraModel, RankAllocator
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import TrainableTokensWrapper
from torch import nn
from transformers import PreTrainedModel, set_seed

from lorafit.builders.experts import used_patterns_are_known
from lorafit.errors import AdapterError

Batches = Callable[[], Iterable[dict[str, torch.Tensor]]]

CHANGES_BASE_WEIGHTS = ("pissa", "olora", "corda")
"""Initialisations that move part of the base weight into the adapter; saved as a plain adapter of twice the rank."""


EXPERTS, ROUTER = "experts", "router"
"""Kinds of what is a parameter and no module: all experts of a layer, and what chooses among them."""


@dataclass(frozen=True)
class AdaptedModule:
    """One row of the table of adapted modules."""

    name: str
    kind: str
    r: int
    alpha: float
    scale: float
    """Multiplier of B·A·x: alpha / r, or alpha / sqrt(r) with use_rslora."""

    parameters: int
    """Trainable parameters the adapter adds here."""


def attach_adapter(
    model: PreTrainedModel,
    config: LoraConfig,
    *,
    init_method: bool | str,
    seed: int,
    autocast_adapter_dtype: bool,
    batches: Batches,
    base_directory: str,
) -> PeftModel:
    """`model` with an adapter, its base frozen.

    `batches` gives a few training batches for the initialisations that look at data (eva, corda). Raises AdapterError
    in peft's own words where it refuses this model.
    """
    # Norms, embeddings and head of a quantised base stay in the type they were loaded in, as TRL leaves them: made
    # float32, as peft's `prepare_model_for_kbit_training` does, they would make all activations float32.
    set_seed(seed)
    try:
        if init_method == "corda":
            preprocess_corda(model, config, run_model=lambda: _run(model, batches))
        with used_patterns_are_known():
            adapted = get_peft_model(
                model,
                config,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=init_method == "eva",  # its factors come from the data, not from memory
            )
        if init_method == "eva":
            initialize_lora_eva_weights(adapted, dataloader=list(batches()), show_progress_bar=False)
        if init_method == "loftq":
            replace_lora_weights_loftq(adapted, model_path=base_directory)
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        raise AdapterError(f"peft refuses this adapter on this model: {error}", where="lora") from error
    head = base_of(adapted).get_output_embeddings()
    if type(head) is TrainableTokensWrapper:
        head.__class__ = HeadWithTrainedRows
    return adapted


class HeadWithTrainedRows(TrainableTokensWrapper):
    """An output head some of whose rows are trained.

    TRL's loss reads weight and bias of a head; peft's wrapper answers for the weight alone (peft 0.21,
    `TrainableTokensWrapper._hasattr_wrapped`). Heads with a bias are refused: the wrapper leaves it out.
    """

    bias = None


@torch.no_grad()
def _run(model: nn.Module, batches: Batches) -> None:
    """One row at a time: peft's covariance hooks take no batch dimension above 1."""
    device = next(model.parameters()).device
    for batch in batches():
        for input_ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            model(input_ids=input_ids[mask.bool()].unsqueeze(0).to(device))


def base_of(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The model of transformers that an adapter sits on, with its layers in place."""
    return cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model


def set_total_steps(model: PeftModel, total_steps: int) -> None:
    """Tell AdaLoRA how many optimizer steps the run has; it shares out ranks between `tinit` and `total - tfinal`."""
    config = model.peft_config["default"]
    if isinstance(config, AdaLoraConfig):
        config.total_step = total_steps
        rank_allocator(model).set_total_step(total_steps)


def rank_allocator(model: PeftModel) -> RankAllocator:
    """AdaLoRA's."""
    return cast(AdaLoraModel, model.base_model).rankallocator


def adapted_modules(model: PeftModel) -> tuple[AdaptedModule, ...]:
    """Every module with an adapter, in the model's order."""
    table = []
    for name, module in model.get_base_model().named_modules():
        if not isinstance(module, LoraLayer) or "default" not in module.r:
            continue
        rank, own = module.r["default"], _own_parameters(cast(nn.Module, module))
        table.append(
            AdaptedModule(
                name=_plain_name(name, module),
                kind=_kind(module),
                r=rank if isinstance(rank, int) else int(rank.item()),
                alpha=module.lora_alpha["default"],
                scale=module.scaling["default"],
                parameters=sum(parameter.numel() for parameter in own if parameter.requires_grad),
            )
        )
    return tuple(table)


def _plain_name(name: str, module: BaseTunerLayer) -> str:
    """Of a parameter its own name: peft wraps the module that holds it once for each that is adapted."""
    if not isinstance(module, ParamWrapper):
        return name
    return f"{name.replace('.base_layer', '')}.{module.parameter_name}".removesuffix(".weight")


def _kind(module: BaseTunerLayer) -> str:
    if isinstance(module, ParamWrapper):
        return EXPERTS if module.get_param().dim() == 3 else ROUTER
    return type(module.get_base_layer()).__name__


def _own_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """Without those of an adapted module inside it, which is a row of its own."""
    yield from module.parameters(recurse=False)
    for child in module.children():
        if not isinstance(child, BaseTunerLayer):
            yield from _own_parameters(child)
