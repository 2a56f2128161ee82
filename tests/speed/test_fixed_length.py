"""Packed rows of one length under torch_compile: the same losses and gradients, and one graph for every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from transformers import GPT2Config, MistralConfig, TrainerCallback

from lorafit.lines import heard
from lorafit.recipe import LoadedRecipe
from lorafit.speed.fixed_length import filled, why_not, with_fixed_length
from lorafit.training.train import TrainResult, run_training
from support.models import HEADS, SMALL, apart, built, packed
from support.runs import cache_of, small_recipe
from support.tiny import build_base, llama_config, write_jsonl

COMPILED = {
    "packing": True,
    "max_length": 64,
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 3,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "learning_rate": 5e-3,
    "warmup_steps": 0,
    "bf16": False,
    "torch_compile": True,
    "extra": {"torch_compile_backend": "eager"},  # what is traced is the same, without a compiler
}


@pytest.mark.parametrize(
    ("config", "attention"),
    [
        (llama_config(), "sdpa"),
        (llama_config(), "eager"),
        (MistralConfig(**SMALL, **HEADS, sliding_window=6), "sdpa"),
        (GPT2Config(vocab_size=264, n_embd=64, n_layer=2, n_head=4, n_positions=32), "sdpa"),
    ],
    ids=["sdpa", "eager", "sliding window", "learnt positions"],
)
def test_filling_up_changes_no_loss_and_no_gradient(config: Any, attention: str) -> None:
    model = built(config).eval()
    model.set_attn_implementation(attention)
    batch = packed(20, 3, 11)
    expected = model(**batch, use_cache=False)
    expected.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    got = with_fixed_length(model, length=100, longest=32, pad_token_id=0)(**batch, use_cache=False)
    got.loss.backward()
    assert got.logits.shape[1] == 100
    torch.testing.assert_close(got.logits[:, :34], expected.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.loss, expected.loss)
    assert len(gradients) > 10
    for name, parameter in model.named_parameters():
        assert apart(parameter.grad, gradients[name]) < 1e-5, name


def test_a_full_row_is_left_as_it_is() -> None:
    batch = packed(20, 12)
    same = filled(batch, length=32, longest=32, pad_token_id=0)
    assert all(torch.equal(same[name], batch[name]) for name in ("input_ids", "labels", "position_ids"))


class Graphs(TrainerCallback):
    """How many graphs have been traced at the end of each step, and when the run has ended."""

    def __init__(self) -> None:
        torch._dynamo.reset()
        counters.clear()
        self.seen: list[int] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seen.append(counters["stats"]["unique_graphs"])


def compiled_run(directory: Path, base: Path, **speed: bool) -> tuple[TrainResult, list[str], list[int]]:
    directory.mkdir()
    loaded = small_recipe(directory, base, training=COMPILED, speed=speed)
    rows = [{"prompt": f"{number}", "completion": "word " * (5 * number % 7 + 1)} for number in range(48)]
    write_jsonl(directory / "train.jsonl", rows[:32])
    write_jsonl(directory / "eval.jsonl", rows[32:])
    graphs, said = Graphs(), list[str]()
    with heard(said.append):
        result = run_training(loaded, watchers=[graphs], cache_dir=cache_of(directory)).result
    return result, said, [*graphs.seen, counters["stats"]["unique_graphs"]]


@pytest.mark.filterwarnings("ignore")  # tracing warns of what torch itself does
def test_a_compiled_run_traces_its_model_once_and_ends_where_the_other_ends(tmp_path: Path) -> None:
    base = build_base(tmp_path / "base")
    fixed, said, graphs = compiled_run(tmp_path / "fixed", base)
    plain, said_plain, graphs_of_plain = compiled_run(tmp_path / "plain", base, fixed_length=False)
    assert "packed rows of one length on" in said
    assert not any("one length" in line for line in said_plain)
    assert graphs[0] > 0
    assert len(set(graphs)) == 1
    assert len(set(graphs_of_plain)) > 1
    assert fixed.tokens == plain.tokens
    assert fixed.eval_loss_before == pytest.approx(plain.eval_loss_before, abs=1e-5)
    assert fixed.eval_loss_after == pytest.approx(plain.eval_loss_after, abs=1e-4)
    weights = [load_file(Path(result.adapter) / "adapter_model.safetensors") for result in (fixed, plain)]
    for key, tensor in weights[1].items():
        assert apart(weights[0][key], tensor) < 1e-3, key


def compiled_recipe(directory: Path, **sections: Any) -> LoadedRecipe:
    training = COMPILED | sections.pop("training", {})
    return small_recipe(directory, directory / "base", training=training, **sections)


def test_what_sees_the_padding_keeps_its_lengths(tmp_path: Path) -> None:
    plain, noisy = compiled_recipe(tmp_path), compiled_recipe(tmp_path, training={"neftune_noise_alpha": 5.0})
    halved = compiled_recipe(tmp_path, health={"on_oom": "halve_batch"})
    llama = built(llama_config())
    assert why_not(llama, plain.recipe) is None
    assert why_not(llama, noisy.recipe) == "training.neftune_noise_alpha depends on the length"
    assert why_not(llama, halved.recipe) == "health.on_oom: halve_batch needs shorter rows"
    llama.config._attn_implementation = "flash_attention_2"
    reason = "attention is flash_attention_2, which is told the bounds of documents"
    assert why_not(llama, plain.recipe) == reason
    linear = built(llama_config())
    linear.config.layer_types = ["full_attention", "linear_attention"]
    assert why_not(linear, plain.recipe) == "the model has layers of linear_attention"
