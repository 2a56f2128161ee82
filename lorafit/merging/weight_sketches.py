"""Small numbers by which the weights of two models are compared though they never lie in memory together.

A sketch of a matrix W is W · X with four columns of random signs. ‖W · X‖² / 4 is on average ‖W‖², whatever W is, and
sketches subtract as matrices do: so the distance of two matrices is known from their sketches (arXiv 1411.4357, 2.1),
and equal bits have equal sketches.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

SIGNS = 4
BLOCK = 2**22
"""Weights that are widened at a time: 32 MiB in float64."""

EPSILON = torch.finfo(torch.float32).eps
ROUNDINGS = 8
"""Of a weight in float32 on its way from base to merged model: product, scale, sum, DoRA's norm and quotient."""


def sketches(model: nn.Module) -> dict[str, Tensor]:
    """Parameter name to sketch, [rows, 4] float64, of every floating tensor of the model."""
    return {name: sketch(tensor) for name, tensor in floating_tensors(model)}


def floating_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a saved model holds of numbers."""
    return ((name, tensor) for name, tensor in model.state_dict().items() if tensor.is_floating_point())


def sketch(tensor: Tensor) -> Tensor:
    """[rows, 4] float64; a vector is a matrix of one column."""
    matrix = _as_matrix(tensor)
    generator = torch.Generator().manual_seed(matrix.shape[1])
    signs = torch.randint(0, 2, (matrix.shape[1], SIGNS), generator=generator).mul_(2).sub_(1).double()
    signs = signs.to(tensor.device)
    parts = [block.double() @ signs for block in _blocks(matrix)]
    return torch.cat(parts).cpu() if parts else torch.zeros(0, SIGNS, dtype=torch.float64)


def distance(one: Tensor, other: Tensor) -> float:
    """Frobenius norm of the difference of the two matrices that these are sketches of."""
    return float((one - other).norm() / SIGNS**0.5)


def round_once(tensor: Tensor, *, dtype: torch.dtype, update: float, rank: int) -> float:
    """Round a float32 weight in place to the values of `dtype`.

    Gives the norm of what another order of the same sums may change: in float32 two right merges differ by η a weight
    (8 roundings of the weight, `rank` of its update, whose norm is `update`), and those that lie within η of the middle
    between two values of `dtype` may be rounded to either. 0 where nothing was added.
    """
    matrix = _as_matrix(tensor)
    rms = update / max(1, tensor.numel()) ** 0.5
    square = 0.0
    for block in _blocks(matrix):
        if update:
            eta = block.abs().mul_(ROUNDINGS).add_(rank * rms).mul_(EPSILON)
            above, below = (block + eta).to(dtype).float(), (block - eta).to(dtype).float()
            square += float(above.sub_(below).double().square_().sum())
        block.copy_(block.to(dtype))
    return square**0.5


def _as_matrix(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1, tensor.shape[-1] if tensor.dim() > 1 else 1)


def _blocks(matrix: Tensor) -> Iterator[Tensor]:
    rows = max(1, BLOCK // max(1, matrix.shape[1]))
    return (matrix[first : first + rows] for first in range(0, matrix.shape[0], rows))
