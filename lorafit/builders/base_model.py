"""`model` section in, base model out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lorafit.builders.bnb_config import bnb_config
from lorafit.builders.model_files import BaseModelFiles, read_json, stop_token_ids
from lorafit.errors import ModelError
from lorafit.recipe.sections import ModelSection, QuantizationSection


def check_base_model(section: ModelSection) -> BaseModelFiles:
    """The files of the base model, looked at before a weight is read. Raises ModelError."""
    directory = Path(section.model_name_or_path)
    config = read_json(directory / "config.json")
    known = AutoConfig.from_pretrained(directory, trust_remote_code=section.trust_remote_code)
    return BaseModelFiles(
        name=section.model_name_or_path,
        directory=directory,
        revision=None,
        config=config,
        tensors={},
        total_bytes=0,
        stop_token_ids=stop_token_ids(directory, config=config),
        vocab_size=known.get_text_config().vocab_size,
    )


def load_base_model(
    model: ModelSection,
    quantization: QuantizationSection | None,
    *,
    dtype: torch.dtype | str,
    device_map: Any,
) -> PreTrainedModel:
    """The base model with every weight from its files. Raises ModelError where the files lack one.

    transformers starts missing tensors at random, with a warning only.
    """
    keys: dict[str, Any] = dict(model.extra)
    if model.attn_implementation != "auto":
        keys["attn_implementation"] = model.attn_implementation
    if quantization is not None:
        keys["quantization_config"] = bnb_config(quantization)
    base, loaded = AutoModelForCausalLM.from_pretrained(
        model.model_name_or_path,
        revision=model.revision,
        dtype=dtype,
        device_map=device_map,
        trust_remote_code=model.trust_remote_code,
        use_safetensors=True,
        output_loading_info=True,
        **keys,
    )
    if missing := sorted(loaded["missing_keys"]):
        raise ModelError(f"lacks {len(missing)} tensors, the first {missing[0]}", where=model.model_name_or_path)
    return base
