"""A trained adapter cut to smaller ranks, by the SVD of its update taken between its factors.

ΔW = s·B·A has rank r at most, and its singular values without the full matrix: B = Q_B·R_B, Aᵀ = Q_A·R_A, and the
r x r matrix s·R_B·R_Aᵀ = U·S·Vᵀ gives ΔW = (Q_B·U)·S·(Q_A·V)ᵀ. The first k columns are the nearest update of rank k
(Eckart and Young 1936).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorafit.builders.adapter import attach_adapter
from lorafit.builders.experts import used_patterns_are_known
from lorafit.training.save import WEIGHTS

_FACTOR = re.compile(r"\.lora_(embedding_)?[AB]\.")


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The update of one module as left · diag(values) · right, in float64 on the CPU."""

    left: Tensor
    """[out, r], columns orthonormal."""
    values: Tensor
    """[r] singular values of ΔW, falling."""
    right: Tensor
    """[r, in], rows orthonormal."""
    dtype: torch.dtype
    """Of the trained factors."""

    def cut(self, rank: int, *, scale: float) -> tuple[Tensor, Tensor]:
        """A [rank, in] and B [out, rank] with scale · B · A the nearest update of this rank; rows of 0 past its own."""
        kept = min(rank, len(self.values))
        root = (self.values[:kept] / scale).sqrt()
        a, b = torch.zeros(rank, self.right.shape[1]), torch.zeros(self.left.shape[0], rank)
        a[:kept], b[:, :kept] = root[:, None] * self.right[:kept], self.left[:, :kept] * root
        return a.to(self.dtype), b.to(self.dtype)


def spectrum(a: Tensor, b: Tensor, *, scale: float, dtype: torch.dtype) -> Spectrum:
    """Of scale · B · A, with A [r, in] and B [out, r]."""
    basis_b, small_b = torch.linalg.qr(b.detach().cpu().double())
    basis_a, small_a = torch.linalg.qr(a.detach().cpu().double().T)
    left, values, right = torch.linalg.svd(scale * small_b @ small_a.T, full_matrices=False)
    return Spectrum(basis_b @ left, values, right @ basis_a.T, dtype)


@dataclass(frozen=True, eq=False)
class Trained:
    """What is in an adapter: the update of each module, and all that is not a pair of factors."""

    modules: Mapping[str, Spectrum]
    others: Mapping[str, Tensor]
    """DoRA's magnitudes, whole trained modules, trained tokens, biases."""


def read_trained(base: PreTrainedModel, adapter: Path) -> tuple[Trained, PreTrainedModel]:
    """What is in the adapter on disk, and `base` as it was."""
    with used_patterns_are_known():
        model = PeftModel.from_pretrained(base, str(adapter), is_trainable=True)
    dtype = next(iter(load_file(adapter / WEIGHTS).values())).dtype  # in memory it is float32
    modules = {}
    for name, layer in lora_layers(model):
        a, b = factors(layer)
        modules[name] = spectrum(a, b, scale=layer.scaling["default"], dtype=dtype)
    others = {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not _FACTOR.search(name)
    }
    return Trained(modules, others), model.unload()


def attached(base: PreTrainedModel, config: LoraConfig, *, seed: int) -> PeftModel:
    """`base` with an untrained adapter."""
    return attach_adapter(
        base,
        config,
        init_method=True,
        seed=seed,
        autocast_adapter_dtype=True,
        batches=list,
        base_directory="",
    )


def with_rank(trained: Trained, base: PreTrainedModel, config: LoraConfig, *, seed: int) -> PeftModel:
    """`base` with the trained adapter, cut to the rank of `config`."""
    model = attached(base, config, seed=seed)
    with torch.no_grad():
        for name, layer in lora_layers(model):
            a, b = factors(layer)
            new_a, new_b = trained.modules[name].cut(a.shape[0], scale=layer.scaling["default"])
            a.data, b.data = new_a.to(a.device), new_b.to(b.device)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not _FACTOR.search(name):
                parameter.data = trained.others[name].to(parameter.device)
    return model.eval()


def lora_layers(model: PeftModel) -> Iterator[tuple[str, LoraLayer]]:
    """Every module with a low-rank update."""
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer) and "default" in module.scaling:
            yield name, module


def factors(layer: LoraLayer) -> tuple[nn.Parameter, nn.Parameter]:
    """A [r, in] and B [out, r]; of an embedding, whose update is (B·A)ᵀ, the same two."""
    if "default" in layer.lora_A:
        a, b = layer.lora_A["default"], layer.lora_B["default"]
        return a.get_parameter("weight"), b.get_parameter("weight")
    return layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]


def ranks_that_keep(values: Mapping[str, Tensor], *, rank: int) -> tuple[dict[str, int], float]:
    """For each module the smallest rank that keeps as much of its update as `rank` keeps of all of them together.

    Shares are of the squared singular values; the second value is the share that `rank` keeps.
    """
    total = sum(float(some.square().sum()) for some in values.values())
    kept = sum(float(some[:rank].square().sum()) for some in values.values()) / max(total, 1e-300)
    ranks = {}
    for name, some in values.items():
        shares = some.square().cumsum(0) / some.square().sum().clamp(min=1e-300)
        ranks[name] = min(len(some), int((shares < kept - 1e-12).sum()) + 1)
    return ranks, kept
