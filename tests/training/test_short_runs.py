"""Runs of one or two steps: what cannot have moved by then is not held to it, and what cannot work is said first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lorafit.errors import RecipeError, VerificationError
from lorafit.training import train as train_module
from lorafit.validation import validate
from support.runs import QUICK, run, small_recipe

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"lora": {"use_dora": True}},
    "adalora": {"lora": None, "adalora": {"orth_reg_weight": 0.0}},
    "embedding": {"lora": {"target_modules": ["embed_tokens", "q_proj"]}},
}


@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # peft takes a module pruned to rank 0 for a broken one
@pytest.mark.parametrize(("kind", "steps"), [("lora", 1), ("dora", 1), ("embedding", 1), ("adalora", 2)])
def test_the_shortest_run_of_each_kind_ends_well(kind: str, steps: int, tmp_path: Path, tiny_base: Path) -> None:
    """A has no gradient while B is zero, so the first update moves B alone."""
    training = QUICK | {"max_steps": steps, "warmup_steps": 0}
    assert run(small_recipe(tmp_path, tiny_base, training=training, **KINDS[kind]))[0].steps == steps


def test_twenty_rows_with_all_defaults_end_well(tmp_path: Path, tiny_base: Path) -> None:
    """Warm-up takes the first of two steps."""
    data = {"train": [{"path": "train.jsonl", "limit": 20}], "eval": []}
    defaults = {"max_steps": None, "max_length": 512, "learning_rate": 2e-4, "gradient_accumulation_steps": 4}
    result, _ = run(small_recipe(tmp_path, tiny_base, data=data, training=defaults))
    assert (result.outcome, result.steps) == ("finished", 2)


def test_one_update_excuses_no_tensor_whose_partner_stayed_as_well(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def move_one_b(self: torch.optim.AdamW, closure: object = None) -> None:
        next(p for p in self.param_groups[0]["params"] if not p.any()).data += 1

    monkeypatch.setattr(torch.optim.AdamW, "step", move_one_b)
    recipe = small_recipe(tmp_path, tiny_base, training=QUICK | {"max_steps": 1, "warmup_steps": 0})
    with pytest.raises(VerificationError, match=r"layers\.0\.self_attn\.k_proj\.lora_A.* did not move") as caught:
        run(recipe)
    assert "layers.0.self_attn.q_proj" not in str(caught.value)


def test_from_the_second_update_on_every_tensor_has_moved(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def move_each_b(self: torch.optim.AdamW, closure: object = None) -> None:
        for parameter in self.param_groups[0]["params"][1::2]:
            parameter.data += 0.01

    monkeypatch.setattr(torch.optim.AdamW, "step", move_each_b)
    for steps in (1, 2):
        directory = tmp_path / str(steps)
        directory.mkdir()
        recipe = small_recipe(directory, tiny_base, training=QUICK | {"max_steps": steps, "warmup_steps": 0})
        if steps == 1:
            assert run(recipe)[0].steps == 1
        else:
            with pytest.raises(VerificationError, match=r"lora_A.* did not move"):
                run(recipe)


def test_a_warm_up_that_takes_every_step_is_refused_with_the_recipe(tmp_path: Path, tiny_base: Path) -> None:
    with pytest.raises(RecipeError, match=r"training.warmup_steps: 0.03 of the run's 1 step, rounded up, is all of it"):
        small_recipe(tmp_path, tiny_base, training=QUICK | {"max_steps": 1, "warmup_steps": 0.03})
    schedule = {"max_steps": 1, "lr_scheduler_type": "constant"}
    assert small_recipe(tmp_path, tiny_base, training=QUICK | schedule).recipe.training.max_steps == 1


def test_adalora_needs_a_step_to_see_what_matters(tmp_path: Path, tiny_base: Path) -> None:
    training = QUICK | {"max_steps": 1, "warmup_steps": 0}
    with pytest.raises(RecipeError, match=r"adalora: needs a step before those that it ends with .* the run's 1 step"):
        small_recipe(tmp_path, tiny_base, training=training, **KINDS["adalora"])


def test_a_warm_up_that_takes_every_step_of_few_rows_is_refused_before_the_model_is_loaded(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_module, "model_with_adapter", lambda *_, **__: pytest.fail("the model was loaded"))
    data = {"train": [{"path": "train.jsonl", "limit": 4}], "eval": []}
    with pytest.raises(RecipeError, match=r"recipe.yaml:\d+: training.warmup_steps: 0.03 of the run's 1 step"):
        run(small_recipe(tmp_path, tiny_base, data=data, training=QUICK | {"max_steps": None, "warmup_steps": 0.03}))
    assert not (tmp_path / "run").exists()


def test_a_run_of_one_step_has_no_warm_up_unless_it_is_asked_for(tmp_path: Path, tiny_base: Path) -> None:
    recipe = small_recipe(tmp_path, tiny_base, training=QUICK | {"max_steps": 1})
    result, said = run(recipe)
    assert result.outcome == "finished"
    assert "warm-up: 0 steps: 0.03 x 1, rounded up, would be the whole run" in said
    assert validate(recipe.path).numbers["warmup_steps"].value == 0
