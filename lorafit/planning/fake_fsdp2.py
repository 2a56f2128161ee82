"""FSDP2 over GPUs that are not there: the library's own sharding on a process group that only pretends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import bitsandbytes.nn.modules
import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.testing._internal.distributed.fake_pg import FakeStore

from lorafit.planning.empty_base import quantization_state
from lorafit.planning.storage_tracker import StorageTracker
from lorafit.training.trainer.peft_steps import sum_in_float32

_STATE_OF_WEIGHTS = "fix_4bit_weight_quant_state_from_module"


def spread_over(gpus: int, model: nn.Module, *, bf16: bool, mode: AbstractContextManager[Any]) -> None:
    """Shard `model` as accelerate does for `configs/fsdp2.yaml`: each layer, embedding and head by itself.

    Of weights in 4 bits what is packed is sharded; every GPU has all of their scales.
    """
    if not dist.is_initialized():
        dist.init_process_group("fake", rank=0, world_size=gpus, store=FakeStore())
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,  # how weights get there changes nothing in a step
    )
    if bf16:
        plugin.set_mixed_precision("bf16")
        sum_in_float32(plugin)
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        torch_device_mesh={("gpus",): init_device_mesh("cpu", (gpus,))},
        parallelism_config=SimpleNamespace(fsdp_dim_names=("gpus",)),
        # What is trained it makes float32, but on a base in 4 bits, which it knows by a class that fakes do not have.
        mixed_precision="bf16" if bf16 and not any(map(quantization_state, model.modules())) else "no",
        is_main_process=False,
        device=torch.device("cpu"),
    )
    # accelerate asks for it without a use, and bitsandbytes would have to read numbers.
    with mode, patch.object(model, "state_dict", dict):
        fsdp2_prepare_model(accelerator, model)


def _find_state(module: Any) -> None:
    """Gathered 4-bit weights are plain parameters again; bitsandbytes makes them its own, which fakes cannot become."""
    module.weight.quant_state = module.quant_state


@contextmanager
def watch_spreading(tracker: StorageTracker) -> Iterator[None]:
    """Let the tracker see gathered weights come and go by `resize_`, and not see how DTensor guesses shapes."""
    resize = torch.UntypedStorage.resize_

    def watched(storage: torch.UntypedStorage, size: int) -> Any:
        result = resize(storage, size)
        tracker.resized(storage)
        return result

    with ExitStack() as stack:
        stack.enter_context(patch.object(torch.UntypedStorage, "resize_", watched))
        stack.enter_context(patch.object(ShardingPropagator, "_fake_mode_lock", _Paused(tracker)))
        stack.enter_context(patch.object(bitsandbytes.nn.modules, _STATE_OF_WEIGHTS, _find_state))
        for name in ("foreach_all_gather", "foreach_all_gather_copy_out"):
            gather = _gathering(getattr(_fsdp_param_group, name), tracker)
            stack.enter_context(patch.object(_fsdp_param_group, name, gather))
        yield


def _gathering(function: Any, tracker: StorageTracker) -> Any:
    """`function`, whatever it allocates being the GPUs' common weights."""

    def gathering(*given: Any, **named: Any) -> Any:
        with tracker.allocating("communication buffers"):
            return function(*given, **named)

    return gathering


class _Paused:
    """Stands where DTensor's propagation takes a lock."""

    def __init__(self, tracker: StorageTracker) -> None:
        self._tracker = tracker

    def __enter__(self) -> None:
        self._tracker.paused += 1

    def __exit__(self, *_: object) -> None:
        self._tracker.paused -= 1


def local(tensor: Any) -> Any:
    """This GPU's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
