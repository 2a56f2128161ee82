"""Rows per second of SFTTrainer's own preparation and of lorafit's, on the same rows, with identical labels.

    python benchmarks/data_preparation.py [--data FILE] [--model DIRECTORY] [--repeats 3]

Both run in one process with a cold cache; the best of the repeats counts. SFTTrainer gets the rows as prompt and
completion messages, lorafit reads, checks and audits the file itself. The ratio lorafit promises is 2.5.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from lorafit.data.prepare import prepare
from lorafit.recipe.sections import DataSection, Source

QUICKSTART = Path(__file__).parents[1] / "recipes/quickstart"
PROMISED_RATIO = 2.5
MAX_LENGTH = 4096


def trl_preparation(
    tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]], model: Path, folder: str
) -> tuple[float, datasets.Dataset]:
    """Seconds and result of the preparation SFTTrainer runs when it is made, on rows it has not seen."""
    config = AutoConfig.from_pretrained(model)
    for size in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
        setattr(config, size, 1)
    config.hidden_size, config.head_dim, config.intermediate_size = 8, 8, 8
    arguments = SFTConfig(
        output_dir=folder,
        max_length=MAX_LENGTH,
        completion_only_loss=True,
        shuffle_dataset=False,
        use_cpu=True,
        report_to=[],
    )
    few = datasets.Dataset.from_list(rows[:2])
    model = AutoModelForCausalLM.from_config(config)
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=few, processing_class=tokenizer)
    # From memory, so there is no file whose cached result could be taken up.
    table = datasets.Dataset.from_list(rows)
    start = time.perf_counter()
    prepared = trainer._prepare_dataset(table, tokenizer, arguments, False, None, "train")
    return time.perf_counter() - start, prepared


def own_arguments(tokenizer: PreTrainedTokenizerBase, data: Path) -> dict[str, Any]:
    """What `prepare` is called with, but for the cache."""
    prompt, completion = column_names(data)
    columns = {"prompt": prompt, "completion": completion}
    section = DataSection(train=(Source(path=str(data), format="prompt_completion", columns=columns),))
    return {
        "section": section,
        "task": "causal_lm",
        "tokenizer": tokenizer,
        "max_length": MAX_LENGTH,
        "seed": 0,
        "stop_token_ids": frozenset({tokenizer.eos_token_id}),
        "vocab_size": len(tokenizer),
    }


def own_preparation(tokenizer: PreTrainedTokenizerBase, data: Path) -> tuple[float, datasets.Dataset]:
    """Seconds and result of reading, checking, auditing and tokenising the same rows."""
    arguments = own_arguments(tokenizer, data)
    with tempfile.TemporaryDirectory() as cache:
        start = time.perf_counter()
        prepared = prepare(**arguments, cache_dir=Path(cache))
        return time.perf_counter() - start, prepared.train


def column_names(data: Path) -> tuple[str, str]:
    """What the file calls prompt and completion."""
    with data.open(encoding="utf-8") as lines:
        return ("prompt", "completion") if "prompt" in json.loads(next(lines)) else ("question", "answer")


def trl_rows(data: Path) -> list[dict[str, Any]]:
    """The rows as prompt and completion messages."""
    prompt, completion = column_names(data)
    with data.open(encoding="utf-8") as lines:
        return [
            {
                "prompt": [{"role": "user", "content": row[prompt]}],
                "completion": [{"role": "assistant", "content": row[completion]}],
            }
            for row in map(json.loads, lines)
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=QUICKSTART / "train.jsonl")
    parser.add_argument("--model", type=Path, default=QUICKSTART / "base", help="directory with the tokenizer")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    rows = trl_rows(arguments.data)
    theirs, ours = [], []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(arguments.repeats):
            ours.append(own_preparation(tokenizer, arguments.data))
            theirs.append(trl_preparation(tokenizer, rows, arguments.model, folder))
    are_identical = all(list(theirs[0][1][column]) == list(ours[0][1][column]) for column in ("input_ids", "labels"))
    trl_rate, own_rate = (len(rows) / min(seconds for seconds, _ in runs) for runs in (theirs, ours))
    print(f"{len(rows):,} rows of {arguments.data.name}, one process, cold cache, best of {arguments.repeats}")
    print(f"SFTTrainer {trl_rate:8,.0f} rows/s")
    print(f"lorafit    {own_rate:8,.0f} rows/s   {own_rate / trl_rate:.2f} times (promised {PROMISED_RATIO})")
    print(f"tokens and labels {'identical' if are_identical else 'DIFFER'}")
    sys.exit(0 if are_identical and own_rate >= PROMISED_RATIO * trl_rate else 1)


if __name__ == "__main__":
    main()
