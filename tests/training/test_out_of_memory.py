"""Memory that runs out is told in one line, or met with smaller forward passes that come to the same."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import SFTTrainer

from lorafit.errors import MachineError, ModelError
from lorafit.lines import heard
from lorafit.recipe import LoadedRecipe
from lorafit.training.out_of_memory import bytes_asked, is_out_of_memory, out_of_memory_is_said
from lorafit.training.start_point import Begin
from lorafit.training.train import TrainResult, run_training
from support.out_of_memory import CUDA, PACKED, Fails, Memory
from support.runs import cache_of, small_recipe
from support.tiny import write_jsonl

CPU = "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
HALVE = {"on_oom": "halve_batch"}
Patch = Callable[..., Memory]


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Patch:
    """Let a training step run out of memory: `memory(fails)`."""

    def patch(fails: Fails, *, after_backward: bool = True) -> Memory:
        memory = Memory(fails, after_backward=after_backward)
        monkeypatch.setattr(SFTTrainer, "training_step", lambda *rest, **named: memory.step(*rest, **named))
        return memory

    return patch


def never(trainer: SFTTrainer, rows: int) -> bool:
    return False


def trained(loaded: LoadedRecipe, **keys: Any) -> tuple[TrainResult, list[str]]:
    said: list[str] = []
    with heard(said.append):
        done = run_training(loaded, cache_dir=cache_of(loaded.path.parent), **keys)
    return done.result, [line for line in said if line.startswith("memory: ")]


def recipe_in(place: Path, base: Path, **sections: Any) -> LoadedRecipe:
    place.mkdir(exist_ok=True)
    return small_recipe(place, base, **sections)


def adapter(place: Path) -> dict[str, torch.Tensor]:
    return load_file(place / "run" / "adapter" / "adapter_model.safetensors")


def lines(place: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (place / "run" / name).read_text("utf-8").splitlines()]


def losses_and_tokens(place: Path) -> torch.Tensor:
    """[steps, 2], as logged."""
    steps = [entry for entry in lines(place, "metrics.jsonl") if "loss" in entry]
    assert len(steps) == 3
    return torch.tensor([[entry["loss"], entry["tokens"]] for entry in steps])


VARIANTS: dict[str, dict[str, Any]] = {
    "padded": {"lora": {"r": 4, "lora_dropout": 0.3}, "training": {"neftune_noise_alpha": 5.0}},
    "adalora": {"lora": None, "adalora": {"target_r": 2, "init_r": 4, "tinit": 0, "tfinal": 1}},
    "a last batch of 3": {"data": {"train": [{"path": "train.jsonl", "limit": 11}]}},
}


@pytest.mark.parametrize(
    ("variant", "after_backward"),
    [("padded", False), ("padded", True), ("adalora", True), ("a last batch of 3", True)],
)
def test_a_run_that_halves_is_the_run_with_half_the_micro_batch(
    variant: str, after_backward: bool, tmp_path: Path, tiny_base: Path, memory: Patch
) -> None:
    sections = VARIANTS[variant]
    settings = sections.get("training", {}) | {"gradient_accumulation_steps": 2}
    small = settings | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    undisturbed = memory(never)
    trained(recipe_in(tmp_path / "small", tiny_base, **sections | {"training": small}))
    halved = memory(lambda trainer, rows: rows > 2, after_backward=after_backward)
    loaded = recipe_in(tmp_path / "halved", tiny_base, **sections | {"training": settings, "health": HALVE})
    _, said = trained(loaded)
    assert halved.ran_out == 1
    # The same rows in the same passes: none left out, none seen twice, and the same dropout and noise on each.
    assert halved.passes == undisturbed.passes
    for name, tensor in adapter(tmp_path / "small").items():
        torch.testing.assert_close(adapter(tmp_path / "halved")[name], tensor, rtol=0, atol=0, msg=name)
    halved_figures, small_figures = (losses_and_tokens(tmp_path / name) for name in ("halved", "small"))
    torch.testing.assert_close(halved_figures, small_figures, rtol=0, atol=1e-6)
    change = "with per_device_train_batch_size 4 -> 2, gradient_accumulation_steps 2 -> 4: the same batch and result"
    assert len(said) == 1
    assert said[0].startswith("memory: step 1: out of memory, 2.50 GiB was asked for, the peak so far was ")
    assert said[0].endswith(f"; done again, and from here on, {change}")
    (event,) = (event for event in lines(tmp_path / "halved", "events.jsonl") if event["kind"] == "memory")
    assert (event["step"], event["figures"]) == (1, {"parts": 2})
    assert json.loads((tmp_path / "halved/run/manifest.json").read_text("utf-8"))["on_oom"] == change


@pytest.mark.parametrize("failing", [2, 3], ids=lambda number: f"micro-batch {number}")
def test_a_step_that_fails_in_the_middle_is_done_again_whole(
    failing: int, tmp_path: Path, tiny_base: Path, memory: Patch
) -> None:
    settings = {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2}
    memory(never)
    result, _ = trained(recipe_in(tmp_path / "whole", tiny_base, training=settings))
    starts: list[int] = []

    def fails(trainer: SFTTrainer, rows: int) -> bool:
        starts.extend([trainer.state.global_step] * (rows == 2))
        return rows == 2 and starts.count(1) == failing

    halved = memory(fails)
    again, _ = trained(recipe_in(tmp_path / "halved", tiny_base, training=settings, health=HALVE))
    assert halved.ran_out == 1
    assert again.tokens == result.tokens
    for name, tensor in adapter(tmp_path / "whole").items():
        torch.testing.assert_close(adapter(tmp_path / "halved")[name], tensor, rtol=0, atol=1e-5, msg=name)
    halved_figures, whole_figures = (losses_and_tokens(tmp_path / name) for name in ("halved", "whole"))
    torch.testing.assert_close(halved_figures, whole_figures, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2])
def test_packed_rows_are_divided_between_documents(size: int, tmp_path: Path, tiny_base: Path, memory: Patch) -> None:
    settings = PACKED | {"per_device_train_batch_size": size}
    whole = memory(never)
    trained(recipe_in(tmp_path / "whole", tiny_base, training=settings))
    halved = memory(lambda trainer, documents: documents > 1)
    _, said = trained(recipe_in(tmp_path / "halved", tiny_base, training=settings, health=HALVE))
    assert halved.ran_out == size
    assert [row for rows in halved.passes for row in rows] == [row for rows in whole.passes for row in rows]
    for name, tensor in adapter(tmp_path / "whole").items():
        torch.testing.assert_close(adapter(tmp_path / "halved")[name], tensor, rtol=0, atol=1e-5, msg=name)
    assert said[-1].endswith(
        f"with each packed micro-batch in {2 * size} parts of whole documents: the same batch and result"
    )


@pytest.mark.parametrize("settings", [{}, PACKED | {"per_device_train_batch_size": 1}], ids=["row", "document"])
def test_one_row_that_does_not_fit_stops(
    settings: dict[str, Any], tmp_path: Path, tiny_base: Path, memory: Patch
) -> None:
    full = memory(lambda trainer, rows: True)
    with pytest.raises(MachineError) as caught:
        trained(small_recipe(tmp_path, tiny_base, training=settings, health=HALVE))
    assert full.passes == []
    assert full.ran_out == 2 + (not settings)
    (problem,) = caught.value.problems
    assert caught.value.exit_code == 4
    assert problem.where.endswith(": training.per_device_train_batch_size")
    assert "halve_batch" not in problem.message
    assert not (tmp_path / "run" / "adapter").exists()
    assert json.loads((tmp_path / "run/manifest.json").read_text("utf-8"))["outcome"].startswith("stopped: ")


def test_without_halving_the_line_says_what_would_fit(tmp_path: Path, tiny_base: Path, memory: Patch) -> None:
    memory(lambda trainer, rows: trainer.state.global_step == 1)
    with pytest.raises(MachineError) as caught:
        trained(small_recipe(tmp_path, tiny_base))
    (problem,) = caught.value.problems
    assert problem.where.endswith("recipe.yaml:18: training.per_device_train_batch_size")
    told, _, mends = problem.message.partition("; make room with ")
    assert told.startswith("out of memory while training: 2.50 GiB was asked for, the peak so far was ")
    assert mends.split("; or ") == [
        "training.gradient_checkpointing: true (about 1.45 times the computation)",
        "training.per_device_train_batch_size: 2 with training.gradient_accumulation_steps: 2 (the same batch for the "
        "optimizer)",
        "health.on_oom: halve_batch, which does that by itself",
        "training.max_length: 32",
        "quantization.load_in_4bit: true",
        "a smaller base model",
    ]


def test_each_mend_loads_and_trains(tmp_path: Path, tiny_base: Path) -> None:
    mends = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    result, _ = trained(small_recipe(tmp_path, tiny_base, training=mends | {"max_length": 64}))
    assert result.steps == 3


def test_memory_that_runs_out_in_an_evaluation_names_its_batch_size(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError(f"{CPU}4096000000 bytes. Error code 12 (Cannot allocate memory)")

    monkeypatch.setattr("lorafit.tasks.causal_lm_trainer.CausalLm.prediction_step", full)
    with pytest.raises(MachineError) as caught:
        trained(small_recipe(tmp_path, tiny_base))
    (problem,) = caught.value.problems
    assert problem.where.endswith(": training.per_device_eval_batch_size")
    assert "out of memory while evaluating: 3.81 GiB was asked for" in problem.message
    assert "; make room with training.per_device_eval_batch_size: 4 (the same held-out loss); or " in problem.message


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError(CUDA), RuntimeError(f"{CPU}4096 bytes."), OSError(errno.ENOMEM, "mmap")], ids=repr
)
def test_memory_that_runs_out_in_loading_names_the_model(
    error: Exception, tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(MachineError, match=r"quantization\.load_in_4bit: true, train on more GPUs") as caught:
        trained(small_recipe(tmp_path, tiny_base))
    assert len(caught.value.problems) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (torch.OutOfMemoryError(CUDA), 2684354560),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), 20 * 2**20),
        (RuntimeError(f"{CPU}4096000000 bytes. Error code 12 (Cannot allocate memory)"), 4096000000),
        (RuntimeError("CUDA error: out of memory"), None),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), None),
        (MemoryError(), None),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), None),
    ],
)
def test_memory_errors_are_known_by_their_words(error: Exception, asked: int | None) -> None:
    assert is_out_of_memory(error)
    assert bytes_asked(error) == asked
    wrapped = ModelError("transformers cannot load it")
    wrapped.__cause__ = error
    assert is_out_of_memory(wrapped)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("shape mismatch"), OSError(errno.ENOSPC, "No space left"), MachineError("out of memory"), None],
)
def test_other_errors_are_not_taken_for_it(error: Exception | None, tmp_path: Path, tiny_base: Path) -> None:
    assert not is_out_of_memory(error)
    if error is not None:
        loaded = small_recipe(tmp_path, tiny_base)
        with (
            pytest.raises(type(error)) as caught,
            out_of_memory_is_said(loaded, doing=lambda: "training", checkpointing=False),
        ):
            raise error
        assert caught.value is error


class Crash(TrainerCallback):
    """The run ends without a word after a step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3:
            raise ZeroDivisionError


def test_a_resumed_run_goes_on_in_halves(tmp_path: Path, tiny_base: Path, memory: Patch) -> None:
    sections = {"training": {"max_steps": 5}, "checkpoints": {"every": 1}, "health": HALVE}

    def fails(trainer: SFTTrainer, rows: int) -> bool:
        return rows > 2 and trainer.state.global_step == 1

    memory(fails)
    trained(recipe_in(tmp_path / "undisturbed", tiny_base, **sections))
    memory(fails)
    loaded = recipe_in(tmp_path / "crashed", tiny_base, **sections)
    with pytest.raises(ZeroDivisionError):
        trained(loaded, watchers=[Crash()])
    went_on = memory(never)
    begin: Begin = "resume"
    _, said = trained(loaded, begin=begin)
    assert [len(rows) for rows in went_on.passes] == [2] * 4  # two steps, from the first on
    assert said == []
    for name, tensor in adapter(tmp_path / "undisturbed").items():
        assert torch.equal(adapter(tmp_path / "crashed")[name], tensor), name


LIMITED = """
import logging, resource, sys
from pathlib import Path
from lorafit.errors import LorafitError
from lorafit.recipe import load
from lorafit.training.train import train

pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 160 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
logging.basicConfig(stream=sys.stdout, level="INFO")
try:
    train(load(Path(sys.argv[1])), cache_dir=Path(sys.argv[2]))
except LorafitError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit of address space is Linux's")
@pytest.mark.parametrize("on_oom", ["stop", "halve_batch"])
def test_memory_that_really_runs_out(on_oom: str, tmp_path: Path, tiny_base: Path) -> None:
    settings = {"max_length": 512, "per_device_train_batch_size": 96, "max_steps": 2, "warmup_steps": 0.0}
    loaded = small_recipe(tmp_path, tiny_base, training=settings, health={"on_oom": on_oom}, data={"eval": []})
    rows = [{"prompt": f"{number}:", "completion": "0123456789" * 48} for number in range(96)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LIMITED, str(loaded.path), str(cache_of(tmp_path))],
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if on_oom == "stop":
        assert done.returncode == 4, done.stdout + done.stderr
        assert "out of memory while training: " in done.stdout.splitlines()[-1]
        assert "training.per_device_train_batch_size: 48 with " in done.stdout.splitlines()[-1]
    else:
        assert done.returncode == 0, done.stdout + done.stderr
        assert "per_device_train_batch_size 96 -> 48" in done.stdout
        assert adapter(tmp_path)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_checkpointing_is_named_where_it_was_off_whoever_chose_that(checkpointing: bool, tmp_path: Path) -> None:
    loaded = small_recipe(tmp_path, tmp_path / "base")
    with (
        pytest.raises(MachineError) as caught,
        out_of_memory_is_said(loaded, doing=lambda: "training", checkpointing=checkpointing),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB.")
    assert ("training.gradient_checkpointing: true" in str(caught.value)) is not checkpointing
