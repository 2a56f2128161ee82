"""Write a small recipe, train it in this process, and load what it left as a stranger would."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lorafit.lines import heard
from lorafit.recipe import LoadedRecipe, load
from lorafit.training.train import TrainResult, train
from support.tiny import sums, write_jsonl

CLOSE = {"rtol": 0, "atol": 2e-6}
"""float32 sums in another order: 5e-7 apart at most in losses of 5.5."""
QUICK = {
    "max_length": 64,
    "max_steps": 3,
    "learning_rate": 5e-3,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "logging_steps": 1,
    "bf16": False,
}


def small_recipe(directory: Path, base: Path, **sections: Any) -> LoadedRecipe:
    """24 training and 8 held-out rows, three steps in float32; `sections` are merged in."""
    write_jsonl(directory / "train.jsonl", sums(24))
    write_jsonl(directory / "eval.jsonl", sums(8, first=100))
    recipe: dict[str, Any] = {
        "output_dir": str(directory / "run"),
        "model": {"model_name_or_path": str(base)},
        "lora": {"r": 4},
        "data": {"train": [{"path": "train.jsonl"}], "eval": [{"path": "eval.jsonl"}]},
        "training": dict(QUICK),
    }
    for name, section in sections.items():
        if section is None:
            recipe.pop(name)
        elif isinstance(section, dict) and isinstance(recipe.get(name), dict):
            recipe[name] = recipe[name] | section
        else:
            recipe[name] = section
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return load(path)


_SELF_TESTS = tempfile.TemporaryDirectory(prefix="lorafit-tests-")


def cache_of(directory: Path) -> Path:
    """A cache of its own, but for what the self-test has passed: each combination once for all tests."""
    cache = directory / "cache"
    cache.mkdir(exist_ok=True)
    if not (cache / "selftest").is_symlink():
        (cache / "selftest").symlink_to(_SELF_TESTS.name, target_is_directory=True)
    return cache


def run(loaded: LoadedRecipe) -> tuple[TrainResult, list[str]]:
    """Train it; the result and the lines said."""
    said: list[str] = []
    with heard(said.append):
        result = train(loaded, cache_dir=cache_of(loaded.path.parent))
    return result, said


def reloaded(result: TrainResult, base: Path, **keys: Any) -> PeftModel:
    """The adapter on its base, with plain PEFT."""
    model = AutoModelForCausalLM.from_pretrained(base, **keys)
    return PeftModel.from_pretrained(model, result.adapter).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    """[1, 12, vocabulary] for a fixed input."""
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 15).unsqueeze(0)).logits


def metrics(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text("utf-8").splitlines()]


def assert_same_curves(one: Path, two: Path, *, close: dict[str, float] = CLOSE) -> None:
    ours, theirs = metrics(one), metrics(two)
    assert len(ours) == len(theirs) > 3
    for name in ("loss", "eval_loss", "grad_norm", "lr", "tokens", "eval_tokens"):
        pairs = [(a[name], b[name]) for a, b in zip(ours, theirs, strict=True) if name in a]
        assert pairs
        torch.testing.assert_close(
            *(torch.tensor(side) for side in zip(*pairs, strict=True)), rtol=close["rtol"], atol=close["atol"], msg=name
        )


def saved_adapter(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "run" / "adapter" / "adapter_model.safetensors")
