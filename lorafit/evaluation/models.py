"""The three models, one after the other: never more than one copy of the weights in memory."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator

import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import PreTrainedModel

from lorafit.builders.base_model import load_base_model
from lorafit.errors import AdapterError
from lorafit.evaluation.subject import Subject
from lorafit.merging.adapter_files import Adapter


def models(subject: Subject, *, with_base: bool) -> Iterator[tuple[str, PreTrainedModel | PeftModel]]:
    """`base`, `adapter` and, where there is one, `merged`; each is gone when the next is asked for.

    The base comes before the adapter is attached, not with the adapter switched off: what an adapter does to the base
    itself (its biases, an initialisation such as PiSSA's) cannot reach it. The merged model is read when the base is
    freed.
    """
    recipe = subject.recipe
    device_map = "cuda" if torch.cuda.is_available() else None
    model = load_base_model(recipe.model, recipe.quantization, dtype=recipe.model.dtype, device_map=device_map).eval()
    if with_base:
        yield "base", model
    adapted = _attached(model, subject.adapter)
    yield "adapter", adapted
    if subject.merged is None:
        return
    del model, adapted
    _free()
    section = recipe.model.model_copy(update={"model_name_or_path": str(subject.merged), "extra": {}, "dtype": "auto"})
    yield "merged", load_base_model(section, None, dtype="auto", device_map=device_map).eval()


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _attached(model: PreTrainedModel, adapter: Adapter) -> PeftModel:
    """The adapter on its base. peft takes tensors that are missing or too many without a word; here they are refused.

    Raises AdapterError.
    """
    where = str(adapter.weights)
    try:
        with warnings.catch_warnings(action="ignore"):  # of tensors that are missing: named below
            adapted = PeftModel.from_pretrained(model, str(adapter.directory)).eval()
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        said = " ".join(str(error).split())[:300]
        raise AdapterError(f"does not fit {adapter.base.model_name_or_path}: {said}", where=where) from error
    wanted = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    there = {name for name in adapter.tensors if "lora_" in name}
    if missing := sorted(name for name in wanted if "lora_" in name and name not in there):
        message = f"has no {missing[0]} ({len(missing)} tensors in all), which its settings make of this base"
        raise AdapterError(f"{message}: it was trained on another base, or is not whole", where=where)
    if strange := sorted(there - wanted):
        message = f"has {strange[0]} ({len(strange)} tensors in all), which this base has no place for"
        raise AdapterError(f"{message}: it was trained on another base", where=where)
    return adapted
