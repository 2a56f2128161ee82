"""Text that a model writes: greedy answers to prompts in batches, and samples of what it writes unasked."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import datasets
import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lorafit.builders.adapter import base_of
from lorafit.data.tokens import NOT_TRAINED
from lorafit.evaluation.eval_rows import before_stop
from lorafit.evaluation.memory import generated_tokens, scoring_tokens
from lorafit.pulse import Counted, uncounted
from lorafit.tasks.sequences import batches_by_length

OWN_TEXTS, OWN_TOKENS = 64, 32
"""What a model writes unasked: 2,048 tokens, enough to tell a divergence of some hundredths of a nat."""


@torch.no_grad()
def answers(
    model: PreTrainedModel | PeftModel,
    prompts: Sequence[Sequence[int]],
    *,
    stop_token_ids: Collection[int],
    pad_token_id: int,
    max_new_tokens: int,
    positions: int | None = None,
    batch_size: int | None = None,
    counted: Counted = uncounted,
) -> list[list[int]]:
    """What the model writes after each prompt, choosing the likeliest token, up to a stop token (left out).

    Prompts of about one length are answered together, padded on the left, so that all continue at the same place;
    positions are counted without the padding. Where the model ends at so many `positions`, answers end there, too.
    """
    inner: Any = base_of(model)  # no class of transformers says that it generates
    inner.generation_config = GenerationConfig(  # the model's own may sample, or punish repetition
        do_sample=False, eos_token_id=sorted(stop_token_ids), pad_token_id=pad_token_id
    )
    device = next(inner.parameters()).device
    found: list[list[int]] = [[] for _ in prompts]
    for batch in _batches(inner, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size):
        longest = max(len(prompts[row]) for row in batch)
        room = max_new_tokens if positions is None else min(max_new_tokens, positions - longest + 1)
        if room < 1:
            counted(len(batch))
            continue
        padding = [longest - len(prompts[row]) for row in batch]
        ids = [[pad_token_id] * empty + list(prompts[row]) for row, empty in zip(batch, padding, strict=True)]
        mask = [[0] * empty + [1] * (longest - empty) for empty in padding]
        written = inner.generate(
            input_ids=torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            max_new_tokens=room,
        )
        for row, tokens in zip(batch, written[:, longest:].tolist(), strict=True):
            found[row] = before_stop(tokens, stop_token_ids)
        counted(len(batch))
    return found


def _batches(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, batch_size: int | None
) -> Iterator[list[int]]:
    if batch_size is None:
        cached, read = generated_tokens(model), scoring_tokens(model)
        # Two limits in one: the cache of the whole text, and the activations of a prompt that is read at once.
        sizes = [max(len(prompt) + max_new_tokens, len(prompt) * cached // read) for prompt in prompts]
        yield from batches_by_length(sizes, batch_tokens=cached)
        return
    by_length = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    for start in range(0, len(by_length), batch_size):
        yield by_length[start : start + batch_size]


@torch.no_grad()
def own_texts(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> datasets.Dataset:
    """Sequences that the model writes unasked, drawn from its own distribution, all but the first token trained.

    Nothing ends them: what follows an end of text is a text again. The loss of another model on them, less that of this
    one, is KL(this ‖ other) per token in the mean.
    """
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    writer: Any = model  # no class of transformers says that it generates
    writer.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=start)
    device = next(model.parameters()).device
    at_once = max(1, generated_tokens(base_of(model)) // OWN_TOKENS)
    rows: list[list[int]] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        while len(rows) < OWN_TEXTS:
            first = torch.full((min(at_once, OWN_TEXTS - len(rows)), 1), start, device=device)
            rows += writer.generate(
                input_ids=first, attention_mask=torch.ones_like(first), max_new_tokens=OWN_TOKENS
            ).tolist()
    return datasets.Dataset.from_dict({"input_ids": rows, "labels": [[NOT_TRAINED, *row[1:]] for row in rows]})
