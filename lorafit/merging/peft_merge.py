"""The merge by peft, in memory, for what cannot be streamed."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
import transformers
from peft import PeftModel

from lorafit.builders.base_model import load_base_model
from lorafit.builders.model_files import BaseModelFiles
from lorafit.errors import AdapterError
from lorafit.merging.adapted_model import AUTO_CLASSES
from lorafit.merging.adapter_files import Adapter


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
    task = AUTO_CLASSES.get(str(adapter.config.get("task_type")))
    if task is None:
        model = load_base_model(adapter.base, None, dtype="auto", device_map=None)
    else:
        model = getattr(transformers, task).from_pretrained(base_files.directory, dtype="auto", use_safetensors=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged = PeftModel.from_pretrained(model, where).merge_and_unload(safe_merge=True)
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        message = " ".join(str(error).split())[:300]
        raise AdapterError(f"peft cannot merge it: {message}", where=where) from error
    if dtype:
        merged = merged.to(getattr(torch, dtype))
    size = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    merged.save_pretrained(directory, **size)
