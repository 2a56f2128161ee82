"""How long `lorafit merge` takes and how much memory, beside peft's merge and a plain copy of the same bytes.

    OMP_NUM_THREADS=2 python benchmarks/merge.py --size 1GB
    OMP_NUM_THREADS=2 python benchmarks/merge.py --size 4GB

Builds a Llama of that size with random bfloat16 weights and a LoRA adapter of rank 16 on all its linear layers, then
runs each way in a process of its own, imports not counted: lorafit's merge (everything up to the synced and renamed
result, without verification), peft's load + merge + save + sync, and a copy of the weights + sync. Each starts with the
base in the file cache and nothing waiting to be written. Wanted: at most 0.6 of peft's time and twice the copy's; at
most 350 MB of anonymous memory besides the adapter, the same at every size. All files are deleted afterwards.

`--verified` also runs `lorafit merge` as a user does, once, with imports and verification, and measures all of its
processes together; of memory that several share each has its share.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import suppress
from pathlib import Path

import psutil

LAYER = 2 * (2 * 2048 * 2048 + 2 * 2048 * 512 + 3 * 2048 * 5632)  # bytes of one layer's linear weights in bfloat16
VOCABULARY = 32_000


def build(directory: Path, nbytes: int) -> None:
    """Base and adapter, written by transformers and peft."""
    import torch
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    layers = max(1, round((nbytes - 2 * 2 * VOCABULARY * 2048) / LAYER))
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    model.save_pretrained(directory / "base")
    empty = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=empty, unk_token="<unk>").save_pretrained(directory / "base")
    model.requires_grad_(False)
    adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.01)
    adapted.save_pretrained(directory / "adapter")


def run_lorafit(directory: Path) -> float:
    """Seconds of `lorafit merge --no-verify`."""
    from lorafit.merging.merge import merge

    return merge(
        directory / "adapter",
        out=directory / "out",
        dtype=None,
        max_shard_size=None,
        base=str(directory / "base"),
        onto="original",
        verify=False,
        progress=lambda total: lambda done: None,
        cache_dir=None,
    ).seconds


def run_peft(directory: Path) -> float:
    """Seconds of peft's load, merge, save and sync."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from transformers.models.llama import modeling_llama  # noqa: F401  (imported before the clock starts)

    warnings.simplefilter("ignore")
    started = time.monotonic()
    model = AutoModelForCausalLM.from_pretrained(directory / "base", dtype="auto")
    PeftModel.from_pretrained(model, directory / "adapter").merge_and_unload().save_pretrained(directory / "out")
    _sync(directory / "out")
    return time.monotonic() - started


def run_copy(directory: Path) -> float:
    """Seconds of a copy of the base's files and sync."""
    started = time.monotonic()
    shutil.copytree(directory / "base", directory / "out")
    _sync(directory / "out")
    return time.monotonic() - started


def _sync(directory: Path) -> None:
    for path in directory.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


WAYS = {"lorafit": run_lorafit, "peft": run_peft, "copy + sync": run_copy}


def measure(way: str, directory: Path) -> dict[str, float]:
    """Seconds and peak anonymous memory of one way, in a process of its own."""
    for path in (directory / "base").glob("*.safetensors"):
        with path.open("rb") as file:
            while file.read(64 << 20):
                pass
    os.sync()
    process = subprocess.Popen(
        [sys.executable, __file__, "--way", way, "--directory", str(directory)], stdout=subprocess.PIPE, text=True
    )
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid))
        time.sleep(0.02)
    assert process.stdout is not None
    output = process.stdout.read()
    if process.returncode:
        sys.exit(f"{way} ended with {process.returncode}")
    shutil.rmtree(directory / "out")
    return {"seconds": json.loads(output.splitlines()[-1]), "peak": peak}


def run_verified(directory: Path) -> str:
    """Seconds of the whole command, and the most anonymous memory of all its processes."""
    command = [sys.executable, "-m", "lorafit", "merge", str(directory / "adapter"), "--quiet", "--base"]
    started, peak = time.monotonic(), 0
    process = psutil.Popen([*command, str(directory / "base"), "--out", str(directory / "out")], stdout=subprocess.PIPE)
    while process.poll() is None:
        with suppress(psutil.NoSuchProcess):
            peak = max(peak, sum(map(share_of_bytes, [process, *process.children(recursive=True)])))
        time.sleep(0.05)
    if process.returncode:
        sys.exit(f"lorafit merge ended with {process.returncode}")
    return f"{time.monotonic() - started:7.2f} s   peak anonymous memory {peak / 1e6:7.0f} MB in all processes"


def share_of_bytes(process: psutil.Process) -> int:
    """Anonymous memory of a process; of what it shares with others its share. 0 when it has ended."""
    try:
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss_Anon")), 0)


def anonymous_bytes(pid: int) -> int:
    """Memory of a process that is no file's; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def main() -> None:
    """Build, measure each way in turn, print the medians and the ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", default="1GB", help="bytes of weights, as in 1GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scratch", default=None, help="directory to build in")
    parser.add_argument("--verified", action="store_true", help="the whole command, too; minutes")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        print(json.dumps(WAYS[arguments.way](arguments.directory)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as name:
        directory = Path(name)
        pid = os.fork()  # so that what building takes is given back before the measuring
        if pid == 0:
            build(directory, int(float(arguments.size.removesuffix("GB")) * 1e9))
            os._exit(0)
        if os.waitpid(pid, 0)[1]:
            sys.exit("the model could not be built")
        size = sum(path.stat().st_size for path in (directory / "base").glob("*.safetensors"))
        adapter = (directory / "adapter/adapter_model.safetensors").stat().st_size
        rounds: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(arguments.rounds):
            for way in WAYS:
                rounds[way].append(measure(way, directory))
        verified = run_verified(directory) if arguments.verified else None
    seconds = {way: statistics.median(one["seconds"] for one in found) for way, found in rounds.items()}
    peak = {way: max(one["peak"] for one in found) for way, found in rounds.items()}
    print(f"base {size / 1e9:.2f} GB, adapter {adapter / 1e6:.0f} MB, median of {arguments.rounds}")
    for way, found in rounds.items():
        each = ", ".join(f"{one['seconds']:.2f}" for one in found)
        print(f"{way:<12} {seconds[way]:7.2f} s ({each})   peak anonymous memory {peak[way] / 1e6:7.0f} MB")
    print(f"lorafit / peft        {seconds['lorafit'] / seconds['peft']:.2f}   (wanted: at most 0.60)")
    print(f"lorafit / copy + sync {seconds['lorafit'] / seconds['copy + sync']:.2f}   (wanted: at most 2.00)")
    if verified is not None:
        print(f"lorafit merge {verified}")
    print(f"memory besides the adapter {(peak['lorafit'] - adapter) / 1e6:.0f} MB   (wanted: at most 350)")


if __name__ == "__main__":
    main()
