"""Runs that go wrong in known ways, and runs that do not, for benchmarks/health.py and the tests.

A fault is put into the recipe, the rows, the base or the trainer; the rules see only what the run logs.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import yaml
from safetensors.torch import load_file, save_file

from lorafit.builders.smoke_base import write_smoke_base
from lorafit.errors import LorafitError
from lorafit.planning.known_shapes import architecture
from lorafit.recipe import load
from lorafit.recipe.sections import ModelSection
from lorafit.tasks.causal_lm_trainer import CausalLm
from lorafit.training.train import run_training

QUICKSTART = Path(__file__).parent.parent / "recipes" / "quickstart"
STEPS = 60
TRAINING = {
    "max_length": 128,
    "max_steps": STEPS,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "learning_rate": 2e-3,
    "warmup_steps": 0.1,
    "logging_steps": 1,
    "bf16": False,
}

Rows = list[dict[str, str]]


@dataclass(frozen=True)
class Case:
    """One run, and for a fault what must be said of it."""

    name: str
    recipe: dict[str, Any] = field(default_factory=dict)
    base: str = "quickstart"
    """`quickstart`, or the name of a shipped architecture, in miniature with random weights."""
    rows: int = 400
    change_base: Callable[[dict[str, torch.Tensor]], None] | None = None
    inject: Callable[[], AbstractContextManager[Any]] | None = None
    seed: int = 42
    onset: int | str = 0
    """The step the fault begins at, or how to find it in the metrics: `loss` (0.5 nats above the first), `held-out`
    (the first evaluation after the lowest)."""
    rules: tuple[str, ...] = ()
    """Rules of which one must be the first to speak."""
    cause: str = ""
    """Words that the first finding must hold."""


@dataclass(frozen=True)
class Watched:
    """What a run came to: its health events and how it ended."""

    case: Case
    events: list[dict[str, Any]]
    metrics: list[dict[str, Any]]
    outcome: str
    seconds: float = 0.0

    def onset(self) -> int:
        """The step that the fault shows at first."""
        if isinstance(self.case.onset, int):
            return self.case.onset
        if self.case.onset == "held-out":
            held_out = [entry for entry in self.metrics if "eval_loss" in entry]
            lowest = min(held_out, key=lambda entry: entry["eval_loss"])["step"]
            return next((entry["step"] for entry in held_out if entry["step"] > lowest), lowest)
        losses = [(entry["step"], entry["loss"]) for entry in self.metrics if "loss" in entry]
        shows = [step for step, loss in losses if not loss <= losses[0][1] + 0.5]
        return shows[0] if shows else losses[-1][0] + 1

    def delay(self) -> int | None:
        """Logged training steps after the onset until the first finding; None without one at or after the onset."""
        onset = self.onset()
        events = [event["step"] for event in self.events if event["step"] >= onset]
        if not events:
            return None
        return sum(onset < entry["step"] <= events[0] for entry in self.metrics if "loss" in entry)

    def early(self) -> int:
        """Findings before the onset: false alarms."""
        return sum(event["step"] < self.onset() for event in self.events)

    def is_right(self) -> bool:
        """Whether the first finding is one of the rules asked for, with the cause."""
        first = next(iter(self.events), None)
        return first is not None and first["rule"] in self.case.rules and self.case.cause in first["message"]


def watch(case: Case, directory: Path, *, cache: Path) -> Watched:
    """Run it in `directory` as `lorafit train` would."""
    directory.mkdir(parents=True)
    base = _base(case, directory)
    rows = {"train": _rows("train")[: case.rows], "eval": _rows("eval")[:24]}
    for name, content in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in content)
        (directory / f"{name}.jsonl").write_text(text, encoding="utf-8")
    recipe: dict[str, Any] = {
        "output_dir": str(directory / "run"),
        "model": {"model_name_or_path": str(base)},
        "data": {"train": [{"path": "train.jsonl"}], "eval": [{"path": "eval.jsonl"}]},
        "training": TRAINING | {"seed": case.seed},
    }
    for section, keys in case.recipe.items():
        recipe[section] = recipe.get(section, {}) | keys
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    outcome, events = "finished", []
    with (case.inject or contextlib.nullcontext)():
        try:
            loaded = load(directory / "recipe.yaml")
            run_training(loaded, cache_dir=cache)
        except LorafitError as error:
            outcome = f"exit {error.exit_code}"
            rule = re.search(r"health\.(\w+): warn", str(error))
            if rule:  # the self-test before the first step leaves no run directory
                events = [{"step": 0, "rule": rule[1], "message": str(error)}]
    events = _lines(directory / "run/events.jsonl") or events
    return Watched(case, events, _lines(directory / "run/metrics.jsonl"), outcome)


def _lines(path: Path) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    return [entry for entry in entries if entry.get("kind", "health") == "health"]


def _rows(name: str) -> Rows:
    return [json.loads(line) for line in (QUICKSTART / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def _base(case: Case, directory: Path) -> Path:
    source = QUICKSTART / "base"
    if case.base != "quickstart":
        config = architecture(ModelSection(model_name_or_path=case.base))
        source = write_smoke_base(config, QUICKSTART / "base", out_dir=directory / "base")
    if case.change_base is None:
        return source
    target = directory / "changed"
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    weights = load_file(target / "model.safetensors")
    case.change_base(weights)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


# What is put into the trainer. Step k is the one that takes `global_step` from k - 1 to k.


@contextlib.contextmanager
def loss_times(factor: float, *, first: int = 1, last: int = 10**9) -> Iterator[None]:
    """The loss, and with it the gradient, multiplied."""
    compute = CausalLm.compute_loss

    def scaled(self: Any, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
        loss = compute(self, model, inputs, *rest, **named)
        return loss * factor if self.model.training and first <= self.state.global_step + 1 <= last else loss

    with patch.object(CausalLm, "compute_loss", scaled):
        yield


@contextlib.contextmanager
def gradient_times(factor: float, *, first: int, last: int = 10**9) -> Iterator[None]:
    """The gradient alone multiplied, as by a detached target (0), a bug in a backward pass, or a wrong sign."""
    step = CausalLm.training_step

    def scaled(self: Any, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
        loss = step(self, model, inputs, *rest, **named)
        if first <= self.state.global_step + 1 <= last:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad *= factor
        return loss

    with patch.object(CausalLm, "training_step", scaled):
        yield


@contextlib.contextmanager
def corrupted_batch(*, first: int, last: int) -> Iterator[None]:
    """Batches whose trained tokens are random ids."""
    step = CausalLm.training_step

    def corrupt(self: Any, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
        if first <= self.state.global_step + 1 <= last:
            chance = torch.Generator().manual_seed(self.state.global_step)
            noise = torch.randint(10, 4000, inputs["labels"].shape, generator=chance)
            trained = inputs["labels"] != -100
            inputs["labels"] = torch.where(trained, noise, inputs["labels"])
            inputs["input_ids"] = torch.where(trained, noise, inputs["input_ids"])
        return step(self, model, inputs, *rest, **named)

    with patch.object(CausalLm, "training_step", corrupt):
        yield


@contextlib.contextmanager
def left_out_of_the_optimizer(part: str) -> Iterator[None]:
    """Parameters with `part` in their name have a learning rate of 0."""
    create = CausalLm.create_optimizer

    def without(self: Any, model: Any = None) -> Any:
        optimizer = create(self, model)
        frozen = {id(parameter) for name, parameter in self.model.named_parameters() if part in name}
        for group in optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in frozen]
        return optimizer

    with patch.object(CausalLm, "create_optimizer", without):
        yield


@contextlib.contextmanager
def adapter_weight(value: float, *, at: int) -> Iterator[None]:
    """One weight of the adapter overwritten before step `at`."""
    step = CausalLm.training_step

    def overwrite(self: Any, model: Any, *rest: Any, **named: Any) -> Any:
        if self.state.global_step + 1 == at:
            with torch.no_grad():
                next(p for name, p in model.named_parameters() if "lora_B" in name)[0, 0] = value
        return step(self, model, *rest, **named)

    with patch.object(CausalLm, "training_step", overwrite):
        yield


@contextlib.contextmanager
def rate_times(factor: float, *, first: int) -> Iterator[None]:
    """The learning rate multiplied from step `first` on, behind the schedule's back."""
    step = CausalLm.training_step

    def faster(self: Any, *rest: Any, **named: Any) -> Any:
        if self.state.global_step + 1 >= first:
            for group in self.optimizer.param_groups:
                group["lr"] *= factor
        return step(self, *rest, **named)

    with patch.object(CausalLm, "training_step", faster):
        yield


# What is done to bases.


def with_nan(weights: dict[str, torch.Tensor]) -> None:
    """One weight in the middle of the base is NaN."""
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")


def too_large_for_float16(weights: dict[str, torch.Tensor]) -> None:
    """A feed-forward layer whose inner values pass 65504, as those of bfloat16 models can."""
    weights["model.layers.0.mlp.up_proj.weight"] *= 60
    weights["model.layers.0.mlp.gate_proj.weight"] *= 60


def training(**keys: Any) -> dict[str, Any]:
    """A recipe that changes these keys of `training`."""
    return {"training": keys}


UNSTABLE = ("on_divergence", "on_exploding_gradient", "on_nan")
HIGH_RATE = "the learning rate is too high"
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2}

STEEP = {"learning_rate": 4e-3, "lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 3.0}}
"""From the first step the loss of rank 64 rises to 17; with ten steps of warm-up it falls to 2.6 instead."""

FAULTS = (
    Case("learning rate x100", training(learning_rate=0.2), onset="loss", rules=UNSTABLE, cause=HIGH_RATE),
    Case("learning rate x1000", training(learning_rate=2.0), onset="loss", rules=UNSTABLE, cause=HIGH_RATE),
    Case(
        "loss summed, not averaged (x200)",
        inject=lambda: loss_times(200),
        onset=1,
        rules=("on_divergence", "on_exploding_gradient"),
        cause="the loss is scaled wrongly",
    ),
    Case(
        "answers without signal",
        base="llama3-8b",
        inject=lambda: corrupted_batch(first=1, last=STEPS),
        onset=30,
        rules=("on_plateau",),
        cause="do not follow from the prompts",
    ),
    Case(
        "B not in the optimizer",
        inject=lambda: left_out_of_the_optimizer("lora_B"),
        onset=10,
        rules=("on_zero_b",),
        cause="the optimizer does not move these B matrices",
    ),
    Case(
        "target detached from step 25 on",
        inject=lambda: gradient_times(0, first=25),
        onset=25,
        rules=("on_vanishing_gradient",),
        cause="does not depend on the adapter",
    ),
    Case(
        "gradient of one batch x10,000",
        inject=lambda: gradient_times(1e4, first=25, last=25),
        onset=25,
        rules=("on_exploding_gradient",),
        cause="in one batch",
    ),
    Case("NaN in a weight of the base", change_base=with_nan, onset=0, rules=("on_nan",), cause="weights of the base"),
    Case(
        "NaN loss of one batch",
        inject=lambda: loss_times(float("nan"), first=20, last=20),
        onset=20,
        rules=("on_nan",),
        cause="these rows",
    ),
    Case(
        "learning rate 1e-9",
        training(learning_rate=1e-9),
        onset=10,
        rules=("on_zero_b",),
        cause="the learning rate is too low",
    ),
    Case(
        "24 rows, sixty epochs",
        {"training": {**EVALUATED, "learning_rate": 5e-3}},
        rows=24,
        onset="held-out",
        rules=("on_overfitting",),
        cause="learnt by heart",
    ),
    Case("alpha 4096 at r 16", {"lora": {"lora_alpha": 4096}}, onset="loss", rules=UNSTABLE, cause="scale is too high"),
    Case(
        "corrupted rows at steps 30 and 31",
        inject=lambda: corrupted_batch(first=30, last=31),
        onset=30,
        rules=("on_spike", "on_exploding_gradient"),
        cause="in one batch",
    ),
    Case(
        "float16 overflow",
        {"model": {"dtype": "float16"}},
        change_base=too_large_for_float16,
        onset=0,
        rules=("on_nan",),
        cause="float16 overflows",
    ),
    Case(
        "no warm-up",
        {"lora": {"r": 64, "use_rslora": True}, **training(**STEEP, warmup_steps=0)},
        onset="loss",
        rules=UNSTABLE,
        cause="no warm-up",
    ),
)

HELD_OUT = (
    Case("learning rate x250", training(learning_rate=0.5), seed=31, onset="loss", rules=UNSTABLE, cause=HIGH_RATE),
    Case("learning rate x30", training(learning_rate=0.06), seed=32, onset="loss", rules=UNSTABLE, cause=HIGH_RATE),
    Case(
        "gpt2, learning rate 1",
        training(learning_rate=1.0),
        base="gpt2",
        seed=33,
        onset="loss",
        rules=UNSTABLE,
        cause=HIGH_RATE,
    ),
    Case(
        "loss x16",
        base="qwen3-4b",
        inject=lambda: loss_times(16),
        seed=34,
        onset=1,
        rules=("on_divergence", "on_exploding_gradient"),
        cause="the loss is scaled wrongly",
    ),
    Case(
        "gpt2, answers without signal",
        base="gpt2",
        inject=lambda: corrupted_batch(first=1, last=STEPS),
        seed=35,
        onset=30,
        rules=("on_plateau",),
        cause="do not follow from the prompts",
    ),
    Case(
        "QLoRA, B of half the modules frozen",
        {"quantization": {"load_in_4bit": True}},
        inject=lambda: left_out_of_the_optimizer("mlp.up_proj.lora_B"),
        seed=36,
        onset=10,
        rules=("on_zero_b",),
        cause="the optimizer does not move these B matrices",
    ),
    Case(
        "every answer masked from step 40 on",
        inject=lambda: loss_times(0, first=40),
        seed=37,
        onset=40,
        rules=("on_vanishing_gradient",),
        cause="no trained token in the batches",
    ),
    Case(
        "gradient of two batches x300",
        inject=lambda: gradient_times(300, first=40, last=41),
        seed=38,
        onset=40,
        rules=("on_exploding_gradient",),
        cause="in one batch",
    ),
    Case(
        "infinite loss of one batch, QLoRA",
        {"quantization": {"load_in_4bit": True}},
        inject=lambda: loss_times(float("inf"), first=8, last=8),
        seed=39,
        onset=8,
        rules=("on_nan",),
        cause="these rows",
    ),
    Case(
        "learning rate 3e-8, DoRA",
        {"lora": {"use_dora": True}, **training(learning_rate=3e-8)},
        seed=40,
        onset=10,
        rules=("on_zero_b",),
        cause="the learning rate is too low",
    ),
    Case(
        "12 rows by heart, DoRA",
        {"lora": {"use_dora": True, "r": 32}, **training(**EVALUATED, learning_rate=3e-3)},
        rows=12,
        seed=41,
        onset="held-out",
        rules=("on_overfitting",),
        cause="learnt by heart",
    ),
    Case(
        "alpha 8192 at r 8",
        {"lora": {"lora_alpha": 8192, "r": 8}},
        seed=42,
        onset="loss",
        rules=UNSTABLE,
        cause="scale is too high",
    ),
    Case(
        "corrupted rows at step 45",
        inject=lambda: corrupted_batch(first=45, last=45),
        seed=43,
        onset=45,
        rules=("on_spike", "on_exploding_gradient"),
        cause="in one batch",
    ),
    Case(
        "an adapter weight infinite at step 15",
        inject=lambda: adapter_weight(float("inf"), at=15),
        seed=44,
        onset=15,
        rules=("on_nan",),
        cause="the learning rate is too high",
    ),
    Case(
        "LoRA+ with B 500 times as fast",
        {"optimizer": {"loraplus_lr_ratio": 500.0}},
        seed=45,
        onset="loss",
        rules=UNSTABLE,
        cause="B's learning rate",
    ),
    Case(
        "learning rate x100 from step 30 on",
        inject=lambda: rate_times(100, first=30),
        seed=46,
        onset=30,
        rules=UNSTABLE,
        cause=HIGH_RATE,
    ),
    Case(
        "gradient with the wrong sign from step 30 on",
        inject=lambda: gradient_times(-1, first=30),
        seed=47,
        onset=30,
        rules=UNSTABLE,
        cause=HIGH_RATE,
    ),
)
"""Faults and seeds that no threshold was chosen by."""

QUICK = {"eval_strategy": "steps", "eval_steps": 15}

HEALTHY = (
    Case("LoRA", training(**QUICK)),
    Case("LoRA, another seed", training(**QUICK), seed=1),
    Case("LoRA, batch of one", training(per_device_train_batch_size=1, learning_rate=1e-3), seed=2),
    Case("LoRA, 2e-4", training(learning_rate=2e-4, **QUICK), seed=3),
    Case("QLoRA nf4", {"quantization": {"load_in_4bit": True}, **training(**QUICK)}, seed=4),
    Case("QLoRA nf4, DoRA", {"quantization": {"load_in_4bit": True}, "lora": {"use_dora": True}}, seed=5),
    Case("DoRA", {"lora": {"use_dora": True}, **training(**QUICK)}, seed=6),
    Case("AdaLoRA", {"adalora": {"init_r": 12, "target_r": 6, "tinit": 10, "tfinal": 20, "delta_t": 5}}, seed=7),
    Case("AdaLoRA, pruned from the start", {"adalora": {"init_r": 6, "target_r": 2, "tinit": 1, "tfinal": 10}}, seed=8),
    Case("LoRA+", {"optimizer": {"loraplus_lr_ratio": 8.0}, **training(learning_rate=5e-4, **QUICK)}, seed=9),
    Case("packing", training(packing=True, max_length=256, max_steps=40, **QUICK), seed=10),
    Case("rsLoRA r 64", {"lora": {"r": 64, "use_rslora": True}, **training(learning_rate=5e-4)}, seed=11),
    Case("PiSSA", {"lora": {"init_lora_weights": "pissa"}, **training(learning_rate=5e-4)}, seed=12),
    Case("dropout and NEFTune", {"lora": {"lora_dropout": 0.1}, **training(neftune_noise_alpha=5.0)}, seed=13),
    Case("twenty steps", training(max_steps=20), seed=14),
    Case("twenty steps, logged every ten", training(max_steps=20, logging_steps=10), seed=15),
    Case("rows of like length together", training(train_sampling_strategy="group_by_length", **QUICK), seed=16),
    Case("rows in their order", training(train_sampling_strategy="sequential", gradient_accumulation_steps=2), seed=17),
    Case("llama in miniature", training(**QUICK), base="llama3-8b", seed=18),
    Case("gpt2 in miniature", training(**QUICK), base="gpt2", seed=19),
    Case("qwen3 in miniature", training(**QUICK), base="qwen3-4b", seed=20),
    Case("gemma2 in miniature, LoRA+", {"optimizer": {"loraplus_lr_ratio": 4.0}}, base="gemma-2-2b", seed=21),
    Case("phi3 in miniature", training(lr_scheduler_type="constant", warmup_steps=0), base="phi-3-mini", seed=22),
    Case("mistral in miniature, DoRA", {"lora": {"use_dora": True}, **training(logging_steps=5)}, base="mistral-7b"),
)
