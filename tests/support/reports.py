"""Run and sweep directories as the commands leave them, without training: for the tests of the report."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lorafit.data.audit import Audit, side_audit
from lorafit.data.findings import Findings
from lorafit.evaluation.eval_result import Comparison, Difference, EvalResult
from lorafit.evaluation.intervals import Interval
from lorafit.storage.run_dir import RunDir
from lorafit.sweep.sweep_result import LearningRate, ModuleSpectrum, RankRow, Spectra, SweepResult

RECIPE = """output_dir: null
model:
  model_name_or_path: Qwen/Qwen3-0.6B
lora: {r: 16, lora_alpha: 32}
data:
  train:
  - path: train.jsonl
"""


def write_run(directory: Path, *, steps: int = 200, text: str = "plain") -> RunDir:
    """A finished run with a merged model and some events; `text` is in every place that a stranger can write to."""
    run = RunDir(directory)
    (directory / "merged").mkdir(parents=True)
    run.recipe.write_text(f"{RECIPE}# {text}\n", encoding="utf-8")
    with run.metrics.open("w", encoding="utf-8") as lines:
        for step in range(1, steps + 1):
            if step == 1 or step % max(1, steps // 8) == 0:
                lines.write(
                    json.dumps({"step": step, "eval_loss": 2.6 - 0.9 * step / steps, "eval_tokens": 900}) + "\n"
                )
            noise = math.sin(step * 12.9898) * 0.15
            figures = {
                "loss": 1.4 + 2 * math.exp(-6 * step / steps) + noise,
                "grad_norm": 0.5 + abs(noise),
                "lr": 2e-4 * (1 + math.cos(math.pi * step / steps)) / 2,
                "tokens": step * 4096,
                "tokens_per_second": 5200 + 900 * noise,
            }
            lines.write(json.dumps({"step": step} | figures) + "\n")
    run.write_manifest(manifest(steps, text))
    run.add_event("health", f"loss jumped {text}", step=steps // 3, rule="spike", action="warn", figures={"loss": 3.25})
    run.add_event("resumed", "goes on after checkpoint-100", step=steps // 2)
    run.add_event("memory", "does steps in 2 parts", step=4, figures={"parts": 2})
    (directory / "merged/merge_report.json").write_text(json.dumps(merge_report(text)), encoding="utf-8")
    (directory / "eval.json").write_text(json.dumps(evaluation(text)), encoding="utf-8")
    return run


def evaluation(text: str) -> dict[str, Any]:
    """As `lorafit eval` writes it."""
    losses = {"loss": 2.6234, "perplexity": 13.78, "bits_per_byte": 1.21, "token_accuracy": 0.48}
    tuned = {"loss": 1.7001, "perplexity": 5.474, "bits_per_byte": 0.784, "token_accuracy": 0.63}
    found = {
        name: Difference(tuned[name] - losses[name], tuned[name] - losses[name] - 0.05, -0.01, "better")
        for name in losses
    }
    held_out = Comparison(f"{text}.jsonl", 400, {"base": losses, "adapter": tuned, "merged": tuned}, found, found, {})
    spread = {"loss": Difference(0.031, 0.012, 0.05, "worse")}
    general = Comparison(
        "text the base writes", 64, {"base": {"loss": 2.1}, "adapter": {"loss": 2.131}}, spread, {}, {}
    )
    confusion = {"labels": ["yes", text], "counts": [[30, 4, 1], [2, 25, 3]], "f1": {"yes": 0.891, text: 0.8475}}
    sample = {
        "where": f"{text}.jsonl:3",
        "prompt": f"What is {text}?",
        "reference": "It is 3.",
        "base": "dunno\n" + text,
    }
    return EvalResult(
        run="run",
        base_model=text,
        merged_model="merged",
        held_out=held_out,
        answers=None,
        general=general,
        tasks={text: general},
        details={"adapter": {"confusion": confusion}},
        samples=(sample | {"adapter": f"It is 3. {text}"},) * 2,
        verdict=f"adapter better by 0.923 nats [0.873, 0.973], 400 sequences {text}",
        speed={"scored": 123.4},
        peak_memory_bytes=6_100_000_000,
        seconds=88.25,
    ).as_dict()


def manifest(steps: int, text: str) -> dict[str, Any]:
    """As training writes it."""
    findings = Findings()
    findings.add("empty_prompt", (0, 17))
    side = side_audit(3, Counter((20, 31, 44)), Counter((9, 12, 21)), 0)
    audit = Audit(
        side,
        side_audit(2, Counter((18, 25)), Counter((8, 11)), 1),
        findings,
        Findings(),
        (f"{text}.jsonl", "eval.jsonl"),
    )
    module = {"kind": "Linear", "r": 16, "alpha": 32, "scale": 2.0}
    return {
        "lorafit": "0.1.0",
        "python": "3.11.7",
        "versions": {"torch": "2.13.0", "peft": f"0.21.2 {text}"},
        "started": "2026-11-22T18:46:13+00:00",
        "machine": f"NVIDIA H200 {text}",
        "world_size": 2,
        "seed": 42,
        "bf16": True,
        "planned_steps": steps,
        "base": {"name": f"Qwen/Qwen3-0.6B {text}", "commit": "abc", "fingerprint": "626397326d", "tensors": 29},
        "data": {"fingerprint": "0f98a6d78f", **audit.as_dict(), "files": list(audit.files)},
        "modules": [
            {"name": f"model.layers.{layer}.{text}_proj", **module, "parameters": 8192 * (1 + layer % 2)}
            for layer in range(6)
        ],
        "steps": steps,
        "tokens": steps * 4096,
        "tokens_per_second": 5212.4,
        "eval_loss_before": 2.6234,
        "eval_loss_after": 1.7001,
        "peak_memory_bytes": 18_253_611_008,
        "seconds": 4213.7,
        "outcome": "finished",
    }


def merge_report(text: str) -> dict[str, Any]:
    """As a merge leaves it beside the weights."""
    return {
        "passed": True,
        "wrong": [],
        "prompts": "64 held-out rows",
        "positions": 1024,
        "max_abs_logit_difference": 0.0428,
        "mean_kl": 7.35e-06,
        "top1_agreement": 0.9990234375,
        "adapter_effect": 2.1325,
        "delta_retained": 0.99246,
        "modules": [{"name": f"model.layers.0.{text}", "update": 1.1, "retained": 0.98450, "expected": 0.98450}],
        "dtype": "bfloat16",
        "advice": None,
        "onto": "original",
    }


def write_sweep(directory: Path, *, text: str = "plain", modules: int = 6) -> Path:
    """A sweep that has ended: 16 is as good as 64, 8 is not, 4 was not tried."""
    directory.mkdir(parents=True)
    plan = [
        (4, "monotone", False, None, None, None),
        (8, "rejected at a third", False, 0.33, 2.34, Interval(0.061, 0.043, 0.079)),
        (16, "direct", True, 1.0, 1.712, Interval(0.004, -0.003, 0.009)),
        (32, "truncated", True, 1.0, 1.7091, Interval(0.0011, -0.002, 0.004)),
        (64, "direct", True, 1.0, 1.708, Interval(0.0, 0.0, 0.0)),
    ]
    trials = tuple(
        RankRow(
            rank=rank,
            decided_by=decided,
            is_sufficient=enough,
            share=share,
            loss=loss,
            low=None if loss is None or gap is None else 1.708 + gap.low,
            high=None if loss is None or gap is None else 1.708 + gap.high,
            difference=gap,
            eps=None if gap is None else 0.01,
            losses_by_seed=(),
            truncated_loss=None if rank == 64 else 1.7 + 1 / rank,
            parameters=rank * 40_960,
            adapter_bytes=rank * 81_920,
            tokens=0 if share is None else int(800_000 * share) * (decided != "truncated"),
            seconds=None if decided in ("monotone", "truncated") else 900.0 * (share or 0),
            peak_memory_bytes=None if decided in ("monotone", "truncated") else 6_000_000_000 + rank,
        )
        for rank, decided, enough, share, loss, gap in plan
    )
    result = SweepResult(
        out=str(directory),
        chosen_rank=16,
        eps=0.01,
        reference_rank=64,
        is_monotone=True,
        alpha=f"2r {text}",
        learning_rate=2e-4,
        seeds=(42,),
        eval_sequences=400,
        trials=trials,
        tokens_trained=1_864_000,
        tokens_exhaustive=4_000_000,
        tokens_tuning=0,
        learning_rates=(LearningRate(2e-4, 1.9, 0.33, 100), LearningRate(2e-3, None, 0.33, 100)),
        recipe="best.yaml",
        adapter=f"trials/{text}",
        seconds=2300.5,
    )
    values = [tuple(3.0 * math.exp(-index / (4 + one % 7)) for index in range(64)) for one in range(modules)]
    spectra = Spectra(
        rank=64,
        chosen_rank=16,
        share_kept=0.97,
        modules=tuple(ModuleSpectrum(f"layers.{index}.{text}", value, 12) for index, value in enumerate(values)),
        rank_pattern={f"layers.{index}.{text}": 12 for index in range(modules)},
    )
    (directory / "sweep.json").write_text(json.dumps(asdict(result)), encoding="utf-8")
    (directory / "spectrum.json").write_text(json.dumps(asdict(spectra)), encoding="utf-8")
    (directory / "best.yaml").write_text(RECIPE, encoding="utf-8")
    return directory


FACTS: dict[str, Any] = {
    "lorafit": "0.1.0",
    "python": "3.11.7",
    "versions": {"torch": "2.13.0"},
    "machine": "a CPU",
    "world_size": 2,
    "seed": 1,
    "bf16": True,
    "compute_dtype": "bfloat16",
    "planned_steps": 40,
    "steps": 30,
    "tokens": 12_345,
    "base": {"name": "org/base", "commit": "c0ffee", "fingerprint": "f00d", "tensors": 20},
    "data": {
        "train": dict.fromkeys(("rows", "sequences", "tokens", "trained_tokens", "longest", "lost"), 24),
        "eval": None,
        "fingerprint": "abc",
    },
    "modules": [
        {
            "name": f"model.layers.{layer}.q_proj",
            "kind": "Linear",
            "r": 20,
            "alpha": 40,
            "scale": 2.0,
            "parameters": 900,
        }
        for layer in (0, 1)
    ],
}
HISTORY: list[dict[str, Any]] = [{"step": step, "loss": 4.0 - step / 20} for step in range(1, 31)]
