"""How much two adapters say the same, or the opposite, in each module; and what a combination makes of their sum."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor


@dataclass(frozen=True)
class Overlap:
    """Of the weighted updates of one module."""

    module: str
    adapters: int
    """How many of the inputs change it."""
    cosine: float | None
    """Cosine of two updates as vectors, mean over pairs: 1 the same direction, 0 unrelated, -1 opposite. None where one
    input alone changes the module."""
    sign_conflict: float | None
    """Share of entries that two updates push opposite ways, mean over pairs; 0.5 for unrelated ones."""
    off_the_sum: float
    """‖ΔW - Σ wᵢ ΔWᵢ‖ / ‖Σ wᵢ ΔWᵢ‖ of the combination: what the method leaves out or adds; 0 is the exact sum."""


def overlaps(model: PeftModel, weights: Mapping[str, float], *, combined: str) -> Iterator[Overlap]:
    """One for every module with an adapter; holds the updates of one module at a time."""
    for name, module in model.get_base_model().named_modules():
        if not isinstance(module, LoraLayer) or combined not in module.scaling:
            continue
        updates = [
            weight * _update(module, adapter) for adapter, weight in weights.items() if adapter in module.scaling
        ]
        pairs = list(combinations(updates, 2))
        total = sum(updates[1:], start=updates[0])
        off = _update(module, combined) - total
        yield Overlap(
            module=name,
            adapters=len(updates),
            cosine=_mean([_cosine(one, other) for one, other in pairs]),
            sign_conflict=_mean([_conflict(one, other) for one, other in pairs]),
            off_the_sum=float(off.norm() / total.norm().clamp_min(1e-30)),
        )


def _update(layer: LoraLayer, adapter: str) -> Tensor:
    return layer.get_delta_weight(adapter).float()  # type: ignore[attr-defined]  # each kind of layer has its own


def _cosine(one: Tensor, other: Tensor) -> float:
    return float((one * other).sum() / (one.norm() * other.norm()).clamp_min(1e-30))


def _conflict(one: Tensor, other: Tensor) -> float:
    return float((one * other < 0).double().mean())


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
