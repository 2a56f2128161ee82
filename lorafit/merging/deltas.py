"""What an adapter does to one weight of its base, on blocks of that weight's rows.

Each change is made in float32 and in the order of operations of peft's own `merge`, so that the result is its, bit for
bit.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, is_dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LowRank:
    """The update left · right · scale / divisor of a [rows, columns] weight, as it lies in memory."""

    left: Tensor
    """[rows, r] float32: B; of a weight that is stored transposed (Conv1D, embeddings) Aᵀ."""
    right: Tensor
    """[r, columns] float32: A, or Bᵀ."""
    scale: float
    """lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora (arXiv 2312.03732)."""
    divisor: float = 1.0
    """AdaLoRA's ranks of a module; a division of its own, because peft rounds after it."""

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight."""
        return self.left.shape[0], self.right.shape[1]

    def add_to(self, block: Tensor, *, first: int, scratch: Tensor) -> None:
        """Add the update of rows `first`, `first + 1`, ... to `block`; `scratch` is another tensor of its shape."""
        torch.mm(self.left[first : first + block.shape[0]], self.right, out=scratch)
        if self.scale != 1.0:
            scratch.mul_(self.scale)
        if self.divisor != 1.0:
            scratch.div_(self.divisor)
        block.add_(scratch)


@dataclass(frozen=True, eq=False)
class AddLowRank:
    """LoRA, rsLoRA, AdaLoRA: W + ΔW; one factor, or one for each expert of a three-dimensional weight."""

    factors: tuple[LowRank, ...]

    def apply(self, block: Tensor, *, expert: int | None, first: int, scratch: Tensor) -> None:
        """Change rows `first`, `first + 1`, ... of the weight, held in `block`."""
        self.factors[expert or 0].add_to(block, first=first, scratch=scratch)


@dataclass(frozen=True, eq=False)
class ScaleRows:
    """DoRA (arXiv 2402.09353): m / ‖W + ΔW‖ · (W + ΔW), the norm taken over each row of the weight."""

    low_rank: LowRank
    magnitude: Tensor
    """[rows] float32."""

    def apply(self, block: Tensor, *, expert: int | None, first: int, scratch: Tensor) -> None:
        """Change rows `first`, `first + 1`, ... of the weight, held in `block`."""
        self.low_rank.add_to(block, first=first, scratch=scratch)
        norm = torch.linalg.norm(block, dim=1)
        block.mul_((self.magnitude[first : first + block.shape[0]] / norm).view(-1, 1))


@dataclass(frozen=True, eq=False)
class ScaleColumns:
    """DoRA of a weight that is stored transposed: the norm is taken over each column, in a first pass over all rows."""

    low_rank: LowRank
    magnitude: Tensor
    """[columns] float32."""
    squares: Tensor
    """[columns] float64: sums of squares of W + ΔW, filled by `observe`."""

    def observe(self, block: Tensor, *, first: int, scratch: Tensor) -> None:
        """Take up rows `first`, `first + 1`, ... of the weight, held in `block`."""
        self.low_rank.add_to(block, first=first, scratch=scratch)
        self.squares.add_(block.square().sum(dim=0, dtype=torch.float64))

    def apply(self, block: Tensor, *, expert: int | None, first: int, scratch: Tensor) -> None:
        """Change rows `first`, `first + 1`, ... of the weight, held in `block`; all of them were observed before."""
        self.low_rank.add_to(block, first=first, scratch=scratch)
        block.mul_((self.magnitude / self.squares.sqrt().float()).view(1, -1))


@dataclass(frozen=True, eq=False)
class AddBias:
    """lora_bias: b + b_B · scale."""

    bias: Tensor
    """[rows] float32."""
    scale: float

    def apply(self, block: Tensor, *, expert: int | None, first: int, scratch: Tensor) -> None:
        """Change entries `first`, `first + 1`, ... of the bias, held in `block` as one column."""
        block.add_((self.bias[first : first + block.shape[0]] * self.scale).view(-1, 1))


@dataclass(frozen=True, eq=False)
class ReplaceRows:
    """Trained tokens: some rows of an embedding, as they are after training."""

    rows: Tensor
    """[n] row numbers, ascending, int64."""
    values: Tensor
    """[n, columns]."""

    def apply(self, block: Tensor, *, expert: int | None, first: int, scratch: Tensor) -> None:
        """Change rows `first`, `first + 1`, ... of the weight, held in `block`."""
        inside = (self.rows >= first) & (self.rows < first + block.shape[0])
        block[self.rows[inside] - first] = self.values[inside].float()


Change = AddLowRank | ScaleRows | ScaleColumns | AddBias | ReplaceRows


def is_same(one: object, other: object) -> bool:
    """Whether two changes, or two values in them, are equal."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(is_same, one, other))
    if is_dataclass(one) and type(one) is type(other):
        return all(is_same(getattr(one, field.name), getattr(other, field.name)) for field in fields(one))
    return one == other


def experts_of(
    weight_a: Tensor, weight_b: Tensor, *, count: int, scale: float, is_transposed: bool
) -> Iterable[LowRank]:
    """The factors of each expert, from the two matrices that peft stores for all of them.

    A is [count · r, in] with the ranks of an expert together; B is [out, r · count] with the experts of a rank together
    (peft's `ParamWrapper`). Weights lie as [out, in], or as [in, out] if `is_transposed` (gpt-oss).
    """
    a = weight_a.reshape(count, -1, weight_a.shape[-1])
    b = weight_b.reshape(weight_b.shape[0], -1, count)
    for expert in range(count):
        if is_transposed:
            yield LowRank(a[expert].T, b[:, :, expert].T, scale)
        else:
            yield LowRank(b[:, :, expert], a[expert], scale)
