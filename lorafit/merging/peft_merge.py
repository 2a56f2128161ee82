"""The merge by peft, in memory, for what cannot be streamed."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from lorafit.builders.auto_class import auto_class
from lorafit.builders.base_model import load_base_model
from lorafit.builders.model_files import BaseModelFiles
from lorafit.errors import AdapterError
from lorafit.merging.adapter_files import Adapter
from lorafit.merging.verify_job import TYPES
from lorafit.merging.verify_reference import with_rows
from lorafit.recipe.sections import ModelSection
from lorafit.tasks import model_kind


def merge_with_peft(
    adapter: Adapter, base_files: BaseModelFiles, directory: Path, *, dtype: str | None, max_shard_size: int | None
) -> None:
    """Load base and adapter whole, merge, save. Raises AdapterError where peft cannot, or would not do it right."""
    start = str(adapter.config.get("init_lora_weights"))
    where = str(adapter.directory)
    if start.startswith("pissa_niter"):
        raise AdapterError(
            f"started from {start}, a random decomposition of the base that is another one at every loading: save it "
            "again from training with path_initial_model_for_weight_conversion, or train with init_lora_weights: pissa",
            where=where,
        )
    kind = model_kind(adapter.config.get("task_type"))
    # In float32, to round once: peft sums in the type of the base, in which PiSSA and OLoRA change it at loading, too.
    if kind.is_kept_by_base:
        base = ModelSection(
            model_name_or_path=str(base_files.directory), trust_remote_code=adapter.base.trust_remote_code
        )
        model = load_base_model(base, None, dtype="float32", device_map=None)
    else:
        model = auto_class(kind).from_pretrained(base_files.directory, dtype="float32", use_safetensors=True)
    with_rows(model, adapter.rows_needed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged = PeftModel.from_pretrained(model, where).merge_and_unload(safe_merge=True)
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        message = " ".join(str(error).split())[:300]
        raise AdapterError(f"peft cannot merge it: {message}", where=where) from error
    _round(merged, base_files, dtype=dtype)
    size = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    merged.save_pretrained(directory, **size)


def _round(model: PreTrainedModel, base_files: BaseModelFiles, *, dtype: str | None) -> None:
    """Store every weight in `dtype`, or in its type in the base: the usual one there where the names differ."""
    types = {name: TYPES[tensor.dtype] for name, tensor in base_files.tensors.items() if tensor.dtype in TYPES}
    usual = max(set(types.values()), key=list(types.values()).count)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(getattr(torch, dtype or types.get(name, usual)))
    model.config.dtype = dtype or usual
