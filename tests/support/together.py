"""What `test_two_processes.py` runs in two processes at once; the first writes what it saw to `seen.json`."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import FullyShardedDataParallelPlugin
from peft import LoraConfig, PeftModel
from torch.distributed.fsdp import StateDictType, fully_shard
from transformers import AutoModelForCausalLM

from lorafit.builders.adapter import attach_adapter
from lorafit.errors import LorafitError
from lorafit.training import train as training
from lorafit.training.gather_adapter import gathered_adapter
from lorafit.training.invariants import Before, remember, verify_result
from lorafit.training.processes import join_processes, refuse_other_distribution
from lorafit.training.save import write_adapter
from lorafit.training.train import run_training, train
from support.forked import Crash, CrashAfter
from support.runs import small_recipe
from support.tiny import byte_tokenizer

PACKED = {"packing": True, "max_length": 96}
VARIANTS: dict[str, dict[str, Any]] = {
    "padded": {"training": {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 3}},
    "packed": {
        "training": {
            "per_device_train_batch_size": 1,
            "per_device_eval_batch_size": 3,
            "packing": True,
            "max_length": 96,
        }
    },
}
"""8 held-out rows in batches of 3 do not divide evenly among two processes, or one."""
SPREAD: dict[str, dict[str, Any]] = {
    "lora": {"r": 3},
    "training": {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True},
}
"""A rank that does not divide among two processes, and a checkpoint that is loaded again."""
SPREAD_QLORA: dict[str, dict[str, Any]] = {
    "lora": {"r": 3},
    "quantization": {"load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"},
    "model": {"dtype": "bfloat16"},
    "training": {"bf16": True, "eval_strategy": "steps", "eval_steps": 1},
}
STEPS = 3


def lora_model(base: Path) -> PeftModel:
    """A tiny base with an adapter whose first dimension, 3, does not divide among two processes."""
    return attach_adapter(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM"),
        init_method=True,
        seed=0,
        autocast_adapter_dtype=True,
        batches=list,
        base_directory=str(base),
    )


def step_by_hand(model: PeftModel, *, process: int, processes: int) -> None:
    """A few optimizer steps on this process's share of one batch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batch = torch.randint(3, 200, (4, 16), generator=torch.Generator().manual_seed(1))
    share = batch.chunk(processes)[process]
    for _ in range(STEPS):
        model(input_ids=share, labels=share).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def train_spread_over(
    directory: Path, base: Path, *, name: str, process: int, sections: dict[str, Any] = SPREAD, **how: Any
) -> None:
    """One run through accelerate's FSDP2, as on GPUs.

    accelerate calls two CPU processes data parallel whatever it is asked for, but nothing in its FSDP2 needs a GPU: so
    its state is told the other kind, and the trainer told to keep that state.
    """
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        cpu_ram_efficient_loading=True,
        state_dict_type="FULL_STATE_DICT",
    )
    precision = "bf16" if sections["training"].get("bf16") else "no"
    if precision != "no":
        plugin.set_mixed_precision(precision)
    state = {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin, "_mixed_precision": precision}
    AcceleratorState._shared_state |= state
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    place = directory / name / str(process)
    place.mkdir(parents=True, exist_ok=True)
    loaded = small_recipe(place, base, output_dir=str(directory / name / "run"), **sections)
    keeps_state = {"accelerator_config": {"use_configured_state": True}}
    section = loaded.recipe.training.model_copy(update={"per_device_train_batch_size": 2, "extra": keeps_state})
    loaded = replace(loaded, recipe=loaded.recipe.model_copy(update={"training": section}))

    def noted(model: PeftModel) -> Before:
        """Before anything is spread: which weights of the base this process holds."""
        real = [name for name, p in model.named_parameters() if not p.requires_grad and not p.is_meta]
        (place / "read.json").write_text(json.dumps(real), encoding="utf-8")
        return remember(model)

    with patch.object(training, "remember", noted):
        trained = run_training(loaded, cache_dir=directory / "cache", **how)
    assert not any(parameter.is_meta for parameter in trained.model.parameters())


def refusal(check: object) -> str:
    """What a check refuses with."""
    try:
        check()  # type: ignore[operator]
    except LorafitError as error:
        return f"{error.exit_code}: {error}"
    return "nothing"


def main(directory: Path, base: Path) -> None:
    state = PartialState(cpu=True)
    process = state.process_index
    seen: dict[str, object] = {}
    for name, sections in VARIANTS.items():
        place = directory / name / str(process)
        place.mkdir(parents=True)
        loaded = small_recipe(place, base, output_dir=str(directory / name / "run"), **sections)
        train(loaded, cache_dir=directory / "cache")
        state.wait_for_everyone()

    sharded = lora_model(base)
    before = remember(sharded)
    layers: Any = sharded.get_base_model().get_submodule("model.layers")
    for layer in layers:
        fully_shard(layer)
    fully_shard(sharded)
    step_by_hand(sharded, process=process, processes=2)
    gathered = gathered_adapter(sharded)
    planned: dict[str, Any] = {"steps_done": STEPS, "steps_planned": STEPS, "stopped_early": False, "updates": STEPS}
    verify_result(sharded, before=before, gathered=gathered, **planned)
    if state.is_main_process:
        target = directory / "sharded"
        write_adapter(
            sharded, byte_tokenizer(), target=target, base_name=None, state_dict=gathered, initial=None, card=""
        )
    trained: list[tuple[str, Any]] = [(name, p) for name, p in sharded.named_parameters() if p.requires_grad]
    own_part = {name: p.to_local() for name, p in trained}
    if state.is_main_process:
        gathered = own_part
    seen["own part"] = refusal(lambda: verify_result(sharded, before=before, gathered=gathered, **planned))

    asks_three = small_recipe(place, base, launch={"num_processes": 3})
    seen["asked three"] = refusal(lambda: join_processes(asks_three, device="cpu", gpus=0))
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    accelerator = Accelerator(cpu=True, fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2))
    asked_by: dict[str, dict[str, Any]] = {"file": {}, "recipe": {"launch": {"strategy": "fsdp2"}}}
    for name, sections in asked_by.items():
        asks_fsdp = small_recipe(place, base, **sections)
        seen[f"asked fsdp2 by {name}"] = refusal(
            lambda asked=asks_fsdp: refuse_other_distribution(asked, accelerator, mixed_precision="no")
        )
    train_spread_over(directory, base, name="fsdp2", process=process)
    with contextlib.suppress(Crash):
        train_spread_over(directory, base, name="fsdp2 resumed", process=process, watchers=[CrashAfter(STEPS - 1)])
    state.wait_for_everyone()
    train_spread_over(directory, base, name="fsdp2 resumed", process=process, begin="resume")
    train_spread_over(directory, base, name="fsdp2 qlora", process=process, sections=SPREAD_QLORA)
    AcceleratorState._shared_state["_mixed_precision"] = "no"
    Accelerator(cpu=True).state.fsdp_plugin.state_dict_type = StateDictType.SHARDED_STATE_DICT
    seen["checkpoints in parts"] = refusal(
        lambda: refuse_other_distribution(small_recipe(place, base), Accelerator(cpu=True), mixed_precision="no")
    )
    Accelerator(cpu=True).state.fsdp_plugin.state_dict_type = StateDictType.FULL_STATE_DICT
    for name, lora in {"pissa": {"init_lora_weights": "pissa"}, "head": {"modules_to_save": ["lm_head"]}}.items():
        unfit = small_recipe(place, base, lora=lora)
        seen[f"{name} by hand"] = refusal(
            lambda unfit=unfit: refuse_other_distribution(unfit, Accelerator(cpu=True), mixed_precision="no")
        )
    if state.is_main_process:
        (directory / "seen.json").write_text(json.dumps(seen), encoding="utf-8")
    state.wait_for_everyone()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
