"""How often an evaluation calls models different that are not: 200 trials with adapters that change nothing.

Each trial draws an adapter with a tiny random B and sequences that the base wrote itself. On those the mean difference
of the losses is KL(base ‖ adapter), the square of a tiny number, while that of each sequence is the tiny number itself:
whatever is flagged is flagged by chance. Adapters of exactly zero are tried too.

Run: `python benchmarks/eval_calibration.py [--quick]`.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import datasets
import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedModel

from lorafit.evaluation.eval_result import LEVEL, comparison
from lorafit.evaluation.eval_rows import Rows
from lorafit.evaluation.intervals import paired_difference
from lorafit.tasks.causal_lm import scores as scores_of
from lorafit.tasks.sequences import SequenceLosses, sequence_losses

VOCABULARY, LENGTH = 64, 24
TINY = 3e-4
"""Size of B whose KL is too small to be found in 400 sequences."""


@dataclass(frozen=True)
class Flagged:
    """Shares of the trials."""

    loss: float
    """Whose adapter an evaluation calls better or worse than the base, by its loss."""
    token_accuracy: float
    outside_99: float
    """Whose 99 % interval of the loss leaves out zero, however small the difference: 1 % if the interval is right."""
    outside_95: float
    """The same at 95 %: 5 % if it is right."""


def flagged(trials: int, *, sequences: int, size: float, seed: int = 0) -> Flagged:
    """Of `trials` adapters whose B is `size` times random, each on `sequences` other texts of the base."""
    torch.manual_seed(seed)
    model = _adapted()
    with model.disable_adapter():
        pool = _texts(model, count=max(2000, 10 * sequences))
        base = sequence_losses(model, pool, pad_token_id=0, batch_tokens=2**15)
    random = np.random.default_rng(seed)
    found = []
    for _ in range(trials):
        _draw(model, size=size)
        chosen = random.choice(len(pool), size=sequences, replace=False)
        texts = pool.select(chosen)
        of_base = SequenceLosses(base.nll[chosen], base.tokens[chosen], base.correct[chosen])
        adapter = sequence_losses(model, texts, pad_token_id=0, batch_tokens=2**15)
        rows = Rows(texts, ("",) * sequences, np.full(sequences, LENGTH), (), ())
        scores = {name: scores_of(one, rows.text_bytes) for name, one in (("base", of_base), ("adapter", adapter))}
        differences = comparison("", scores).difference
        intervals = [paired_difference(of_base, adapter, level=level, resamples=4000) for level in (0.99, 0.95)]
        found.append(
            [
                differences["loss"].verdict != "no difference",
                differences["token_accuracy"].verdict != "no difference",
                *(not interval.low <= 0 <= interval.high for interval in intervals),
            ]
        )
    return Flagged(*np.mean(found, axis=0).tolist())


def _adapted() -> PeftModel:
    """A tiny model with opinions (wide random weights), and an adapter on all of it."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.3, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_config(config).eval()
    return get_peft_model(base, LoraConfig(r=4, target_modules="all-linear")).eval()


@torch.no_grad()
def _texts(model: PeftModel, *, count: int) -> datasets.Dataset:
    base = model.get_base_model()
    assert isinstance(base, PreTrainedModel)
    base.generation_config = GenerationConfig(do_sample=True, top_k=0, pad_token_id=0)
    first = torch.ones(count, 1, dtype=torch.long)
    ids = model.generate(input_ids=first, attention_mask=torch.ones_like(first), max_new_tokens=LENGTH).tolist()
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": [[-100, *row[1:]] for row in ids]})


@torch.no_grad()
def _draw(model: PeftModel, *, size: float) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.copy_(size * torch.randn_like(parameter))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="20 trials instead of 200")
    trials = 20 if parser.parse_args().quick else 200
    print(f"{trials} trials a line; verdicts at {LEVEL:.0%} confidence, as in `lorafit eval`")
    print(f"{'B':>8} {'sequences':>10} {'loss flagged':>13} {'accuracy flagged':>17} {'outside 99 %':>13} {'95 %':>6}")
    for size, sequences in ((0.0, 100), (TINY, 30), (TINY, 100), (TINY, 400), (0.3, 100)):
        found = flagged(trials, sequences=sequences, size=size)
        note = "   (an adapter that does change the model)" if size > TINY else ""
        shares = f"{found.loss:>13.1%} {found.token_accuracy:>17.1%} {found.outside_99:>13.1%} {found.outside_95:>6.1%}"
        print(f"{size:>8g} {sequences:>10} {shares}{note}", flush=True)


if __name__ == "__main__":
    main()
