"""`lorafit validate`: recipe and data at once, or what the run will do with its arithmetic."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lorafit.errors import DataError, MachineError, ModelError, RecipeError
from lorafit.recipe.arithmetic import sequences_per_step, share_of, steps_per_epoch, total_steps
from lorafit.report.validation import validation_text
from lorafit.validation import validate
from support.recipes import SMALLEST, written

ROW = '{"prompt": "p%d", "completion": "c"}\n'


def rows(directory: Path, count: int) -> None:
    (directory / "rows.jsonl").write_text("".join(ROW % number for number in range(count)), encoding="utf-8")


def test_a_valid_recipe_says_what_the_run_will_do(tmp_path: Path) -> None:
    rows(tmp_path, 1001)
    text = f"""\
{SMALLEST.replace("]}", "], eval_fraction: 0.1}")}training:
  num_train_epochs: 2
  per_device_train_batch_size: 4
  gradient_accumulation_steps: 8
  eval_strategy: steps
  eval_steps: 0.25
launch: {{num_processes: 2}}
lora: {{r: 8, lora_alpha: 16}}
"""
    result = validate(written(tmp_path, text))
    assert result.data.train_rows + result.data.eval_rows == 1001
    trained = result.data.train_rows
    per_epoch = -(-trained // 64)
    assert validation_text(result).splitlines()[1:] == [
        "  base model   gpt2 (Hub), dtype auto",
        "  adapter      LoRA, rank 8, scale 16 / 8, on all-linear",
        f"  data         {result.data.summary()}",
        "  batch        64 sequences per step = 4 per device x 8 accumulated x 2 processes",
        f"  epoch        {per_epoch} steps per epoch = {trained} rows / 64, rounded up",
        f"  run          {2 * per_epoch} steps = {per_epoch} per epoch x 2 epochs",
        f"  warm-up      1 steps = 0.03 x {2 * per_epoch}",
        f"  evaluation   {result.data.eval_rows} rows, before and after, every "
        f"{-(-2 * per_epoch // 4)} steps = 0.25 x {2 * per_epoch}",
        f"  checkpoints  every {round(2 * per_epoch / 10)} steps = 10% of {2 * per_epoch}, 2 kept",
        "  writes       runs/x",
        "not checked: the base, gpt2 is not in the cache of this machine: names of modules, ranks, positions, "
        "tokenizer",
    ]
    assert result.as_dict()["steps"] == 2 * per_epoch


@pytest.mark.parametrize(
    ("rows_", "batch", "accumulated", "processes"),
    [(7, 2, 1, 1), (8, 2, 2, 1), (9, 2, 2, 2), (1, 4, 4, 2), (33, 4, 2, 2)],
)
def test_planned_steps_are_the_trainers(
    tmp_path: Path, rows_: int, batch: int, accumulated: int, processes: int
) -> None:
    from accelerate.data_loader import prepare_data_loader
    from torch.utils.data import DataLoader

    sizes = f"per_device_train_batch_size: {batch}, gradient_accumulation_steps: {accumulated}"
    text = f"{SMALLEST}training: {{{sizes}, warmup_steps: 0}}\n"
    rows(tmp_path, rows_)
    recipe = validate(written(tmp_path, text)).loaded.recipe
    rows_read: Any = range(rows_)  # anything that has a length and is read by number
    loader = prepare_data_loader(DataLoader(rows_read, batch_size=batch), num_processes=processes, process_index=0)
    expected = -(-len(loader) // accumulated)
    assert steps_per_epoch(recipe, rows_, processes=processes).value == expected
    assert total_steps(recipe, rows_, processes=processes).value == expected
    assert sequences_per_step(recipe, processes).value == batch * accumulated * processes


def test_shares_are_rounded_as_the_trainer_does() -> None:
    from transformers import TrainingArguments

    for steps in (1, 7, 10, 333):
        for share in (0.03, 0.5, 1, 5):
            expected = TrainingArguments.get_warmup_steps(type("Arguments", (), {"warmup_steps": share})(), steps)
            assert share_of(steps, share).value == expected


def test_problems_of_the_recipe_and_its_data_come_together(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(ROW % 1 + "{broken\n", encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        validate(written(tmp_path, f"{SMALLEST.replace('gpt2', './base')}lora: {{rr: 1}}\n"))
    said = [str(problem).replace(f"{tmp_path}/", "") for problem in caught.value.problems]
    assert [line.split(": ")[0] for line in said] == ["x.yaml:3", "x.yaml:1", "rows.jsonl:2"]


def test_each_kind_of_problem_has_its_own_exit_code(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        validate(written(tmp_path, SMALLEST))
    rows(tmp_path, 10)
    with pytest.raises(ModelError, match="base: there is no such directory"):
        validate(written(tmp_path, SMALLEST.replace("gpt2", "./base")))


def test_what_does_not_fit_into_the_counted_steps_is_refused(tmp_path: Path) -> None:
    rows(tmp_path, 32)
    with pytest.raises(
        RecipeError, match=r"x.yaml:3: training.warmup_steps: 2 steps of warm-up do not end within the run"
    ):
        validate(written(tmp_path, f"{SMALLEST}training: {{warmup_steps: 2}}\n"))
    assert validate(written(tmp_path, f"{SMALLEST}training: {{warmup_steps: 1}}\n")).numbers["steps"].value == 2


def test_data_is_not_looked_for_where_its_section_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        validate(written(tmp_path, SMALLEST.replace("{path:", "{pth:")))
    assert len(caught.value.problems) == 1


def lorafit(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lorafit", *arguments]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False, timeout=60)


def test_the_command_keeps_results_and_advice_apart(tmp_path: Path) -> None:
    rows(tmp_path, 10)
    path = written(tmp_path, f"{SMALLEST}training: {{learning_rate: 1e-5, packing: true}}\n")
    done = lorafit(tmp_path, "validate", path.name, "--json", "--set", "lora.r=4")
    assert done.returncode == 0
    result = json.loads(done.stdout)
    assert result["train_rows"] == 10 and "steps" not in result
    assert [advice["name"] for advice in result["advice"]] == ["low-learning-rate", "no-held-out-rows"]
    assert [line.split(": ")[0] for line in done.stderr.splitlines()] == ["advice", "advice"]
    assert lorafit(tmp_path, "validate", path.name, "--quiet").stderr == ""


def test_the_command_exits_2_with_a_line_per_problem_and_creates_nothing(tmp_path: Path) -> None:
    rows(tmp_path, 10)
    written(tmp_path, f"{SMALLEST}lora: {{lora_alfa: 32}}\n")
    before = sorted(tmp_path.rglob("*"))
    done = lorafit(tmp_path, "validate", "x.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: x.yaml:3: lora.lora_alfa: not a key of lora; did you mean lora_alpha?\n"
    assert sorted(tmp_path.rglob("*")) == before
    assert lorafit(tmp_path, "validate", "nowhere.yaml").stderr == "error: nowhere.yaml: no such file\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["validat"], "error: validat: no such command; did you mean validate?"),
        (["validate"], "error: Missing argument 'RECIPE'. (see `lorafit validate --help`)"),
        (["validate", "x.yaml", "--sett"], "error: No such option: --sett"),
        (["init", "--preset", "x"], "error: Invalid value for '--preset': 'x' is not one of 'lora', 'qlora', 'dora'."),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from lorafit.cli import _exit_code

    assert _exit_code(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(said) and captured.err.count("\n") == 1
    assert captured.out == ""


def test_packages_that_are_not_installed_are_named_in_the_words_of_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorafit.preflight import Machine, refuse_what_this_machine_lacks
    from lorafit.recipe import load

    rows(tmp_path, 10)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("wandb", "deepspeed", "flash_attn"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    text = (
        f"{SMALLEST.replace('gpt2', 'gpt2, attn_implementation: flash_attention_2')}training: {{report_to: [wandb]}}\n"
    )
    path = written(tmp_path, f"{text}launch: {{strategy: zero2}}\n")
    with pytest.raises(MachineError) as said:
        validate(path)
    assert [str(problem).replace(f"{tmp_path}/", "") for problem in said.value.problems] == [
        "x.yaml:4: launch.strategy: zero2 needs the package deepspeed; install it, or write fsdp2",
        "x.yaml:1: model.attn_implementation: needs the package flash_attn; install it, or write sdpa",
        "x.yaml:3: training.report_to: wandb is not installed; pip install wandb",
    ]
    gpu = Machine(device="cuda", name="a GPU", gpus=1, has_bf16=True, memory_bytes=2**34)
    with pytest.raises(MachineError) as refused:
        refuse_what_this_machine_lacks(load(path), gpu)
    assert refused.value.problems == said.value.problems
