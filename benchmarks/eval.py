"""Memory of an evaluation of three models, and its speed beside plain transformers loops.

Memory: base, adapter and merged model of `--million` parameters in float32, held-out losses, generated answers and the
base's own text, in one process; what it took beyond the imports, in models. Speed: the same rows and prompts through
loops as one writes them (batches of eight in the order of the rows; right padding and whole logits for losses, left
padding for answers), and one at a time; alternating, the median of three rounds.

Run on a quiet machine: `OMP_NUM_THREADS=2 python benchmarks/eval.py [--quick]`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from lorafit.evaluation.evaluate import evaluate
from lorafit.evaluation.generate import answers
from lorafit.evaluation.memory import scoring_tokens
from lorafit.lines import heard
from lorafit.merging.merge import merge
from lorafit.tasks.sequences import sequence_losses

PAD, STOP = 0, 2
ROUNDS = 3
CHAT = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<s>{% endif %}{% endfor %}"


def config(width: int, layers: int) -> LlamaConfig:
    """About 12 x layers x width² parameters, and 32,000 words."""
    return LlamaConfig(
        vocab_size=32_000, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=STOP, pad_token_id=PAD,
    )  # fmt: skip


def write_model(directory: Path, *, million: int) -> tuple[Path, Path]:
    """A base with random weights, and an adapter on it that changes something."""
    layers = max(2, (million - 33) * 10**6 // (16 * 1024**2))
    base = AutoModelForCausalLM.from_config(config(1024, layers))
    base.save_pretrained(directory / "base")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(
        tokenizer_models.BPE(vocab={t: i for i, t in enumerate(("<p>", "<b>", "<s>", *alphabet))}, merges=[])
    )
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<p>", eos_token="<s>")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(directory / "base")
    adapted = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(directory / "adapter", save_embedding_layers=False)
    return directory / "base", directory / "adapter"


def write_rows(path: Path, count: int) -> Path:
    """Prompts of 20 to 400 bytes, answers of 20 to 100."""
    numbers = random.Random(0)
    rows = [
        {"prompt": "q" * numbers.randint(20, 400), "completion": "a" * numbers.randint(20, 100)} for _ in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _memory() -> dict[str, int]:
    lines = (line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(value.split()[0]) * 1024 for name, value in lines if name in ("VmRSS", "VmHWM")}


def _evaluate(base: Path, adapter: Path, merged: Path, rows: Path, generate: str, sent: object) -> None:
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _memory()["VmRSS"]
    peaks: list[int] = []

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)
        if line == "adapter: measuring":
            peaks.append(_memory()["VmHWM"] - before)

    with heard(say):
        evaluate(str(adapter), base=str(base), merged=merged, data=rows, overrides=[generate], cache_dir=None)
    sent.send((*peaks, _memory()["VmHWM"] - before))  # type: ignore[attr-defined]


def memory(directory: Path, *, million: int, rows: int) -> None:
    """Print what an evaluation of three models takes."""
    base, adapter = write_model(directory, million=million)
    merged = directory / "merged"
    merge(
        adapter, out=merged, dtype=None, max_shard_size=None, base=str(base), onto=None, verify=False,
        progress=lambda total: lambda done: None, cache_dir=None,
    )  # fmt: skip
    weights = (base / "model.safetensors").stat().st_size
    receiver, sender = multiprocessing.Pipe(duplex=False)
    job = (
        base,
        adapter,
        merged,
        write_rows(directory / "rows.jsonl", rows),
        "eval.generate={max_new_tokens: 16}",
        sender,
    )
    process = multiprocessing.get_context("spawn").Process(target=_evaluate, args=job)
    process.start()
    process.join()
    alone, peak = receiver.recv()
    print(
        f"model {weights / 2**20:,.0f} MiB; peak beside imports: base alone {alone / 2**20:,.0f} MiB, base, adapter "
        f"and merged model {peak / 2**20:,.0f} MiB = {peak / alone:.3f} of that, {peak / weights:.3f} models"
    )


def speed(*, rows: int, new_tokens: int) -> None:
    """Print sequences per second of losses and answers, three ways."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(256, 6)).eval()
    numbers = random.Random(0)
    ids = [[numbers.randrange(3, 32_000) for _ in range(numbers.randint(20, 300))] for _ in range(rows)]
    table = datasets.Dataset.from_dict(
        {"input_ids": ids, "labels": [[-100] * (len(row) // 2) + row[len(row) // 2 :] for row in ids]}
    )
    tokens = scoring_tokens(model)
    print(f"{rows} sequences, {sum(map(len, ids)):,} tokens, {torch.get_num_threads()} threads; sequences per second")
    ours = lambda: sequence_losses(model, table, pad_token_id=PAD, batch_tokens=tokens)  # noqa: E731
    _report(
        "losses",
        rows,
        {"lorafit": ours, "by eight": lambda: _losses(model, table, 8), "one by one": lambda: _losses(model, table, 1)},
    )
    settings = {"stop_token_ids": {STOP}, "pad_token_id": PAD, "max_new_tokens": new_tokens}
    _report(
        f"answers of {new_tokens} tokens",
        rows,
        {
            "lorafit": lambda: answers(model, ids, **settings),  # type: ignore[arg-type]
            "by eight": lambda: _answers(model, ids, 8, new_tokens),
            "one by one": lambda: _answers(model, ids, 1, new_tokens),
        },
    )


def _report(what: str, rows: int, ways: dict[str, Callable[[], object]]) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(ROUNDS + 1):
        for name, way in ways.items():
            started = time.monotonic()
            way()
            if round_ > 0:  # the first pass of each pays for the caches of torch
                seconds[name].append(time.monotonic() - started)
    rates = {name: rows / statistics.median(taken) for name, taken in seconds.items()}
    print(f"{what:24} " + "   ".join(f"{name} {rate:8.2f}" for name, rate in rates.items()))


@torch.no_grad()
def _losses(model: PreTrainedModel, table: datasets.Dataset, size: int) -> float:
    total = 0.0
    for start in range(0, len(table), size):
        some = table[start : start + size]
        longest = max(map(len, some["input_ids"]))
        padded = {
            key: [row + [filler] * (longest - len(row)) for row in some[key]]
            for key, filler in (("input_ids", PAD), ("labels", -100))
        }
        ids, labels = torch.tensor(padded["input_ids"]), torch.tensor(padded["labels"])
        logits = model(input_ids=ids, attention_mask=(ids != PAD).long()).logits[:, :-1]
        total += float(
            nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum")
        )
    return total


@torch.no_grad()
def _answers(model: PreTrainedModel, prompts: Sequence[Sequence[int]], size: int, new_tokens: int) -> None:
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=STOP, pad_token_id=PAD)
    for start in range(0, len(prompts), size):
        some = prompts[start : start + size]
        longest = max(map(len, some))
        ids = torch.tensor([[PAD] * (longest - len(row)) + list(row) for row in some])
        model.generate(input_ids=ids, attention_mask=(ids != PAD).long(), max_new_tokens=new_tokens)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rows; the memory is the same")
    parser.add_argument("--million", type=int, default=350, help="parameters of the model whose memory is measured")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lorafit-") as work:
        memory(Path(work), million=options.million, rows=8 if options.quick else 32)
    speed(rows=16 if options.quick else 128, new_tokens=16 if options.quick else 64)


if __name__ == "__main__":
    main()
