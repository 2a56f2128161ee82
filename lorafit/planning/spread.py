"""FSDP2 over GPUs that are not there: the library's own sharding on a process group that only pretends."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.testing._internal.distributed.fake_pg import FakeStore

from lorafit.planning.storage_tracker import StorageTracker


def spread_over(gpus: int, model: nn.Module, *, bf16: bool, mode: FakeTensorMode) -> None:
    """Shard `model` as accelerate does for `configs/fsdp2.yaml`: each layer, embedding and head by itself."""
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
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        torch_device_mesh={("gpus",): init_device_mesh("cpu", (gpus,))},
        parallelism_config=SimpleNamespace(fsdp_dim_names=("gpus",)),
        mixed_precision="bf16" if bf16 else "no",
        is_main_process=False,
        device=torch.device("cpu"),
    )
    with mode:
        fsdp2_prepare_model(accelerator, model)


def watch_spreading(tracker: StorageTracker) -> None:
    """Let the tracker see gathered weights come and go by `resize_`, and not see how DTensor guesses shapes."""
    resize = torch.UntypedStorage.resize_

    def watched(storage: torch.UntypedStorage, size: int) -> Any:
        result = resize(storage, size)
        tracker.resized(storage)
        return result

    torch.UntypedStorage.resize_ = watched  # type: ignore[method-assign,assignment]
    ShardingPropagator._fake_mode_lock = _Paused(tracker)  # type: ignore[assignment]


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
