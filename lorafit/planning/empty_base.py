"""The base model as `load_base_model` makes it, without a weight: on torch's meta device, in no time and no memory."""

from __future__ import annotations

from typing import Any, cast

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer

from lorafit.builders.auto_class import auto_class
from lorafit.builders.base_model import WHERE_FILES_LIE
from lorafit.builders.bnb_config import bnb_config
from lorafit.recipe.sections import ModelSection, QuantizationSection
from lorafit.tasks import DEFAULT_TASK, Task

AS_SDPA = ("flash_attention_2", "flash_attention_3", "flex_attention")
"""Attention that needs a package or a compiler: planned as torch's own, which keeps the same tensors."""


def empty_base(
    section: ModelSection,
    quantization: QuantizationSection | None,
    *,
    config: PreTrainedConfig,
    task: Task = DEFAULT_TASK,
) -> PreTrainedModel:
    """The model of `config` on meta, in the recipe's type, its linear layers in 4 bits with `quantization`."""
    for key, value in section.extra.items():
        if key not in WHERE_FILES_LIE and hasattr(config, key):
            setattr(config, key, value)
    attention = "sdpa" if section.attn_implementation in AS_SDPA else section.attn_implementation
    chosen: dict[str, Any] = {} if attention == "auto" else {"attn_implementation": attention}
    with torch.device("meta"):
        model = auto_class(task.model).from_config(
            config, dtype=_dtype(section, config), trust_remote_code=section.trust_remote_code, **chosen
        )
    if quantization is not None:
        _quantize(model, quantization)
    return model


def _dtype(section: ModelSection, config: PreTrainedConfig) -> torch.dtype:
    """`auto` is the type the weights were saved in, as config.json repeats it; else transformers takes float32."""
    if section.dtype != "auto":
        return getattr(torch, section.dtype)
    return cast(torch.dtype, config.dtype or config.get_text_config().dtype or torch.float32)  # no string once read


def _quantize(model: PreTrainedModel, section: QuantizationSection) -> None:
    """By transformers' own choice of layers and bitsandbytes' own arithmetic of sizes."""
    quantizer = AutoHfQuantizer.from_config(bnb_config(section), pre_quantized=False)
    dtype = model.dtype
    quantizer.preprocess_model(model=model, device_map=None)
    _make_code_book()
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            written = module.weight
            value = written.data.to(dtype)
            value = value.T if module.source_cls is Conv1D else value
            settings = {key: setting for key, setting in written.__dict__.items() if key != "module"}
            module.weight = bnb.nn.Params4bit(value, requires_grad=False, module=module, **settings)._quantize("meta")
    quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer


def _make_code_book() -> None:
    """bitsandbytes makes it once, from numbers, which meta tensors do not hold."""
    if "dynamic" not in bnb.functional.name2qmap:
        with torch.device("cpu"):
            bnb.functional.name2qmap["dynamic"] = bnb.functional.create_dynamic_map()


def quantization_state(module: nn.Module) -> list[torch.Tensor]:
    """The scales of a layer in 4 bits; the code book is one for all layers and counts nothing."""
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    if state is None:  # weights that FSDP2 shards leave it with their module
        state = getattr(module, "quant_state", None)
    if state is None:
        return []
    tensors = [state.absmax, state.offset, state.state2.absmax if state.nested else None]
    return [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]
