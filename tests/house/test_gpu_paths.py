"""What happens on a GPU alone, as far as a CPU can show it: only the device's answers are put in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.utils import logging as transformers_logging
from transformers.utils.import_utils import enable_tf32
from trl import SFTConfig

import lorafit.packages
from lorafit.builders.base_model import load_base_model
from lorafit.errors import MachineError
from lorafit.evaluation import memory
from lorafit.preflight import Machine, refuse_what_this_machine_lacks
from lorafit.recipe.sections import ModelSection, QuantizationSection
from lorafit.speed import varlen_attention
from lorafit.tasks.causal_lm_trainer import CausalLm
from lorafit.training import invariants, out_of_memory, smoke, task_trainer
from lorafit.training.arguments import training_arguments
from lorafit.training.selftest_bench import tolerances
from lorafit.training.selftest_only import self_test_only
from lorafit.training.task_trainer import adapts_separate_experts
from lorafit.training.train import run_training
from support.runs import cache_of, small_recipe


def test_several_gpus_in_sight_of_one_process_are_not_taken_for_data_parallel(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    post_init = SFTConfig.__post_init__

    def sees_two(arguments: SFTConfig) -> None:
        post_init(arguments)
        arguments._n_gpu = 2

    monkeypatch.setattr(SFTConfig, "__post_init__", sees_two)
    arguments = training_arguments(
        small_recipe(tmp_path, tiny_base).recipe,
        output_dir=tmp_path,
        run_name="run",
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        has_eval_rows=False,
    )
    assert arguments.n_gpu == 1


@pytest.fixture
def with_tf32(monkeypatch: pytest.MonkeyPatch) -> Any:
    backends: Any = torch.backends  # whose module is replaced by an object
    before = backends.fp32_precision
    enable_tf32(True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    yield
    backends.fp32_precision = before


def test_tf32_widens_the_tolerances_of_the_self_test(with_tf32: None, tmp_path: Path, tiny_base: Path) -> None:
    recipe = small_recipe(tmp_path, tiny_base).recipe
    assert tolerances(recipe, dtype=torch.float32, bf16=False) == tolerances(recipe, dtype=torch.float16, bf16=False)


@pytest.mark.parametrize("verbosity", [transformers_logging.WARNING, transformers_logging.ERROR])
def test_a_lack_of_memory_while_weights_are_quantised_is_not_called_damage(
    verbosity: int, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = transformers_logging.get_verbosity()

    def lacks_memory(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(Bnb4bitQuantize, "convert", lacks_memory)
    section = ModelSection(model_name_or_path=str(tiny_base))
    transformers_logging.set_verbosity(verbosity)  # the command line keeps it quiet
    try:
        with pytest.raises(MachineError, match="does not fit") as caught:
            load_base_model(section, QuantizationSection(load_in_4bit=True), dtype="auto", device_map=None)
    finally:
        transformers_logging.set_verbosity(before)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(("training", "expected"), [({}, None), ({"fp16": True}, torch.float16)])
def test_the_reloaded_adapter_is_computed_in_the_type_of_the_run(
    training: dict[str, Any], expected: torch.dtype | None, tmp_path: Path, tiny_base: Path
) -> None:
    recipe = small_recipe(tmp_path, tiny_base, training=training).recipe
    assert smoke.autocast_type(recipe, bf16=False) == expected
    assert smoke.autocast_type(recipe, bf16=True) == torch.bfloat16


def test_a_loss_scale_that_overflows_is_lowered_by_the_self_test(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, scales = CausalLm.create_accelerator_and_postprocess, []

    class Scaler(torch.amp.GradScaler):
        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            scales.append(state_dict["scale"])
            super().load_state_dict(state_dict)

    def with_scaler(trainer: CausalLm) -> None:
        make(trainer)
        trainer.accelerator.scaler = Scaler("cpu", init_scale=2.0**127)

    monkeypatch.setattr(CausalLm, "create_accelerator_and_postprocess", with_scaler)
    tested = self_test_only(small_recipe(tmp_path, tiny_base), cache_dir=None)
    assert all(check.has_passed for check in tested.checks)
    assert scales == [2.0**8, 2.0**8]


class OnGpu(nn.Module):
    """A model of a megabyte, on a GPU by its own account."""

    config: Any

    def parameters(self, recurse: bool = True) -> Any:
        parameter = torch.zeros(2**18)

        class Parameter:
            is_cuda = True
            numel, element_size = parameter.numel, parameter.element_size

        return iter([Parameter()])


def test_an_evaluation_uses_the_memory_that_the_gpu_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (100 * 2**30, 140 * 2**30))
    assert memory._budget(OnGpu()) == 40 * 2**30  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**20, 140 * 2**30))
    assert memory._budget(OnGpu()) == memory.AT_LEAST  # type: ignore[arg-type]


def test_the_peak_is_that_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: asked.append("reset"))
    out_of_memory.forget_peak()
    assert asked == ["reset"]


def test_bytes_of_4_bit_weights_are_hashed_in_a_signed_type() -> None:
    assert not any(kind.is_floating_point or kind == torch.uint8 for kind in invariants._INTEGER_OF_SIZE.values())
    packed = torch.randint(0, 256, (1001,), dtype=torch.uint8)
    changed = packed.clone()
    changed[500] ^= 1
    assert invariants._hash(nn.Parameter(packed, requires_grad=False)) != invariants._hash(
        nn.Parameter(changed, requires_grad=False)
    )


def test_varlen_attention_gets_the_type_of_the_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []

    def operator(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        seen.extend([query.dtype, key.dtype, value.dtype])
        return query

    monkeypatch.setattr(varlen_attention, "varlen_attn", operator)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16)
    query, value = torch.zeros(1, 2, 5, 4), torch.zeros(1, 1, 5, 4, dtype=torch.bfloat16)
    bounds = torch.tensor([0, 5], dtype=torch.int32)
    out = varlen_attention._flash(query, query[:, :1], value, bounds, 5, None, None)
    assert seen == [torch.bfloat16] * 3
    assert out.shape == (1, 5, 2, 4)


@pytest.mark.parametrize(
    ("packages", "environment", "found", "expected"),
    [
        ({"triton"}, {}, {"gcc"}, None),
        ({"triton"}, {}, {"clang"}, None),
        ({"triton"}, {"CC": "icx"}, {"icx"}, None),
        ({"triton"}, {"CC": "icx"}, {"gcc"}, "no C compiler (icx)"),
        ({"triton"}, {}, set(), "no C compiler (gcc or clang)"),
        (set(), {}, set(), None),
    ],
)
def test_a_missing_compiler_is_named_before_a_gpu_trains(
    packages: set[str],
    environment: dict[str, str],
    found: set[str],
    expected: str | None,
    tmp_path: Path,
    tiny_base: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CC", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(lorafit.packages, "has_package", lambda name: name in packages)
    monkeypatch.setattr(lorafit.packages.shutil, "which", lambda name: name if name in found else None)
    monkeypatch.setattr(lorafit.packages.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    gpu = Machine(device="cuda", name="H9", gpus=1, has_bf16=True, memory_bytes=2**36)
    if expected is None:
        refuse_what_this_machine_lacks(small_recipe(tmp_path, tiny_base), gpu)
        return
    with pytest.raises(MachineError) as caught:
        refuse_what_this_machine_lacks(small_recipe(tmp_path, tiny_base), gpu)
    assert expected in str(caught.value) and "apt install gcc python3-dev" in str(caught.value)
    refuse_what_this_machine_lacks(small_recipe(tmp_path, tiny_base), replace(gpu, device="cpu", gpus=0))


class Experts(nn.Module):
    """Of a mixture, one module each, as code outside transformers has them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 2)
        self.block_sparse_experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])


@pytest.mark.parametrize(("targets", "expected"), [(["0", "1"], True), (["gate"], False)])
def test_data_parallel_training_looks_for_experts_without_tokens_where_those_carry_adapters(
    targets: list[str], expected: bool
) -> None:
    assert adapts_separate_experts(get_peft_model(Experts(), LoraConfig(target_modules=targets))) is expected


@pytest.mark.parametrize("is_routed", [True, False])
def test_only_a_run_with_such_experts_pays_for_looking(
    is_routed: bool, tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool | None] = []

    class Watcher(TrainerCallback):
        def on_train_begin(self, args: TrainingArguments, *_: Any, **__: Any) -> None:
            seen.append(args.ddp_find_unused_parameters)

    if is_routed:
        monkeypatch.setattr(task_trainer, "adapts_separate_experts", lambda model: True)
    run_training(small_recipe(tmp_path, tiny_base), cache_dir=cache_of(tmp_path), watchers=[Watcher()])
    assert seen == [is_routed]
