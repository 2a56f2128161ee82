"""What cannot be evaluated: one line, the right exit code, and nothing left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.eval_cases import GENERATE, copied, plain_adapter, short_own_texts, told, trained_run  # noqa: F401
from support.tiny import build_base, llama_config, sums, write_jsonl

pytestmark = pytest.mark.usefixtures("short_own_texts")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_run(tmp_path_factory.mktemp("bad") / "made")


def no_eval_rows(run: Path) -> list[str]:
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace("  eval:\n  - path: ../eval.jsonl\n", ""))
    return [str(run)]


def empty_eval_rows(run: Path) -> list[str]:
    (run.parent / "eval.jsonl").write_text("")
    return [str(run)]


def plain_without_rows(run: Path) -> list[str]:
    return [str(run / "adapter"), "--base", str(run.parent / "base")]


def missing_data(run: Path) -> list[str]:
    return [str(run), "--data", str(run / "nowhere.jsonl")]


def text_without_prompts(run: Path) -> list[str]:
    data = run / "text.jsonl"
    write_jsonl(data, [{"text": "no question, no answer"}] * 3)
    return [str(run), "--data", str(data), "--samples", "2"]


def other_tokenizer(run: Path) -> list[str]:
    path = run / "adapter/tokenizer.json"
    core = json.loads(path.read_text())
    vocabulary = core["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(core))
    return [str(run)]


def other_base(run: Path) -> list[str]:
    torch.manual_seed(3)
    return [str(run), "--base", str(build_base(run / "other", config=llama_config(initializer_range=0.1)))]


def base_of_other_widths(run: Path) -> list[str]:
    wide = build_base(run / "wide", config=llama_config(hidden_size=128, intermediate_size=256))
    return [str(run / "adapter"), "--base", str(wide), "--data", str(run.parent / "eval.jsonl")]


def base_of_other_names(run: Path) -> list[str]:
    from transformers import GPT2Config

    config = GPT2Config(
        vocab_size=264, n_embd=64, n_layer=2, n_head=4, pad_token_id=0, bos_token_id=None, eos_token_id=2
    )
    other = build_base(run / "gpt2", config=config)
    return [str(run / "adapter"), "--base", str(other), "--data", str(run.parent / "eval.jsonl")]


def adapter_in_part(run: Path) -> list[str]:
    path = run / "adapter/adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name: t for name, t in tensors.items() if "layers.1.mlp.down" not in name}, path, {"format": "pt"})
    return [str(run / "adapter"), "--base", str(run.parent / "base"), "--data", str(run.parent / "eval.jsonl")]


def merged_of_another(run: Path) -> list[str]:
    (run / "merged/merge_report.json").write_text(json.dumps({"adapter_sha256": "0" * 64}))
    return [str(run)]


def merged_nowhere(run: Path) -> list[str]:
    return [str(run), "--merged", str(run / "nowhere")]


def broken_expression(run: Path) -> list[str]:
    return [str(run), "--set", "eval.generate={answer: '(a'}"]


def expression_that_finds_nothing(run: Path) -> list[str]:
    return [str(run), "--set", "eval.generate={answer: '#### (.*)'}"]


def nothing_to_compare_with(run: Path) -> list[str]:
    return [str(run), "--fail-if-worse", "--set", "eval.compare_base=false"]


def broken_base(run: Path) -> list[str]:
    path = run.parent / "base/model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][:] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    return [str(run / "adapter"), "--base", str(run.parent / "base"), "--data", str(run.parent / "eval.jsonl")]


def no_run(run: Path) -> list[str]:
    return [str(run.parent / "base")]


CASES: dict[Callable[[Path], list[str]], tuple[int, str]] = {
    no_eval_rows: (3, "holds no held-out rows: name some with --data FILE"),
    empty_eval_rows: (3, "eval.jsonl"),
    plain_without_rows: (2, "a plain adapter knows no rows: name some with --data FILE"),
    missing_data: (3, "nowhere.jsonl"),
    text_without_prompts: (3, "has no row with a prompt and an answer"),
    other_tokenizer: (4, "has another tokenizer than"),
    other_base: (4, "is not the base of training"),
    base_of_other_widths: (4, "peft cannot attach it to this base"),
    base_of_other_names: (4, "peft cannot attach it to this base"),
    adapter_in_part: (
        4,
        "down_proj.lora_B.weight: it was trained on another base, or is not whole: copy the whole adapter again",
    ),
    merged_of_another: (4, "was made of another adapter"),
    merged_nowhere: (4, "holds no model"),
    broken_expression: (2, '"(a" is not a regular expression'),
    expression_that_finds_nothing: (3, "8 of 8 rows have no match of '#### (.*)'"),
    nothing_to_compare_with: (2, "needs the base to compare with"),
    broken_base: (6, "8 of 8 sequences is not finite (first in eval.jsonl:1)"),
    no_run: (4, "holds no adapter"),
}


@pytest.mark.parametrize("broken", CASES, ids=lambda broken: broken.__name__)
def test_one_line_the_right_code_and_nothing_left(
    broken: Callable[[Path], list[str]], made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(made, tmp_path / "copy")
    arguments = broken(run)
    before = sorted(run.rglob("*"))
    code, said, out = told(capsys, *arguments, "--quiet")
    expected_code, expected = CASES[broken]
    assert code == expected_code, said
    assert len(said) == 1
    assert expected in said[0]
    assert said[0].startswith("error: ")
    assert out == ""
    assert sorted(run.rglob("*")) == before


def test_a_model_that_stops_at_once_is_said_and_counted_as_wrong(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(made, tmp_path / "copy")
    silent = run.parent / "base"
    tensors = load_file(silent / "model.safetensors")
    tensors["lm_head.weight"][:] = 0  # all tokens alike: the first wins, which generation stops on
    save_file(tensors, silent / "model.safetensors", {"format": "pt"})
    (silent / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
    adapter = plain_adapter(silent, tmp_path / "adapter", size=0.0)
    data = write_jsonl(tmp_path / "rows.jsonl", sums(4))
    code, said, out = told(capsys, str(adapter), "--data", str(data), "--json", "--set", GENERATE)
    assert code == 0
    result: dict[str, Any] = json.loads(out)
    assert result["base"]["empty"] == result["adapter"]["empty"] == 4
    assert result["adapter"]["exact_match"] == result["adapter"]["rouge_l"] == 0
    assert [line for line in said if "4 of 4 answers are empty; they count as wrong" in line]
