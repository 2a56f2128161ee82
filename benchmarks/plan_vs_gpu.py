"""Predicted beside measured memory and time of real training steps on one GPU.

    python benchmarks/plan_vs_gpu.py [--shape llama3-8b] [--budget 420] [--out FILE.json]     # needs a GPU, offline
    python benchmarks/plan_vs_gpu.py --tiny                                  # the same path on the CPU, tiny

Random weights of the shape, three steps of each case, the last one measured with `max_memory_allocated`. Every
prediction and every measurement is a process of its own, started anew: its memory on the GPU ends with it, and this
one, which only reads what they say, imports nothing that might touch the GPU. The claim: within 5 %, and never more
than 5 % low; time within 20 %. Ends with 1 when it is broken.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from made_with import made_with
from own_process import NoAnswer, end_by_exception, output_of
from transformers import LlamaConfig, PreTrainedConfig

from lorafit.planning.known_shapes import architecture
from lorafit.recipe.sections import ModelSection

if TYPE_CHECKING:
    from lorafit.planning.fake_step import Rows
    from lorafit.planning.gpus import Gpu
    from lorafit.planning.plan_result import Measurement

ALLOWED, ALLOWED_TIME = 0.05, 0.20
LONGEST_SECONDS = 120
"""Of one process: imports, a model of random weights, three steps."""
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


def architecture_of(shape: str) -> PreTrainedConfig:
    """Of a shipped shape, or of `tiny`."""
    return TINY if shape == "tiny" else architecture(ModelSection(model_name_or_path=shape))


def predicted(case: Case, config: PreTrainedConfig, gpu: Gpu | None) -> Prediction:
    """From fake tensors; as the CPU does it where there is no GPU."""
    from lorafit.planning.extrapolate_layers import whole_step
    from lorafit.planning.fake_step import Batch, FakeRun
    from lorafit.planning.roofline import duration

    run = _built(FakeRun, case, config, on_cuda=gpu is not None, device="cpu")
    step = whole_step(run, Batch(case.rows, case.size, case.length), eval_batch=None, passes=1, replay=True)
    is_timed = gpu is not None and gpu.bf16_tflops is not None
    seconds = sum(duration(work, gpu).seconds for work in step.work.values()) if gpu and is_timed else None
    return Prediction(step.peak.total, step.reserved, seconds)


def measured(case: Case, config: PreTrainedConfig, gpu: Gpu | None) -> Measurement:
    """From real ones, on the GPU that is named."""
    from lorafit.planning.fake_step import Batch
    from lorafit.planning.real_step import RealRun

    run = _built(RealRun, case, config, on_cuda=gpu is not None, device="cpu" if gpu is None else "cuda")
    return run.measure(Batch(case.rows, case.size, case.length))


def _built(kind: type[Any], case: Case, config: PreTrainedConfig, *, on_cuda: bool, device: str) -> Any:
    from lorafit.recipe import load

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "case.yaml")
        path.write_text("model: {model_name_or_path: x}\ndata: {train: [{path: rows.jsonl}]}\n", encoding="utf-8")
        packing = f"training.packing={'true' if case.rows == 'packed' else 'false'}"
        loaded = load(path, overrides=[f"lora.r={case.r}", packing, *KINDS[case.kind]])
    return kind(
        loaded,
        config=copy.deepcopy(config),
        bf16=True,
        checkpointing=case.checkpointing,
        on_cuda=on_cuda,
        device=device,
    )


def answer_of(what: str, *, shape: str, case: Case | None, gpu: dict[str, Any] | None) -> Any:
    """What the process that was started for it finds: the GPU here, a prediction, or a measurement."""
    warnings.filterwarnings("ignore")
    from lorafit.launching import launch

    launch.use_expandable_segments()  # as every command of lorafit
    import datasets
    import torch

    from lorafit.planning.gpus import Gpu, device_of
    from lorafit.preflight import this_machine

    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if what == "device" or case is None:
        return asdict(device_of(this_machine()))
    config = architecture_of(shape)
    return asdict((predicted if what == "predicted" else measured)(case, config, Gpu(**gpu) if gpu else None))


def apart(
    what: str,
    *,
    shape: str = "tiny",
    case: Case | None = None,
    gpu: dict[str, Any] | None = None,
    seconds: float = LONGEST_SECONDS,
) -> dict[str, Any]:
    """`answer_of` in a process of its own; `error` says in one line why there is no answer."""
    question = {"what": what, "shape": shape, "case": case and asdict(case), "gpu": gpu}
    # A prediction needs no GPU, and must leave it alone.
    environment = {"CUDA_VISIBLE_DEVICES": ""} if what == "predicted" else {}
    command = [sys.executable, __file__, "--answer", json.dumps(question)]
    try:
        printed = output_of(command, environment=environment, seconds=min(seconds, LONGEST_SECONDS))
    except NoAnswer as reason:
        return {"error": str(reason)}
    answer: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return answer


def rows(cases: tuple[Case, ...], *, shape: str, gpu: dict[str, Any] | None, budget: float) -> Iterator[dict[str, Any]]:
    """Each case as soon as it is known; one that the end of the time cuts off is left out."""
    ends = time.monotonic() + budget
    for case in cases:
        said = apart("predicted", shape=shape, case=case, gpu=gpu, seconds=ends - time.monotonic())
        row: dict[str, Any] = {"case": str(case), "predicted": said}
        if gpu and said.get("allocated", 0) > 0.97 * gpu["memory_bytes"]:
            yield row
            continue
        row["measured"] = seen = apart("measured", shape=shape, case=case, gpu=gpu, seconds=ends - time.monotonic())
        if time.monotonic() > ends:
            print("the time is over")
            return
        if "error" not in said | seen:
            row["memory_off"] = said["allocated"] / seen["allocated"] - 1
            row["time_off"] = said["seconds"] / seen["seconds"] - 1 if said["seconds"] and seen["seconds"] else None
        yield row


def line(row: dict[str, Any]) -> str:
    """One case of the table."""
    said, seen = row["predicted"], row.get("measured")
    if seen is None:
        return f"{row['case']:<44} {said['allocated'] / 2**30:>8.2f}, more than it has"
    if "memory_off" not in row:
        return f"{row['case']:<44} predicted {said.get('error', 'ok')}, measured {seen.get('error', 'ok')}"
    text = f"{row['case']:<44} {said['allocated'] / 2**30:>8.3f} {seen['allocated'] / 2**30:>8.3f}"
    text += f" {row['memory_off']:>+8.2%}"
    if seen["reserved"]:
        text += f" {said['reserved'] / 2**30:>9.3f} {seen['reserved'] / 2**30:>8.3f}"
    if row["time_off"] is not None:
        text += f" {said['seconds']:>6.3f} {seen['seconds']:>6.3f} {row['time_off']:>+5.0%}"
    return text


def main() -> int:
    """The table; 1 when the claim is broken, 4 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama3-8b", help="a shipped shape")
    parser.add_argument("--budget", type=float, default=420, help="seconds after which nothing goes on")
    parser.add_argument("--tiny", action="store_true", help="on the CPU")
    parser.add_argument("--out", type=Path, help="write the results here, as they come")
    parser.add_argument("--answer", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.answer:
        question = json.loads(chosen.answer)
        question["case"] = question["case"] and Case(**question["case"])
        print("\n" + json.dumps(answer_of(**question)))
        return 0
    end_by_exception()
    gpu = apart("device")
    if "error" in gpu or (gpu["is_cpu"] and not chosen.tiny):
        print(gpu.get("error", "there is no GPU here; --tiny runs the same on the CPU"), file=sys.stderr)
        return 4
    device, on = gpu["name"], None if chosen.tiny else gpu
    shape = "tiny" if chosen.tiny else chosen.shape
    cases = tuple(replace(case, length=256) for case in CASES[:6]) if chosen.tiny else CASES
    print(f"{shape} on {'the CPU' if chosen.tiny else device}")
    print(f"{'case':<44} {'allocated GiB':>26} {'reserved GiB':>18} {'seconds':>16}", flush=True)
    found: list[dict[str, Any]] = []
    for row in rows(cases, shape=shape, gpu=on, budget=chosen.budget):
        found.append(row)
        print(line(row), flush=True)
        if chosen.out:  # a run that is killed keeps what it has
            command = f"python benchmarks/plan_vs_gpu.py --shape {shape}"
            chosen.out.write_text(json.dumps(made_with(command, device=device) | {"cases": found}, indent=2) + "\n")
    return verdict(found)


def verdict(found: list[dict[str, Any]]) -> int:
    """How far the cases are off, and whether that breaks the claim."""
    errors = [row["memory_off"] for row in found if "memory_off" in row]
    times = [row["time_off"] for row in found if row.get("time_off") is not None]
    if errors:
        print(f"{len(errors)} cases: memory {min(errors):+.2%} to {max(errors):+.2%}; allowed {ALLOWED:.0%} either way")
    if times:
        print(f"time {min(times):+.0%} to {max(times):+.0%}; allowed {ALLOWED_TIME:.0%} either way")
    has_failed = any("measured" in row and "memory_off" not in row for row in found)
    is_off = any(abs(error) > ALLOWED for error in errors) or any(abs(error) > ALLOWED_TIME for error in times)
    return int(has_failed or not errors or is_off)


if __name__ == "__main__":
    sys.exit(main())
