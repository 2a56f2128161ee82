"""What checkpoints cost: the seconds that saving takes, and their share of a run that saves every minute.

    OMP_NUM_THREADS=2 python benchmarks/checkpoints.py [--quick]

Two models on this machine's CPU: the quickstart's, and a Llama of 101 M parameters with a LoRA of rank 64, whose
checkpoints have 140 MB. Both save every few steps; the share is the mean of one saving over 60 seconds. Without
`--quick` the quickstart also trains for four minutes with `checkpoints.every: 60s`, where the share is measured.
"""

import argparse
import json
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from lorafit.recipe import load
from lorafit.training.train import train

QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart"
INTERVAL = 60.0


def large_base(directory: Path) -> Path:
    """101 M parameters with the quickstart's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART / "base")
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=13,
        num_attention_heads=12,
        max_position_embeddings=1024,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def measured(directory: Path, base: Path, *, steps: int, every: int | str, r: int, size: int) -> dict[str, Any]:
    """One run: how often it saved, the seconds that took, and its size on disk."""
    directory.mkdir()
    recipe = {
        "output_dir": str(directory / "run"),
        "model": {"model_name_or_path": str(base)},
        "lora": {"r": r},
        "data": {"train": [{"path": str(QUICKSTART / "train.jsonl")}]},
        "training": {
            "max_length": 256,
            "max_steps": steps,
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": 1,
        },
        "checkpoints": {"every": every},
    }
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    result = train(load(path), cache_dir=directory / "cache")
    run = directory / "run"
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    newest = max((run / "checkpoints").iterdir(), key=lambda place: place.stat().st_mtime)
    return {
        "parameters": sum(module["parameters"] for module in manifest["modules"]),
        "bytes": sum(file.stat().st_size for file in newest.rglob("*") if file.is_file()),
        "count": manifest["checkpoints_saved"],
        "seconds_saving": manifest["seconds_saving"],
        "seconds": result.seconds,
    }


def row(name: str, figures: dict[str, Any], *, is_timed: bool) -> str:
    each = figures["seconds_saving"] / figures["count"]
    share = figures["seconds_saving"] / figures["seconds"] if is_timed else each / INTERVAL
    return (
        f"{name:<26} {figures['parameters']:>12,} {figures['bytes'] / 1e6:>9.1f} MB {figures['count']:>6} "
        f"{each:>8.3f} s {share:>8.2%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps of each; no run of four minutes")
    quick = parser.parse_args().quick
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="lorafit-checkpoints-") as scratch:
        room = Path(scratch)
        print(f"{'model':<26} {'trained':>12} {'checkpoint':>12} {'saved':>6} {'each':>10} {'at 60 s':>8}")
        small = {"r": 16, "size": 8}
        often = measured(room / "small", QUICKSTART / "base", steps=12 if quick else 60, every=3, **small)
        print(row("quickstart, 3.4 M", often, is_timed=False), flush=True)
        large = measured(room / "large", large_base(room / "base"), steps=5 if quick else 13, every=1, r=64, size=2)
        print(row("Llama, 101 M", large, is_timed=False), flush=True)
        if not quick:
            minutes = measured(room / "timed", QUICKSTART / "base", steps=900, every="60s", **small)
            print(row("quickstart, every: 60s", minutes, is_timed=True), flush=True)


if __name__ == "__main__":
    main()
