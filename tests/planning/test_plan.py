"""`lorafit plan`: the command, its GPUs, its advice and the recipe that it mends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import PartialState

from lorafit.cli import _exit_code
from lorafit.errors import MachineError, ModelError, RecipeError
from lorafit.lines import heard
from lorafit.planning import for_training
from lorafit.planning.ask_planner import Question
from lorafit.planning.fitting_changes import proposals
from lorafit.planning.for_training import PlanOfRun, measured_beside, planned_checkpointing
from lorafit.planning.gpus import CONTEXT, KNOWN, Gpu, device_of, gpu_named, gpu_of_this_machine
from lorafit.planning.largest_that_fit import search
from lorafit.planning.make_plan import answer, planned_steps
from lorafit.planning.plan_result import WORKSPACES, RowsOfRun, verdict
from lorafit.planning.recipe_changes import changed, written_as
from lorafit.planning.rows_of_run import rows_of_run
from lorafit.preflight import Machine, checkpointing_choice, free_gpu_bytes
from lorafit.recipe import load
from support.recipes import loaded, written
from support.tiny import build_base, llama_config, write_jsonl

pytestmark = pytest.mark.xdist_group("planning plan")  # its fixtures cost too much to be made by each worker

GIB = 2**30
RECIPE = "model: {model_name_or_path: ./base}\ndata: {train: [{path: rows.jsonl}]}\ntraining: {max_length: 512}\n"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base model and a recipe for it."""
    path = tmp_path_factory.mktemp("plan")
    build_base(path / "base", config=llama_config(vocab_size=32768))
    written(path, RECIPE)
    return path


def plan(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lorafit", "plan", *arguments]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=600, check=False)


def test_a_recipe_that_does_not_fit_is_mended_and_then_fits(directory: Path) -> None:
    batch = ("--set", "training.per_device_train_batch_size=64", "--set", "lora.target_modules=[q_proj]")
    done = plan(directory, "x.yaml", "--gpu", "800MiB", *batch, "--json", "--check", "--fix")
    assert done.returncode == 4, done.stderr
    found = json.loads(done.stdout)
    assert found["verdict"] == "does not fit" and found["fits"] is False
    assert found["allocated_bytes"] == sum(found["parts"].values()) - found["parts"]["reserve"]
    assert found["allocated_bytes"] <= found["reserved_bytes"] < found["device_bytes"]
    savings = [one["saving_bytes"] for one in found["advice"]]
    assert savings == sorted(savings, reverse=True) and savings[-1] > 0
    assert "x-fits.yaml" in done.stderr
    mended = load(directory / "x-fits.yaml").recipe.training
    assert mended.per_device_train_batch_size * mended.gradient_accumulation_steps == 64 * 4
    assert mended.max_length == 512
    again = plan(directory, "x-fits.yaml", "--gpu", "800MiB", "--check")
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[-1].startswith("fits on 800MiB")


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = _exit_code(["plan", *arguments])
    return code, capsys.readouterr().err


def test_bad_input_is_one_line_with_its_mend(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(directory / "x.yaml")
    assert said(capsys, recipe, "--gpu", "rtx490") == (2, one_line("rtx4090"))
    assert said(capsys, recipe, "--gpu", "quantum") == (2, one_line("24GiB"))
    assert said(capsys, recipe, "--gpu", "0GiB") == (2, one_line("24GiB"))
    assert said(capsys, recipe, "--gpu", "l4", "--count", "0") == (2, one_line("--count"))
    assert said(capsys, recipe, "--gpu", "l4", "--fix", "--output", recipe) == (2, one_line("never overwritten"))


ROWS = [{"prompt": f"What is {i}?", "completion": "It is " + "9" * (i % 50)} for i in range(40)]


def test_a_cpu_is_planned_with_the_steps_and_the_time_of_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_base(tmp_path / "base")
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    training = (
        "max_length=256",
        "num_train_epochs=3",
        "per_device_train_batch_size=4",
        "gradient_accumulation_steps=1",
    )
    keys = [word for key in training for word in ("--set", f"training.{key}")]
    recipe = str(written(tmp_path, RECIPE))
    assert _exit_code(["plan", recipe, "--gpu", "cpu", "--measure", "--json", *keys]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["is_cpu"] and plan["verdict"] == "fits" and plan["gradient_checkpointing"] is False
    assert plan["allocated_bytes"] == pytest.approx(plan["measured_bytes"], rel=0.005)
    assert plan["device_bytes"] > plan["allocated_bytes"] + 100 * 2**20  # Python and the libraries
    assert (plan["rows"]["rows"], plan["rows"]["counted_on"], plan["steps"]) == (40, 40, 30)
    assert plan["rows"]["tokens_per_row"] < plan["rows"]["batch_length"] < 256
    assert 0 < plan["seconds_expected"] < plan["seconds"]
    assert plan["measured_seconds"] > 0


def test_packed_rows_are_told_from_their_tokens(tmp_path: Path) -> None:
    packed = loaded(tmp_path, RECIPE, overrides=["training.packing=true", "training.max_length=256"]).recipe
    assert planned_steps(packed, RowsOfRun(1000, 64.0, 80.0, 500), count=1) == 16  # 250 packed rows, 16 a step
    assert planned_steps(packed, RowsOfRun(1000, None, None, 0), count=1) is None


def test_what_no_cpu_trains_is_refused_with_the_way_to_plan_a_gpu(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, err = said(capsys, str(directory / "x.yaml"), "--gpu", "cpu", "--set", "training.optim=paged_adamw_8bit")
    first, second = err.splitlines()
    assert code == 4 and "on CPU use adamw_torch_fused" in first and "--gpu rtx4090" in second


@pytest.mark.parametrize(
    ("keys", "rows", "steps"),
    [(["training.packing=true"], True, None), ([], True, 3), ([], False, None), (["training.max_steps=7"], False, 7)],
)
def test_without_a_tokenizer_or_rows_the_plan_says_what_it_does_not_know(
    tmp_path: Path, keys: list[str], rows: bool, steps: int | None
) -> None:
    if rows:
        write_jsonl(tmp_path / "rows.jsonl", ROWS)
    recipe = loaded(tmp_path, RECIPE, overrides=keys).recipe
    found = None if recipe.training.max_steps else rows_of_run(recipe, has_model=False)
    assert (found is not None) == (rows and steps != 7)
    assert planned_steps(recipe, found, count=1) == steps


class one_line:
    """Equal to one line of error that holds a word."""

    def __init__(self, word: str) -> None:
        self.word = word

    def __eq__(self, other: object) -> bool:
        lines = str(other).splitlines()
        return len(lines) == 1 and lines[0].startswith("error: ") and self.word in lines[0]

    def __repr__(self) -> str:
        return f"one line with {self.word!r}"


def test_a_model_that_is_not_here_is_planned_by_its_shape(tmp_path: Path) -> None:
    recipe = loaded(tmp_path, RECIPE.replace("./base", "some/model"))
    with pytest.raises(ModelError, match=r"hf download some/model .* --model-shape, one of llama3-8b"):
        answer(Question(recipe, KNOWN["l4"], 1))


def test_a_misspelt_shape_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"--model-shape: 'llama-8b' is not .* did you mean llama3-8b\?"):
        answer(Question(loaded(tmp_path, RECIPE), KNOWN["l4"], 1, model_shape="llama-8b"))


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        (["launch.strategy=zero3"], "not DeepSpeed"),
        (["quantization.load_in_8bit=true"], "8-bit"),
    ],
)
def test_what_is_not_modelled_is_refused(tmp_path: Path, keys: list[str], why: str) -> None:
    recipe = loaded(tmp_path, RECIPE.replace("./base", "llama3-8b"), overrides=keys)
    with pytest.raises(MachineError, match=why):
        answer(Question(recipe, KNOWN["h200"], 4))


def test_a_gpu_is_known_by_many_names() -> None:
    assert gpu_named("RTX 4090") == gpu_named("rtx4090") == KNOWN["rtx4090"]
    assert gpu_named("A100") == gpu_named("NVIDIA A100-80") == KNOWN["a100-80"]
    assert gpu_named("24GiB") == Gpu("24GiB", 24 * GIB)
    with pytest.raises(RecipeError, match="did you mean h200"):
        gpu_named("h20O")


def test_the_gpu_of_a_machine_has_the_memory_that_the_driver_shows() -> None:
    machine = Machine("cuda", "NVIDIA A100-SXM4-40GB", 8, True, 40 * GIB)
    gpu = device_of(machine)
    assert (gpu.memory_bytes, gpu.bandwidth_gb) == (40 * GIB, KNOWN["a100-40"].bandwidth_gb)
    unknown = device_of(Machine("cuda", "NVIDIA Something", 1, True, GIB))
    assert (unknown.memory_bytes, unknown.bf16_tflops) == (GIB, None)


def test_the_gpu_of_this_machine_has_the_memory_that_others_leave() -> None:
    machine = Machine("cuda", "NVIDIA A100-SXM4-40GB", 8, True, 40 * GIB)
    idle = gpu_of_this_machine(machine, free_bytes=39 * GIB)
    assert idle == device_of(machine)
    shared = gpu_of_this_machine(machine, free_bytes=10 * GIB)
    assert shared.memory_bytes == 10 * GIB + CONTEXT
    assert shared.name == "NVIDIA A100-SXM4-40GB as it is used now"
    assert shared.bandwidth_gb == idle.bandwidth_gb


def test_the_fullest_gpu_decides_and_what_this_process_holds_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: ((gpu + 1) * GIB, 40 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda gpu: 3 * GIB if gpu == 0 else 0)
    assert free_gpu_bytes(range(4)) == 2 * GIB
    assert free_gpu_bytes([3]) == 4 * GIB


def test_a_run_is_planned_on_the_memory_that_is_free(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Question] = []
    monkeypatch.setattr(for_training, "free_gpu_bytes", lambda gpus: 5 * GIB)
    monkeypatch.setattr(for_training, "begin", asked.append)
    machine = Machine("cuda", "NVIDIA A100-SXM4-80GB", 1, True, 79 * GIB)
    PlanOfRun(load(directory / "x.yaml"), machine, state=PartialState(cpu=True))
    assert [question.gpu.memory_bytes for question in asked] == [5 * GIB + CONTEXT]


def test_a_plan_is_tight_within_five_percent_of_the_limit() -> None:
    gpu = Gpu("x", 10 * GIB)
    around = WORKSPACES + CONTEXT
    most = 10 * GIB - around
    assert verdict(int(most * 0.9), int(10 * GIB / 1.05 - around) - 1, gpu=gpu, count=1) == "fits"
    assert verdict(int(most * 0.9), int(10 * GIB / 1.05 - around) + 2, gpu=gpu, count=1) == "tight"
    assert verdict(most, most + GIB, gpu=gpu, count=1) == "tight"  # the allocator gives cached blocks back
    assert verdict(most + 1, most + 1, gpu=gpu, count=1) == "does not fit"


def test_the_search_finds_the_largest_that_fits() -> None:
    for limit in range(1, 40):
        assert search(limit.__ge__, step=1, most=32) == min(limit, 32)
    assert search(lambda value: value <= 1000, step=256, most=8192) == 768
    assert search(lambda value: value <= 100, step=256, most=8192) is None
    assert search(lambda value: True, step=256, most=6000) == 5888


def test_changed_keys_count_as_written_and_rules_still_hold(tmp_path: Path) -> None:
    recipe = loaded(tmp_path).recipe
    made = changed(recipe, {"training.max_length": 4096, "quantization.load_in_4bit": True})
    assert made is not None and made.training.max_length == 4096 and made.quantization is not None
    assert "max_length" in made.training.model_fields_set
    assert changed(recipe, {"launch.strategy": "fsdp2", "quantization.load_in_4bit": True}) is None
    assert written_as({"training.gradient_checkpointing": True, "lora.r": 8}) == (
        "training.gradient_checkpointing: true, lora.r: 8"
    )


@pytest.mark.parametrize(
    "keys",
    [
        ["quantization.load_in_4bit=true"],
        ["quantization.load_in_4bit=true", "training.optim=paged_adamw_8bit"],
        ["launch.strategy=fsdp2"],
    ],
)
def test_four_bits_and_fsdp2_are_proposed_together(tmp_path: Path, keys: list[str]) -> None:
    recipe = loaded(tmp_path, overrides=keys).recipe
    estimate: Any = SimpleNamespace(recipe=recipe, checkpointing=True, peak_at="head")
    made = [changed(recipe, one.keys) for one in proposals(estimate, config=llama_config(), count=2)]
    both = [one for one in made if one and one.quantization is not None and one.launch.strategy == "fsdp2"]
    assert [one.quantization.bnb_4bit_quant_storage for one in both if one.quantization] == ["bfloat16"]


def test_without_a_plan_checkpointing_is_on_for_gpus(tmp_path: Path) -> None:
    machine = Machine("cuda", "x", 1, True, GIB)
    assert checkpointing_choice(loaded(tmp_path).recipe.training, machine).value is True


@pytest.mark.slow
def test_a_run_on_a_gpu_is_planned_by_another_process_and_goes_on_without_a_plan(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(for_training, "free_gpu_bytes", lambda gpus: 78 * GIB)
    machine = Machine("cuda", "NVIDIA A100-SXM4-80GB", 1, True, 79 * GIB)
    lines: list[str] = []
    planning = PlanOfRun(load(directory / "x.yaml"), machine, state=PartialState(cpu=True))
    with heard(lines.append):
        plan = planning.answer()
    assert plan is not None and lines == [f"plan: {plan.line()}"]
    assert measured_beside(plan, plan.allocated_bytes).endswith("(+0.0%)")
    training = load(directory / "x.yaml").recipe.training
    choice = checkpointing_choice(training, machine, planned=planned_checkpointing(plan))
    assert (choice.value, choice.reason) == (False, plan.checkpointing_reason)
    refused = load(directory / "x.yaml", overrides=["quantization.load_in_8bit=true"])
    lines.clear()
    with heard(lines.append):
        assert PlanOfRun(refused, machine, state=PartialState(cpu=True)).answer() is None
    assert len(lines) == 1 and lines[0].startswith("no plan: ") and "8-bit" in lines[0]
    on_cpu = Machine("cpu", "CPU", 0, False, GIB)
    with heard(lines.append):
        assert PlanOfRun(refused, on_cpu, state=PartialState(cpu=True)).answer() is None
    assert len(lines) == 1
