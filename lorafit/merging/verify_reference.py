"""What base and adapter have to give, by peft: the first process of a verification."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorafit.builders.model_modules import weight_of
from lorafit.builders.weight_files import TensorInfo
from lorafit.merging.verify_job import Difference, Job, load_model, logits, stored_types
from lorafit.merging.weight_sketches import distance, floating_tensors, round_once, sketch, sketches

VOCABULARY = {"embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings"}
"""What architectures call the modules with a row for every token."""


def reference(job: Job) -> dict[str, Any]:
    """Logits of base + adapter, and of that merged in memory and rounded once, and sketches of its weights, in files;
    how much the adapter changes, and how much the second process may find changed otherwise."""
    tensors = load_file(Path(job.adapter) / "adapter_model.safetensors")
    rank = max(
        (min(tensor.shape) for name, tensor in tensors.items() if "lora_" in name and tensor.dim() == 2), default=1
    )
    model, loaded = load_model(job, job.base, labels=job.labels)
    grow_to(model, tensors)
    with_rows(model, job.rows)
    before, base_logits = sketches(model), logits(model, job)
    for name in loaded["missing_keys"]:  # a classification head is the adapter's, as a whole
        before.pop(name, None)
    adapted = PeftModel.from_pretrained(model, job.adapter).float().eval()
    left = {"logits.exact": logits(adapted, job)}
    untie(adapted)
    merged = adapted.merge_and_unload()
    left["logits.merged"] = logits(merged, job)
    changed = {}
    types = stored_types(merged, job, [name for name, _ in floating_tensors(merged)])
    for name, tensor in floating_tensors(merged):
        exact = sketch(tensor)
        update = distance(exact, before[name]) if name in before else float(exact.norm())
        allowed = round_once(tensor, dtype=getattr(torch, types[name]), update=update, rank=rank)
        changed[name] = {"update": update, "allowed": allowed}
        left |= {f"exact.{name}": exact, f"rounded.{name}": sketch(tensor)}
    left["logits.rounded"] = logits(merged, job)
    save_file(left, job.weights)
    effect = Difference.of(left["logits.exact"], base_logits)
    return {"tensors": changed, "effect": vars(effect)}


def grow_to(model: PreTrainedModel, tensors: Mapping[str, Tensor | TensorInfo]) -> None:
    """Give the base as many tokens as the adapter was trained with; the adapter brings what the new rows hold."""
    rows = {tensor.shape[0] for name, tensor in tensors.items() if is_vocabulary(name)}
    embeddings = model.get_input_embeddings()
    if rows and max(rows) != weight_of(embeddings).shape[0]:
        model.resize_token_embeddings(max(rows), mean_resizing=False)


@torch.no_grad()
def with_rows(model: PreTrainedModel, rows: int) -> None:
    """At least so many rows in embedding and head; those of new tokens are zero until the adapter brings them."""
    there = weight_of(model.get_input_embeddings()).shape[0]
    if rows > there:
        model.resize_token_embeddings(rows, mean_resizing=False)
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            if layer is not None:
                weight_of(layer)[there:] = 0


def is_vocabulary(name: str) -> bool:
    """A whole embedding or head, as an adapter holds it when it was trained, or when tokens were added."""
    return name.endswith(".weight") and "lora_" not in name and bool(VOCABULARY & set(name.split(".")))


def untie(model: nn.Module) -> None:
    """Give every module its own weights: peft would merge the update of one into the other, too."""
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in seen:
                setattr(module, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))
            seen.add(id(parameter))
