"""Generated answers: the same in batches as one by one, ended by the stop tokens, and texts the base writes itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, GPT2Config, PreTrainedModel

from lorafit.evaluation import generate
from lorafit.evaluation.generate import answers, own_texts
from lorafit.evaluation.memory import AT_LEAST, generated_tokens, scoring_tokens
from lorafit.tasks.sequences import sequence_losses
from support.tiny import byte_tokenizer, llama_config

CONFIGS: dict[str, Any] = {
    "rotary positions": lambda: llama_config(initializer_range=0.2),
    "learned positions": lambda: GPT2Config(
        vocab_size=264, n_embd=32, n_layer=2, n_head=2, pad_token_id=0, bos_token_id=None, eos_token_id=2,
        initializer_range=0.2,
    ),
}  # fmt: skip
KEYS: dict[str, Any] = {"pad_token_id": 0, "max_new_tokens": 12}


def a_model(kind: str = "rotary positions") -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[kind]()).eval()


def some_prompts(count: int = 9) -> list[list[int]]:
    random = np.random.default_rng(0)
    return [random.integers(3, 264, size=int(random.integers(1, 30))).tolist() for _ in range(count)]


@torch.no_grad()
def one_by_one(model: PreTrainedModel, prompt: list[int], stops: set[int]) -> list[int]:
    """The whole text through the model again for each token: no cache, no padding, no batch."""
    ids = list(prompt)
    while len(ids) < len(prompt) + KEYS["max_new_tokens"]:
        token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token in stops:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("batch_size", [None, 4])
def test_answers_in_batches_are_those_of_each_prompt_alone(kind: str, batch_size: int | None) -> None:
    model, prompts = a_model(kind), some_prompts()
    alone = [one_by_one(model, prompt, {2}) for prompt in prompts]
    assert len({tuple(text) for text in alone}) > 3  # a model that writes one thing would prove nothing
    assert answers(model, prompts, stop_token_ids={2}, batch_size=batch_size, **KEYS) == alone


def test_an_answer_ends_before_the_first_stop_token_of_any_kind() -> None:
    model, prompts = a_model(), some_prompts()
    long = [one_by_one(model, prompt, set()) for prompt in prompts]
    stops = {2, long[0][5], long[3][2]}
    stopped = answers(model, prompts, stop_token_ids=stops, **KEYS)
    assert stopped == [one_by_one(model, prompt, stops) for prompt in prompts]
    assert len(stopped[0]) <= 5 < len(long[0])


def test_what_the_model_says_of_sampling_is_left_aside() -> None:
    model, prompts = a_model(), some_prompts()
    plain = answers(model, prompts, stop_token_ids={2}, **KEYS)
    model.generation_config = GenerationConfig(do_sample=True, temperature=2.0, repetition_penalty=3.0, eos_token_id=9)
    assert answers(model, prompts, stop_token_ids={2}, **KEYS) == plain


def test_prompts_of_one_length_are_answered_together(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = a_model(), some_prompts(12)
    shapes: list[tuple[int, ...]] = []
    written: Any = model.generate

    def generate_and_note(**keys: Any) -> torch.Tensor:
        shapes.append(keys["input_ids"].shape)
        return written(**keys)

    monkeypatch.setattr(model, "generate", generate_and_note)
    answers(model, prompts, stop_token_ids={2}, batch_size=4, **KEYS)
    assert [shape[0] for shape in shapes] == [4, 4, 4]
    assert [shape[1] for shape in shapes] == sorted((shape[1] for shape in shapes), reverse=True)
    assert sum(rows * length for rows, length in shapes) < 12 * max(map(len, prompts))


def test_the_base_writes_the_same_texts_for_one_seed_and_finds_them_likely() -> None:
    model, tokenizer = a_model(), byte_tokenizer()
    state = torch.random.get_rng_state()
    texts = own_texts(model, tokenizer, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert texts["input_ids"][:] == own_texts(model, tokenizer, seed=1)["input_ids"][:]
    assert texts["input_ids"][:] != own_texts(model, tokenizer, seed=2)["input_ids"][:]
    assert {len(ids) for ids in texts["input_ids"]} == {generate.OWN_TOKENS + 1}
    assert all(labels[0] == -100 and labels[1:] == ids[1:] for ids, labels in zip(*texts[:].values(), strict=True))
    torch.manual_seed(5)
    other = AutoModelForCausalLM.from_config(CONFIGS["rotary positions"]()).eval()
    mine, theirs = (sequence_losses(one, texts, pad_token_id=0).loss for one in (model, other))
    assert theirs > mine + 0.5  # less the entropy, this is how far the other model is away


def test_batches_grow_with_the_model_so_that_memory_stays_its_own() -> None:
    with torch.device("meta"):
        large = AutoModelForCausalLM.from_config(
            llama_config(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                         num_key_value_heads=8, vocab_size=128256), dtype=torch.bfloat16,
        )  # fmt: skip
    weights = sum(parameter.numel() * 2 for parameter in large.parameters())
    cache_per_token = 2 * 32 * 8 * 128 * 2
    assert 0.02 * weights < generated_tokens(large) * cache_per_token < 0.04 * weights
    assert 1000 < scoring_tokens(large) < 10_000
    small = a_model()
    assert generated_tokens(small) * 2 * 2 * 2 * 16 * 4 < AT_LEAST  # keys and values x layers x heads x width x bytes


def test_answers_end_where_the_positions_of_the_model_do() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["learned positions"](), attn_implementation="sdpa")
    small = AutoModelForCausalLM.from_config(
        GPT2Config(**{**model.config.to_dict(), "n_positions": 16}), attn_implementation="sdpa"
    ).eval()
    prompts = [[5] * 3, [6] * 12, [7] * 16, [8] * 17]
    found = answers(small, prompts, stop_token_ids={263}, positions=16, batch_size=1, **KEYS)
    assert [len(tokens) for tokens in found] == [12, 5, 1, 0]
    with pytest.raises(IndexError):
        answers(small, prompts[1:2], stop_token_ids={263}, batch_size=1, **KEYS)
