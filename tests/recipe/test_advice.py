"""Advice: each piece is given, names its silencer, and is silenced by it."""

from pathlib import Path

import pytest

from lorafit.recipe import advise
from lorafit.recipe.advice import ADVICE_NAMES
from support.recipes import SMALLEST, loaded

EVAL = SMALLEST.replace("]}", "], eval_fraction: 0.1}")
GIVEN = {
    "low-learning-rate": (
        f"{EVAL}training: {{learning_rate: 2e-5}}",
        "training.learning_rate: 2e-05 is a rate for full",
    ),
    "high-learning-rate": (f"{EVAL}training: {{learning_rate: 0.1}}", "training.learning_rate: 0.1 is far above"),
    "alpha": (f"{EVAL}lora: {{r: 64, lora_alpha: 8}}", "lora.lora_alpha: the adapter is scaled by 8 / 64 = 0.125"),
    "many-epochs": (f"{EVAL}training: {{num_train_epochs: 10}}", "training.num_train_epochs: 10 epochs are learnt"),
    "epochs-overridden": (
        f"{EVAL}training: {{num_train_epochs: 2, max_steps: 5}}",
        "training.num_train_epochs: max_steps 5",
    ),
    "fp16": (f"{EVAL}training: {{fp16: true}}", "training.fp16: float16 overflows"),
    "dropout": (f"{EVAL}lora: {{lora_dropout: 0.05}}", "lora.lora_dropout: 0.05 keeps faster paths"),
    "checkpointing": (
        f"{EVAL}training: {{gradient_checkpointing: true, max_length: 512}}",
        "training.gradient_checkpointing: costs about 1.45 times the FLOPs; 512 x 4 = 2,048 tokens",
    ),
    "random-start": (f"{EVAL}lora: {{init_lora_weights: false}}", "lora.init_lora_weights: false starts with"),
    "base-bias": (f"{EVAL}lora: {{bias: all}}", "lora.bias: all trains biases"),
    "no-held-out-rows": (SMALLEST, "data.eval: no held-out rows"),
    "unpinned-code": (EVAL.replace("gpt2", "gpt2, trust_remote_code: true"), "model.trust_remote_code: runs whatever"),
}


def test_every_advice_has_a_case() -> None:
    assert GIVEN.keys() | {"positions", "experts"} == ADVICE_NAMES  # see test_validate_base.py, test_experts.py


@pytest.mark.parametrize("name", GIVEN)
def test_advice_is_given_once_and_silenced_by_its_name(tmp_path: Path, name: str) -> None:
    text, said = GIVEN[name]
    (advice,) = advise(loaded(tmp_path, f"{text}\n").recipe)
    assert str(advice).startswith(said)
    assert str(advice).endswith(f"(silence: [{name}])")
    assert advise(loaded(tmp_path, f"{text}\nsilence: [{name}]\n").recipe) == ()


def test_the_default_recipe_with_held_out_rows_needs_no_advice(tmp_path: Path) -> None:
    assert advise(loaded(tmp_path, EVAL).recipe) == ()


def test_epochs_are_many_sooner_on_few_rows(tmp_path: Path) -> None:
    recipe = loaded(tmp_path, f"{EVAL}training: {{num_train_epochs: 4}}\n").recipe
    assert advise(recipe) == advise(recipe, train_rows=5000) == ()
    (advice,) = advise(recipe, train_rows=200)
    assert "4 epochs over 200 rows" in advice.message


def test_rank_stabilised_alpha_is_judged_by_its_own_scale(tmp_path: Path) -> None:
    assert advise(loaded(tmp_path, f"{EVAL}lora: {{r: 64, lora_alpha: 8, use_rslora: true}}\n").recipe) == ()


def test_checkpointing_off_is_advised_against_where_activations_are_large(tmp_path: Path) -> None:
    (advice,) = advise(loaded(tmp_path, f"{EVAL}training: {{gradient_checkpointing: false}}\n").recipe)
    assert "2048 x 4 = 8,192 tokens" in advice.message
