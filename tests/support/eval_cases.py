"""A trained run to evaluate, made once, and copies of it to break."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from lorafit.cli import _exit_code
from lorafit.evaluation import generate
from lorafit.evaluation.eval_result import EvalResult
from lorafit.evaluation.evaluate import evaluate
from lorafit.lines import heard
from lorafit.merging.merge import merge
from support.runs import QUICK, run, small_recipe
from support.tiny import build_base

GENERATE = "eval.generate={max_new_tokens: 8, metrics: [exact_match, rouge_l]}"


@pytest.fixture
def short_own_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The base writes less by itself than it would: tests have no time to listen."""
    monkeypatch.setattr(generate, "OWN_TEXTS", 16)
    monkeypatch.setattr(generate, "OWN_TOKENS", 16)


def trained_run(directory: Path) -> Path:
    """A run that has learned what answers look like, with its merged model; base, rows and recipe lie beside it."""
    base = build_base(directory / "base")
    result, _ = run(small_recipe(directory, base, training=QUICK | {"max_steps": 12, "learning_rate": 1e-2}))
    merge(
        Path(result.run), out=None, dtype=None, max_shard_size=None, base=None, onto=None, verify=False,
        progress=lambda total: lambda done: None, cache_dir=None,
    )  # fmt: skip
    return Path(result.run)


def copied(run_directory: Path, target: Path) -> Path:
    """The whole directory of the run, to break something in it."""
    shutil.copytree(run_directory.parent, target)
    return target / "run"


def evaluated(run_directory: Path | str, *overrides: str, **keys: Any) -> tuple[EvalResult, list[str]]:
    """The result, and the lines said."""
    said: list[str] = []
    with heard(said.append):
        return evaluate(str(run_directory), overrides=overrides, cache_dir=None, **keys), said


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str], str]:
    """Exit code, lines of stderr and stdout of `lorafit eval`."""
    capsys.readouterr()
    code = _exit_code(["eval", *arguments])
    printed = capsys.readouterr()
    return code, printed.err.splitlines(), printed.out


def plain_adapter(base: Path, directory: Path, *, size: float) -> Path:
    """An adapter that no run has trained, its B `size` times random; 0 changes nothing."""
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data = size * torch.randn_like(parameter)
    assert isinstance(adapted, PeftModel)
    adapted.save_pretrained(str(directory), save_embedding_layers=False)
    return directory


def changed_json(path: Path, **changes: Any) -> None:
    """A JSON file with other values."""
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")
