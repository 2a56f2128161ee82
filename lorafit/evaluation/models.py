"""The three models, one after the other: never more than one copy of the weights in memory."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from lorafit.builders.base_model import load_base_model
from lorafit.errors import AdapterError
from lorafit.evaluation.subject import Subject
from lorafit.merging.adapter_files import Adapter
from lorafit.merging.verify_reference import grow_to
from lorafit.tasks import TASKS


def models(subject: Subject, *, with_base: bool) -> Iterator[tuple[str, PreTrainedModel | PeftModel]]:
    """`base`, `adapter` and, where there is one, `merged`; each is gone when the next is asked for.

    The base comes before the adapter is attached, not with the adapter switched off: what an adapter does to the base
    itself (its biases, an initialisation such as PiSSA's) cannot reach it. The merged model is read when the base is
    freed.
    """
    recipe = subject.recipe
    device_map = "cuda" if torch.cuda.is_available() else None
    task, dtype = TASKS[recipe.task], recipe.model.dtype
    model = load_base_model(recipe.model, recipe.quantization, dtype=dtype, device_map=device_map, task=task).eval()
    if with_base:
        yield "base", model
    adapted = _attached(model, subject.adapter)
    yield "adapter", adapted
    if subject.merged is None:
        return
    del model, adapted
    _free()
    section = recipe.model.model_copy(update={"model_name_or_path": str(subject.merged), "extra": {}, "dtype": "auto"})
    yield "merged", load_base_model(section, None, dtype="auto", device_map=device_map, task=task).eval()


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _attached(model: PreTrainedModel, adapter: Adapter) -> PeftModel:
    """The adapter on its base, which is given the rows of the embedding that the adapter brings.

    That it fits was checked in outline. Raises AdapterError.
    """
    grow_to(model, adapter.tensors)
    try:
        with warnings.catch_warnings(action="ignore"):  # of tensors that are missing: none are
            return PeftModel.from_pretrained(model, str(adapter.directory)).eval()
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        said = " ".join(str(error).split())[:300]
        message = f"does not fit {adapter.base.model_name_or_path}: {said}"
        raise AdapterError(message, where=str(adapter.weights)) from error
