"""An adapter cut to a smaller rank, against the SVD of its full matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from lorafit.sweep.truncate import lora_layers, ranks_that_keep, read_trained, spectrum, with_rank

RANK = 6


def trained_adapter(base: Path, directory: Path, **keys: Any) -> PeftModel:
    """An adapter whose every tensor is random, saved in `directory`."""
    torch.manual_seed(1)
    base_model = AutoModelForCausalLM.from_pretrained(base)
    settings: dict[str, Any] = {"r": RANK, "lora_alpha": 9, "target_modules": "all-linear"}
    model = get_peft_model(base_model, LoraConfig(task_type="CAUSAL_LM", **(settings | keys)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * (0.01 if "magnitude" in name else 0.1))
    model.save_pretrained(str(directory), save_embedding_layers=False)
    return model


def updates(model: PeftModel) -> dict[str, torch.Tensor]:
    return {
        name: layer.get_delta_weight("default").double()  # type: ignore[attr-defined]  # each kind of layer has its own
        for name, layer in lora_layers(model)
    }


def nearest(update: torch.Tensor, rank: int) -> torch.Tensor:
    left, values, right = torch.linalg.svd(update, full_matrices=False)
    return left[:, :rank] * values[:rank] @ right[:rank]


@pytest.mark.parametrize(
    ("rank", "keys"),
    [
        (1, {}),
        (RANK, {}),
        (8, {}),  # more than it has
        (3, {"use_rslora": True}),
        (3, {"target_modules": ["q_proj", "embed_tokens"]}),
        (3, {"alpha_pattern": {"q_proj": 3}}),
        (3, {"rank_pattern": {"q_proj": 2}}),  # as EVA leaves them
    ],
)
def test_a_cut_adapter_is_the_nearest_of_its_rank(
    rank: int, keys: dict[str, Any], tiny_base: Path, tmp_path: Path
) -> None:
    whole = updates(trained_adapter(tiny_base, tmp_path, **keys))
    trained, base = read_trained(AutoModelForCausalLM.from_pretrained(tiny_base), tmp_path)
    smaller = {"r": rank, "lora_alpha": 2 * rank, "rank_pattern": {}}
    config = LoraConfig(task_type="CAUSAL_LM", **({"target_modules": "all-linear"} | keys | smaller))
    cut = updates(with_rank(trained, base, config, seed=0))
    assert cut.keys() == whole.keys() and len(cut) >= 3
    for name, update in cut.items():
        torch.testing.assert_close(update, nearest(whole[name], rank), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "keys",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [3, 5]},
    ],
)
def test_what_is_no_factor_stays_as_it_was(keys: dict[str, Any], tiny_base: Path, tmp_path: Path) -> None:
    """Cut to its own rank it is the same model."""
    model = trained_adapter(tiny_base, tmp_path, **keys).eval()
    ids = torch.arange(3, 15).unsqueeze(0)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        trained, _ = read_trained(AutoModelForCausalLM.from_pretrained(tiny_base), tmp_path)
        settings: dict[str, Any] = {"r": RANK, "lora_alpha": 12, "target_modules": "all-linear"}
        config = LoraConfig(task_type="CAUSAL_LM", **(settings | keys))
        after = with_rank(trained, AutoModelForCausalLM.from_pretrained(tiny_base), config, seed=0)(input_ids=ids)
    torch.testing.assert_close(after.logits, before, atol=2e-5, rtol=1e-4)


def test_reading_an_adapter_gives_the_base_back_as_it_was(tiny_base: Path, tmp_path: Path) -> None:
    trained_adapter(tiny_base, tmp_path)
    fresh = AutoModelForCausalLM.from_pretrained(tiny_base)
    _, base = read_trained(AutoModelForCausalLM.from_pretrained(tiny_base), tmp_path)
    expected = dict(fresh.named_parameters())
    found = dict(base.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_singular_values_are_those_of_the_full_update() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(4, 30), torch.randn(50, 4)
    found = spectrum(a, b, scale=1.5, dtype=torch.float32).values
    torch.testing.assert_close(found, torch.linalg.svdvals(1.5 * b.double() @ a.double())[:4])


def test_a_module_whose_update_is_spread_out_is_given_more_rank() -> None:
    values = {"narrow": torch.tensor([4.0, 0.1, 0.1, 0.1]), "wide": torch.tensor([1.0, 1.0, 1.0, 1.0])}
    ranks, kept = ranks_that_keep({name: of.double() for name, of in values.items()}, rank=2)
    assert ranks == {"narrow": 1, "wide": 4} and kept == pytest.approx((16.01 + 2) / (16.03 + 4))
    assert ranks_that_keep({"zero": torch.zeros(4).double(), "one": torch.ones(4).double()}, rank=4)[0]["one"] == 4
