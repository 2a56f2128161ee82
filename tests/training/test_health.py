"""What is done about a run that goes wrong, as the recipe says, in the real training path."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from health_cases import FAULTS, HEALTHY, watch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerControl, TrainerState

from lorafit.cli import _exit_code
from lorafit.errors import HealthStop
from lorafit.lines import heard
from lorafit.recipe.sections import HealthSection
from lorafit.storage.run_dir import RunDir
from lorafit.tasks.causal_lm_trainer import CausalLm
from lorafit.training import load_model as model_module
from lorafit.training.health.watch import HealthWatch
from support.commands import command, finished
from support.runs import run, small_recipe
from support.tiny import sums, write_jsonl

STEADY = [(2.0 + 0.1 * (step % 3), 1.0 + 0.1 * (step % 2)) for step in range(30)]
SCRIPTS: dict[str, list[tuple[float, float]]] = {
    "on_divergence": [*STEADY, (9.0, 1.0), (9.0, 1.0), (9.0, 1.0)],
    "on_spike": [*STEADY, (9.0, 1.0), (2.0, 1.0)],
    "on_plateau": [(2.0 + 0.01 * (step % 3), 1.0) for step in range(33)],
    "on_vanishing_gradient": [*STEADY[:20], (2.0, 0.0), (2.0, 0.0), (2.0, 0.0)],
    "on_exploding_gradient": [*STEADY[:20], (2.0, 900.0), (2.0, 1.0)],
    "on_zero_b": STEADY[:12],
    "on_overfitting": [(3 - 0.05 * step, 1.0) for step in range(20)],
    "on_nan": STEADY[:3],
}
"""Loss and gradient norm of each logged step, by the rule that they break."""


class _Adapted(nn.Module):
    """One B matrix that moves as it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.lora_B = nn.Parameter(torch.zeros(4, 4))
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=1000))


def _logged(rule: str, action: str, directory: Path, base: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """Lines and events of a run whose figures break `rule`, every other rule ignored."""
    actions = {name: "ignore" for name in HealthSection.model_fields if name != "on_oom"} | {rule: action}
    recipe = small_recipe(directory, base, health=actions, training={"max_steps": 40, "learning_rate": 2e-4}).recipe
    directory = directory / "run"
    directory.mkdir()
    lines: list[str] = []
    watching, model = HealthWatch(recipe, RunDir(directory), rows_of_batch=lambda _: []), _Adapted()
    state, around = TrainerState(max_steps=40, is_world_process_zero=True), (TrainerControl(), {"model": model})
    watching.on_train_begin(None, state, around[0], **around[1])  # type: ignore[arg-type]
    try:
        with heard(lines.append):
            for step, (loss, norm) in enumerate(SCRIPTS[rule], start=1):
                state.global_step = step
                if rule != "on_zero_b":
                    model.lora_B.data += 0.1
                logs = {"loss": loss, "grad_norm": norm, "learning_rate": 2e-4, "epoch": step / 10}
                watching.on_log(None, state, around[0], logs=logs, **around[1])  # type: ignore[arg-type]
                if rule == "on_overfitting" and step % 4 == 0:
                    watching.on_log(None, state, around[0], logs={"eval_loss": 2 + abs(step - 8) / 10}, **around[1])  # type: ignore[arg-type]
            if rule == "on_nan":
                watching.broken_step([("loss is nan", {})], model, step=4)
    finally:
        events = RunDir(directory).events
        found = [json.loads(line) for line in events.read_text("utf-8").splitlines()] if events.exists() else []
    return lines, found


def test_every_rule_has_a_script() -> None:
    assert set(SCRIPTS) == set(HealthSection.model_fields) - {"on_oom"}


@pytest.mark.parametrize("rule", SCRIPTS)
def test_each_key_of_health_stops_warns_or_ignores(rule: str, tmp_path: Path, tiny_base: Path) -> None:
    for action in ("warn", "ignore", "stop"):
        directory = tmp_path / action
        directory.mkdir()
        if action == "stop":
            with pytest.raises(HealthStop, match="likely cause") as caught:
                _logged(rule, action, directory, tiny_base)
            assert f"health.{rule}: warn goes on" in str(caught.value)
            assert '"action": "stop"' in (directory / "run/events.jsonl").read_text("utf-8")
            continue
        lines, events = _logged(rule, action, directory, tiny_base)
        assert len(lines) == len(events) == (1 if action == "warn" else 0), lines
        if action == "warn":
            assert (events[0]["kind"], events[0]["rule"], events[0]["action"]) == ("health", rule, "warn")
            assert lines[0].startswith("warning: step ") and f"health.{rule}: ignore silences this" in lines[0]


def test_what_was_said_before_is_not_said_again_when_a_run_goes_on(tmp_path: Path, tiny_base: Path) -> None:
    loaded = small_recipe(tmp_path, tiny_base, health={"on_divergence": "warn"})
    (tmp_path / "run").mkdir()
    figures = [*STEADY, *[(9.0, 1.0)] * 6]
    log = [
        {"loss": loss, "grad_norm": norm, "learning_rate": 2e-4, "step": n} for n, (loss, norm) in enumerate(figures)
    ]
    for known, expected in ((len(STEADY) + 3, 0), (len(STEADY), 1)):
        lines: list[str] = []
        model = _Adapted()
        watching = HealthWatch(loaded.recipe, RunDir(tmp_path / "run"), rows_of_batch=lambda _: [])
        state = TrainerState(max_steps=100, log_history=log[:known], global_step=known)
        with heard(lines.append):
            watching.on_train_begin(None, state, TrainerControl(), model=model)  # type: ignore[arg-type]
            for entry in log[known:]:
                watching.on_log(None, state, TrainerControl(), logs=entry, model=model)  # type: ignore[arg-type]
        assert len(lines) == expected


def test_the_newest_checkpoint_of_a_run_that_broke_is_finite(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights break in the optimizer at the third step; the loss would show it only at the fourth."""
    _after_step(monkeypatch, 3, lambda p: p.fill_(float("inf")))
    with pytest.raises(HealthStop, match="step 3: the adapter is not finite"):
        run(small_recipe(tmp_path, tiny_base, training={"max_steps": 6}, checkpoints={"every": 1}))
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names[-1] == "checkpoint-2"
    weights = load_file(tmp_path / "run/checkpoints/checkpoint-2/adapter_model.safetensors")
    assert all(torch.isfinite(weight).all() for weight in weights.values())


def _after_step(monkeypatch: pytest.MonkeyPatch, at: int, change: Any) -> None:
    step, count = torch.optim.AdamW.step, [0]

    def stepped(self: Any, closure: Any = None) -> Any:
        result = step(self, closure)
        count[0] += 1
        if count[0] == at:
            with torch.no_grad():
                change(self.param_groups[0]["params"][0])
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", stepped)


def test_two_processes_stop_at_one_step_with_one_line(tmp_path: Path, tiny_base: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"] *= 200
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    training = {"max_steps": 30, "per_device_train_batch_size": 2}
    loaded = small_recipe(tmp_path, base, training=training, launch={"num_processes": 2})
    code, _, err = finished(command(tmp_path, "lorafit", "train", str(loaded.path)))
    assert code == 6, err
    assert err.count("error: ") == 1 and "step 3: the loss began at" in err
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text("utf-8").splitlines()]
    assert [event["action"] for event in events if event["kind"] == "health"] == ["stop"]


@pytest.mark.parametrize("name", ["learning rate x1000", "B not in the optimizer", "NaN loss of one batch"])
def test_a_fault_is_named(name: str, tmp_path: Path) -> None:
    case = next(case for case in FAULTS if case.name == name)
    result = watch(case, tmp_path / "case", cache=tmp_path / "cache")
    delay = result.delay()
    assert result.is_right() and delay is not None and delay <= 5, result.events
    assert str(tmp_path) not in json.dumps(result.events)


@pytest.mark.parametrize("name", ["twenty steps", "twenty steps, logged every ten"])
def test_a_healthy_run_raises_no_alarm(name: str, tmp_path: Path) -> None:
    case = next(case for case in HEALTHY if case.name == name)
    result = watch(case, tmp_path / "case", cache=tmp_path / "cache")
    assert (result.events, result.outcome) == ([], "finished")


NOTHING: dict[str, tuple[dict[str, Any], int, str]] = {
    "alpha 0": ({"lora": {"lora_alpha": 0}}, 2, "lora.lora_alpha"),
    "rate 0": ({"training": {"learning_rate": 0.0}}, 2, "training.learning_rate"),
    "rate 0 passed through": ({"training": {"extra": {"learning_rate": 0.0}}}, 2, "training.extra.learning_rate"),
    "no steps": ({"training": {"max_steps": 0}}, 2, "training.max_steps"),
    "no epochs": ({"training": {"num_train_epochs": 0.0}}, 2, "training.num_train_epochs"),
    "all dropped": ({"lora": {"lora_dropout": 1.0}}, 2, "lora.lora_dropout"),
    "one step, all of it warm-up": ({"training": {"max_steps": 1, "warmup_steps": 0.03}}, 2, "training.warmup_steps"),
    "far too small a rate": ({"training": {"learning_rate": 1e-30}}, 5, "did not move"),
}


@pytest.mark.parametrize("name", NOTHING)
def test_a_recipe_that_learns_nothing_never_ends_well(
    name: str, tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import yaml

    sections, code, said = NOTHING[name]
    loaded = small_recipe(tmp_path, tiny_base)
    recipe = yaml.safe_load(loaded.path.read_text("utf-8"))
    for section, keys in sections.items():
        recipe[section] |= keys
    loaded.path.write_text(yaml.safe_dump(recipe), "utf-8")
    assert _exit_code(["train", str(loaded.path), "--quiet"]) == code
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run/adapter").exists()


@pytest.mark.parametrize("rows", ["empty answers", "cut before the answer"])
def test_rows_without_a_trained_token_never_end_well(rows: str, tmp_path: Path, tiny_base: Path) -> None:
    loaded = small_recipe(tmp_path, tiny_base, data={"over_length": "truncate"}, training={"max_length": 16})
    if rows == "empty answers":
        write_jsonl(tmp_path / "train.jsonl", [row | {"completion": ""} for row in sums(24)])
    assert _exit_code(["train", str(loaded.path), "--quiet"]) == 3
    assert not (tmp_path / "run/adapter").exists()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("fault", ["scale 0", "scale 0, pissa", "frozen", "no gradient"])
def test_an_adapter_that_learns_nothing_never_ends_well(
    fault: str, weight_decay: float, tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weight decay moves all that is not zero: B of a plain start stays, everything of PiSSA's moves."""
    attach = model_module.attach_adapter

    def attach_and_break(*rest: Any, **named: Any) -> Any:
        model = attach(*rest, **named)
        for module in model.modules():
            if "scale" in fault and isinstance(module, LoraLayer):
                module.scaling = dict.fromkeys(module.scaling, 0.0)
        for name, parameter in model.named_parameters():
            if fault == "frozen" and "q_proj.lora_B" in name:
                parameter.requires_grad = False
        return model

    monkeypatch.setattr(model_module, "attach_adapter", attach_and_break)
    if fault == "no gradient":
        compute = CausalLm.compute_loss
        monkeypatch.setattr(CausalLm, "compute_loss", lambda self, *a, **k: compute(self, *a, **k) * 0)
    lora = {"init_lora_weights": "pissa"} if "pissa" in fault else {}
    loaded = small_recipe(tmp_path, tiny_base, lora=lora, training={"weight_decay": weight_decay})
    assert _exit_code(["train", str(loaded.path), "--quiet"]) == 5
    assert not (tmp_path / "run/adapter").exists()
