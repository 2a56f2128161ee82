"""Predicted beside measured memory and time of real training steps on one GPU.

    python benchmarks/plan_vs_gpu.py [--shape llama3-8b] [--budget 420]     # needs a GPU, offline
    python benchmarks/plan_vs_gpu.py --tiny                                  # the same path on the CPU, tiny

Random weights of the shape, three steps of each case, the last one measured with `max_memory_allocated`; each case in a
process of its own. The claim: within 5 %, and never more than 5 % low; time within 20 %. Ends with 1 when it is broken.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import LlamaConfig, PreTrainedConfig

from lorafit import launch
from lorafit.planning.depth import whole_step
from lorafit.planning.fake_step import Batch, FakeRun, Rows
from lorafit.planning.gpus import Gpu, device_of
from lorafit.planning.known_shapes import architecture
from lorafit.planning.real_step import Measurement, RealRun
from lorafit.planning.roofline import duration
from lorafit.preflight import this_machine
from lorafit.recipe import load
from lorafit.recipe.sections import ModelSection

ALLOWED, ALLOWED_TIME = 0.05, 0.20
TINY = LlamaConfig(
    vocab_size=264, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=4096, dtype="bfloat16",
)  # fmt: skip
KINDS = {
    "lora": (),
    "peft's lora": ("speed.fused_lora=false",),
    "qlora": ("quantization.load_in_4bit=true",),
    "dora": ("lora.use_dora=true",),
}


@dataclass(frozen=True)
class Case:
    """One step."""

    kind: str
    checkpointing: bool
    rows: Rows
    size: int
    length: int
    r: int = 16

    def __str__(self) -> str:
        how = "recomputed" if self.checkpointing else "kept"
        return f"{self.kind} r {self.r}, {how}, {self.size} x {self.length:,} {self.rows}"


@dataclass(frozen=True)
class Prediction:
    """Of one case."""

    allocated: int
    reserved: int
    seconds: float | None


# What differs most comes first: a budget may end before the list does.
CASES = (
    Case("lora", True, "full", 1, 2048),
    Case("qlora", True, "full", 1, 2048),
    Case("dora", True, "full", 1, 2048),
    Case("lora", False, "full", 1, 2048),
    Case("lora", True, "packed", 4, 2048),
    Case("lora", True, "padded", 4, 2048),
    Case("qlora", False, "full", 2, 2048),
    Case("lora", True, "full", 1, 16384),
    Case("peft's lora", False, "full", 1, 2048),
    Case("lora", False, "padded", 8, 512),
    Case("lora", True, "full", 1, 2048, r=256),
    Case("dora", False, "full", 1, 2048),
    Case("qlora", True, "full", 1, 8192),
    Case("qlora", True, "padded", 8, 512, r=64),
    Case("lora", False, "full", 1, 4096),
    Case("lora", False, "packed", 2, 2048),
    Case("peft's lora", True, "full", 4, 2048),
    Case("dora", True, "full", 4, 2048, r=64),
    Case("lora", True, "full", 8, 512, r=1),
    Case("qlora", True, "full", 1, 16384),
    Case("lora", True, "padded", 2, 8192),
    Case("qlora", False, "full", 1, 512),
)


def predicted(case: Case, config: PreTrainedConfig, gpu: Gpu | None) -> Prediction:
    """From fake tensors; as the CPU does it where there is no GPU."""
    run = _built(FakeRun, case, config, on_cuda=gpu is not None, device="cpu")
    step = whole_step(run, Batch(case.rows, case.size, case.length), eval_batch=None, passes=1, replay=True)
    is_timed = gpu is not None and gpu.bf16_tflops is not None
    seconds = sum(duration(work, gpu).seconds for work in step.work.values()) if gpu and is_timed else None
    return Prediction(step.peak.total, step.reserved, seconds)


def measured(case: Case, config: PreTrainedConfig, gpu: Gpu | None) -> Measurement:
    """From real ones."""
    run = _built(RealRun, case, config, on_cuda=gpu is not None, device="cpu" if gpu is None else "cuda")
    return run.measure(Batch(case.rows, case.size, case.length))


def _built(kind: type[Any], case: Case, config: PreTrainedConfig, *, on_cuda: bool, device: str) -> Any:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "case.yaml")
        path.write_text("model: {model_name_or_path: x}\ndata: {train: [{path: rows.jsonl}]}\n", encoding="utf-8")
        packing = f"training.packing={'true' if case.rows == 'packed' else 'false'}"
        loaded = load(path, overrides=[f"lora.r={case.r}", packing, *KINDS[case.kind]])
    return kind(loaded, config=config, bf16=True, checkpointing=case.checkpointing, on_cuda=on_cuda, device=device)


def apart(what: Callable[..., Any], *arguments: Any) -> Any:
    """In a process forked from this one, whose memory on the GPU ends with it; its error as text."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def work() -> None:
        warnings.filterwarnings("ignore")
        torch.manual_seed(0)
        try:
            sender.send(what(*arguments))
        except Exception as error:  # said in the table, and the others go on
            sender.send(f"{type(error).__name__}: {str(error).splitlines()[0][:90]}")

    process = context.Process(target=work)
    process.start()
    sender.close()
    try:
        answer = receiver.recv()
    except EOFError:
        answer = "it was killed"
    process.join()
    return answer


def main() -> int:
    """The table; 1 when the claim is broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="llama3-8b", help="a shipped shape")
    parser.add_argument("--budget", type=float, default=420, help="seconds after which no case is begun")
    parser.add_argument("--tiny", action="store_true", help="on the CPU")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    launch.use_expandable_segments()  # as every command of lorafit
    datasets.disable_progress_bars()
    # Asked in a process of its own: this one must not touch the GPU before it forks.
    gpu = None if chosen.tiny else apart(lambda: device_of(this_machine()))
    if isinstance(gpu, str):
        print(gpu, file=sys.stderr)
        return 4
    config = TINY if chosen.tiny else architecture(ModelSection(model_name_or_path=chosen.shape))
    cases = CASES[:6] if chosen.tiny else CASES
    print(f"{'tiny' if chosen.tiny else chosen.shape} on {gpu.name if gpu else 'the CPU'}, torch {torch.__version__}")
    print(f"{'case':<44} {'allocated GiB':>26} {'reserved GiB':>18} {'seconds':>16}")
    started, errors, times, failed = time.monotonic(), [], [], 0
    for case in cases:
        if time.monotonic() - started > chosen.budget:
            print("the time is over")
            break
        if chosen.tiny:
            case = Case(case.kind, case.checkpointing, case.rows, case.size, 256, case.r)
        said = apart(predicted, case, config, gpu)
        if isinstance(said, Prediction) and gpu and said.allocated > 0.97 * gpu.memory_bytes:
            print(f"{case!s:<44} {said.allocated / 2**30:>8.2f}, more than it has")
            continue
        seen = apart(measured, case, config, gpu)
        if isinstance(said, str) or isinstance(seen, str):
            failed += 1
            print(f"{case!s:<44} predicted {said}, measured {seen}", flush=True)
            continue
        errors.append(said.allocated / seen.allocated - 1)
        line = f"{case!s:<44} {said.allocated / 2**30:>8.3f} {seen.allocated / 2**30:>8.3f} {errors[-1]:>+8.2%}"
        if seen.reserved:
            line += f" {said.reserved / 2**30:>9.3f} {seen.reserved / 2**30:>8.3f}"
        if seen.seconds and said.seconds:
            times.append(said.seconds / seen.seconds - 1)
            line += f" {said.seconds:>6.3f} {seen.seconds:>6.3f} {times[-1]:>+5.0%}"
        print(line, flush=True)
    if errors:
        print(f"{len(errors)} cases: memory {min(errors):+.2%} to {max(errors):+.2%}; allowed {ALLOWED:.0%} either way")
    if times:
        print(f"time {min(times):+.0%} to {max(times):+.0%}; allowed {ALLOWED_TIME:.0%} either way")
    is_off = any(abs(error) > ALLOWED for error in errors) or any(abs(error) > ALLOWED_TIME for error in times)
    return int(bool(failed) or not errors or is_off)


if __name__ == "__main__":
    sys.exit(main())
