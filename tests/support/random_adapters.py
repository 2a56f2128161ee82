"""Adapters with large random weights, made and merged in a moment; and what a merged model is compared with."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lorafit.merging.merge import MergeResult, merge
from support.tiny import byte_tokenizer


def random_adapter(directory: Path, base: Path, *, auto_class: Any = AutoModelForCausalLM, **settings: Any) -> Path:
    """A plain PEFT adapter whose every trained tensor is random and large enough to see."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        keys: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"}
        config = LoraConfig(**(keys | settings))
        config.task_type = config.task_type or "CAUSAL_LM"
        model = get_peft_model(auto_class.from_pretrained(base, dtype=torch.float32), config)
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                with torch.no_grad():
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(str(directory), save_embedding_layers=False)
    byte_tokenizer().save_pretrained(directory)
    return directory


def merged(adapter: Path, out: Path | None, **keys: Any) -> MergeResult:
    """Merge without verification, in silence."""
    arguments: dict[str, Any] = {"dtype": None, "max_shard_size": None, "base": None, "onto": None, "verify": False}
    return merge(
        adapter,
        out=out,
        progress=lambda total: lambda done: None,
        cache_dir=None,
        **(arguments | keys),
    )


def adapted(adapter: Path, base: Path, *, auto_class: Any = AutoModelForCausalLM, **keys: Any) -> PeftModel:
    """Base + adapter, by peft."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(auto_class.from_pretrained(base, **keys), adapter).eval()


def by_peft(adapter: Path, base: Path, directory: Path, *, auto_class: Any = AutoModelForCausalLM) -> Path:
    """What `merge_and_unload` and `save_pretrained` make of it."""
    shutil.rmtree(directory, ignore_errors=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted(adapter, base, auto_class=auto_class).merge_and_unload().save_pretrained(directory)
    return directory


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every file of a model."""
    return {
        name: tensor for path in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(path).items()
    }


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest between two models of the same tensors; 0 when they are the same bit for bit."""
    assert one.keys() == other.keys(), one.keys() ^ other.keys()
    assert all(one[name].dtype == other[name].dtype for name in one)
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


def logits(model: torch.nn.Module) -> torch.Tensor:
    """[2, 12, vocabulary] for fixed inputs, every token from 1 to 24 once."""
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 25).view(2, 12)).logits
