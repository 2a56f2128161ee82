"""What a planning process replaces in the libraries so that a step on fake CPU tensors takes what CUDA takes.

Only ever entered in a process that plans: nothing here is undone.
"""

from __future__ import annotations

import math
from typing import Any

import bitsandbytes  # noqa: F401 - registers its operations
import torch
import transformers.masking_utils as masking
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from trl.kernels import chunked_logprob
from trl.trainer import utils as trl_utils

from lorafit.planning.storage_tracker import Temporary
from lorafit.speed import varlen_attention

aten = torch.ops.aten


def stand_in_for_cuda() -> None:
    """TRL's head as its CUDA path runs it: Triton kernels work in place on the tile, cuBLAS adds into float32."""
    trl_utils._use_triton = lambda device: True  # only the trained positions are scored
    chunked_logprob._forward_tile = chunked_logprob._backward_tile = lambda *_, **__: None  # type: ignore[assignment]
    chunked_logprob._addmm_fp32 = torch.ops.lorafit.addmm_float32
    AttentionInterface.register(varlen_attention.NAME, _packed_attention)


def _packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    max_length_q: int | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **named: Any,
) -> tuple[torch.Tensor, None]:
    """Varlen attention's tensors, which flash attention over documents of `max_length_q` keeps, too."""
    if max_length_q is None or attention_mask is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **named
        )
    # [1, heads, T, d] -> [documents, heads, max_length_q, d]
    queries, keys, values = (
        states[0].unflatten(1, (-1, max_length_q)).transpose(0, 1) for states in (query, key, value)
    )
    out = torch.nn.functional.scaled_dot_product_attention(
        queries, keys, values, is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out.transpose(1, 2).flatten(0, 1)[None], None


@torch.library.custom_op("lorafit::addmm_float32", mutates_args=("total",))
def addmm_float32(total: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> None:
    """`total += one @ other` as cuBLAS does it, without a float32 copy of either; only ever run on fakes."""
    raise NotImplementedError


@addmm_float32.register_fake
def _(total: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> None:
    """Takes no memory."""


def stand_in_for_values() -> None:
    """Fake tensors have no values; where a library looks at them, what is true of the batch that is planned."""
    FakeTensor.data_ptr = lambda self: id(self)  # type: ignore[method-assign]  # the trainer tells embeddings apart by it


def set_rows(*, packed: bool, padded: bool) -> None:
    """What transformers finds when it looks at a batch: packed documents and padding need a mask, full rows do not."""
    if not packed:
        masking.is_tracing = lambda tensor=None: False
        masking.fast_all = lambda mask: not padded  # type: ignore[assignment, return-value]  # told apart by its truth


class Answers(TorchDispatchMode):
    """Operations whose result depends on values: every mask holds everywhere, every number is 1."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default:
            return 1
        if func is aten.index.Tensor:
            source, (index, *others) = args[0], args[1]
            if not others and index is not None and index.dtype == torch.bool:
                return source.new_empty((index.numel(), *source.shape[index.ndim :]))
        return func(*args, **(kwargs or {}))


_IN_FLOAT32 = frozenset(
    {
        *(torch.nn.functional.layer_norm, torch.layer_norm, torch.native_layer_norm),
        *(torch.nn.functional.rms_norm, torch.rms_norm, torch.nn.functional.group_norm, torch.nn.functional.softplus),
        *(torch.exp, torch.Tensor.exp, torch.log, torch.Tensor.log, torch.rsqrt, torch.Tensor.rsqrt),
        *(torch.pow, torch.Tensor.pow, torch.Tensor.__pow__, torch.reciprocal, torch.Tensor.reciprocal),
        *(torch.softmax, torch.Tensor.softmax, torch.nn.functional.softmax, torch.nn.functional.log_softmax),
        *(torch.sum, torch.Tensor.sum, torch.cumsum, torch.Tensor.cumsum, torch.prod, torch.Tensor.prod),
        *(torch.logsumexp, torch.Tensor.logsumexp, torch.norm, torch.Tensor.norm, torch.linalg.vector_norm),
    }
)
"""What autocast computes in float32 on CUDA and leaves as it is on CPU (ATen/autocast_mode.h, AT_FORALL_FP32)."""


class CudaAutocast(TorchFunctionMode):
    """Autocast's float32 list of CUDA, for CPU tensors under CPU autocast."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _IN_FLOAT32 and torch.is_autocast_enabled("cpu") and kwargs.get("dtype") is None:
            args = tuple(_widened(value) for value in args)
            kwargs = {key: _widened(value) for key, value in kwargs.items()}
        return func(*args, **kwargs)


def _widened(value: Any) -> Any:
    is_half = isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if is_half else value


def kernel_temporaries() -> dict[Any, Temporary]:
    """What CUDA kernels take for themselves while they run, by the operation that stands for them here."""
    return {
        aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _attention_backward,
        torch.ops.bitsandbytes.gemm_4bit.default: _gemm_4bit,
    }


def _attention_backward(grad_out: Any, query: Any, key: Any, *_: Any, **__: Any) -> int:
    """A float32 sum for dQ; with grouped queries dK and dV of all query heads, before they are added up."""
    groups = 2 * query.numel() * query.element_size() if key.shape[1] != query.shape[1] else 0
    return query.numel() * 4 + groups


def _gemm_4bit(inputs: Any, weight: Any, shape: Any, *_: Any, **__: Any) -> int:
    """The weight unpacked, as bitsandbytes does for many rows; for few rows it depends on the GPU (at most this)."""
    if inputs.numel() // inputs.shape[-1] <= 8:
        return 0
    numbers = math.prod(shape)
    return numbers * inputs.element_size() + numbers // 64 * 8  # and its scales, twice, in float32
