"""AdaLoRA between two sessions: its factors whole, and the importance by which it shares out ranks.

peft saves an AdaLoRA adapter without the ranks that are masked at the moment, which may come back, and does not save
the averages of importance at all.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import AdaLoraConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import save_file

from lorafit.builders.adapter import rank_allocator

FILE = "rank_allocation.safetensors"
_AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


def save(model: PeftModel, directory: Path) -> None:
    """Write `FILE` for an AdaLoRA model; nothing for any other."""
    config = model.peft_config["default"]
    if not isinstance(config, AdaLoraConfig):
        return
    tensors = {f"weight {name}": tensor for name, tensor in _trained(model).items()}
    for kind in _AVERAGES:
        averages = getattr(rank_allocator(model), kind)
        tensors |= {f"{kind} {name}": tensor for name, tensor in averages.items()}
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(whole, directory / FILE, metadata={"rank_pattern": json.dumps(config.rank_pattern)})


@torch.no_grad()
def load(model: PeftModel, directory: Path) -> None:
    """Be as the model was when `save` wrote."""
    trained = _trained(model)
    config = model.peft_config["default"]
    assert isinstance(config, AdaLoraConfig)
    averages: dict[str, dict[str, torch.Tensor]] = {kind: {} for kind in _AVERAGES}
    with safe_open(directory / FILE, "pt") as file:
        config.rank_pattern = json.loads(file.metadata()["rank_pattern"])
        for key in file.keys():  # noqa: SIM118  (not a dict)
            kind, name = key.split(" ", 1)
            if kind == "weight":
                trained[name].copy_(file.get_tensor(key))
            else:
                averages[kind][name] = file.get_tensor(key).to(trained[name].device)
    for kind, tensors in averages.items():
        setattr(rank_allocator(model), kind, tensors)


def _trained(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    """By the names that the allocator knows them by."""
    named = model.get_base_model().named_parameters()
    return {name: tensor for name, tensor in named if tensor.requires_grad or "ranknum" in name}
