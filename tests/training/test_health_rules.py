"""The rules of health on curves alone: recorded ones, and ones drawn for the purpose."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from lorafit.training.health.causes import Setting
from lorafit.training.health.history import History
from lorafit.training.health.rules import RULES, Finding, Movement, Weights, not_finite, zero_b

USUAL = Setting(
    learning_rate=2e-4,
    warmup_steps=3,
    total_steps=100,
    epochs=3.0,
    r=16,
    lora_alpha=32,
    use_rslora=False,
    loraplus_lr_ratio=None,
    max_grad_norm=1.0,
    guessing=math.log(32_000),
    is_float16=False,
    is_shuffled=True,
)
# Recorded: the quickstart's base, batches of four, rate 2e-3; the same at 0.2; random answers on a random base.
LEARNING = (5.25, 5.38, 4.62, 4.55, 4.36, 4.18, 4.32, 3.71, 3.70, 3.10, 3.12, 2.60, 3.03, 2.27, 2.51, 2.27, 2.27, 1.95)
SETTLED = (2.10, 2.33, 2.71, 1.93, 1.69, 2.37, 2.05, 2.32, 2.42, 2.44, 2.97, 2.20, 1.95, 2.66, 2.16, 2.78)
NORMS = (1.7, 1.8, 1.7, 1.6, 1.7, 1.4, 2.1, 1.9, 1.7, 1.8, 1.5, 1.3, 1.1, 1.4, 1.3, 1.1, 1.2, 1.3)
FLAT = (8.34, 8.35, 8.36, 8.36, 8.32, 8.38, 8.38, 8.32, 8.36, 8.33)


def said(
    losses: Sequence[float],
    norms: Sequence[float] = (),
    *,
    setting: Setting = USUAL,
    held_out: dict[int, float] | None = None,
) -> list[tuple[int, Finding]]:
    """All that the rules say of a run logged at every step, with its step."""
    history, found = History(), []
    padded = [*norms, *[1.0] * (len(losses) - len(norms))]
    for step, (loss, norm) in enumerate(zip(losses, padded, strict=True), start=1):
        history.add({"loss": loss, "grad_norm": norm, "learning_rate": 2e-4, "epoch": step / 10}, step=step)
        if held_out and step in held_out:
            history.add({"eval_loss": held_out[step], "epoch": step / 10}, step=step)
        found += [(step, finding) for rule in RULES if (finding := rule(history, setting)) is not None]
    return found


def first(losses: Sequence[float], norms: Sequence[float] = (), **keys: object) -> tuple[int, Finding]:
    return said(losses, norms, **keys)[0]  # type: ignore[arg-type]


def test_a_recorded_healthy_run_is_left_alone() -> None:
    assert said(LEARNING + SETTLED * 4, NORMS * 2) == []


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("deviation", [0.02, 0.2, 0.5])
def test_noise_around_a_falling_loss_is_no_alarm(seed: int, deviation: float) -> None:
    chance = random.Random(seed)
    means = [1.2 + 1.5 * math.exp(-step / 20) for step in range(200)]
    losses = [max(0.01, mean + chance.gauss(0, deviation)) for mean in means]
    norms = [math.exp(chance.gauss(0, 0.5)) for _ in losses]
    assert said(losses, norms, setting=replace(USUAL, total_steps=200)) == []


def test_a_loss_that_stays_high_is_a_divergence_at_its_third_step() -> None:
    step, finding = first((*LEARNING, *SETTLED, 9.1, 10.6, 8.4), setting=replace(USUAL, learning_rate=0.01))
    assert (step, finding.rule) == (len(LEARNING) + len(SETTLED) + 3, "on_divergence")
    assert "training.learning_rate: 2e-4 instead of 0.01" in finding.cause.change


def test_a_loss_that_comes_back_is_a_spike_of_those_rows() -> None:
    step, finding = first((*LEARNING, *SETTLED, 9.1, 10.6, 2.1))
    assert (step, finding.rule) == (len(LEARNING) + len(SETTLED) + 3, "on_spike")
    assert finding.cause.change.startswith("look at the rows of step 35")


def test_a_divergence_in_the_first_steps_is_seen_without_a_history() -> None:
    assert first((5.25, 5.38, 4.03, 18.1, 20.9, 11.7))[1].rule == "on_divergence"


def test_rows_in_the_order_of_their_files_may_change_in_kind() -> None:
    losses = (*[0.8, 0.9, 0.85, 0.8] * 6, *[2.0, 1.9, 2.1] * 4)
    assert first(losses)[1].rule == "on_divergence"
    assert said(losses, setting=replace(USUAL, is_shuffled=False)) == []


def test_a_loss_far_above_guessing_from_the_start_is_scaled_wrongly() -> None:
    step, finding = first((84.0, 81.0, 79.0))
    assert (step, finding.rule) == (3, "on_divergence")
    assert "scaled wrongly" in finding.cause.why


def test_a_loss_that_never_fell_is_a_plateau_and_one_that_settled_is_not() -> None:
    step, finding = first(FLAT * 4)
    assert (step, finding.rule) == (30, "on_plateau")
    slow = first(FLAT * 4, setting=replace(USUAL, learning_rate=1e-5))[1]
    assert "training.learning_rate: 2e-4 instead of 1e-5" in slow.cause.change
    assert said(LEARNING + SETTLED * 5) == []
    assert said(FLAT * 4, held_out={1: 8.3, 20: 7.9}) == []


def test_one_steep_gradient_is_its_batch_and_a_lasting_one_is_the_rate() -> None:
    usual = (LEARNING + SETTLED)[:30]
    step, finding = first([*usual, 2.0, 2.1], [*(NORMS * 2)[:30], 5e3, 1.2])
    assert (step, finding.rule) == (32, "on_exploding_gradient")
    assert "in one batch" in finding.cause.why
    step, finding = first([*usual, 2.0, 2.1, 2.2], [*(NORMS * 2)[:30], 300.0, 420.0, 380.0])
    assert (step, finding.rule) == (33, "on_exploding_gradient")
    assert "learning rate" in finding.cause.why


def test_a_gradient_of_zero_is_seen_at_its_third_step_and_one_that_falls_with_the_loss_is_not() -> None:
    step, finding = first([2.0] * 5, [1.0, 1.1, 0.0, 0.0, 0.0])
    assert (step, finding.rule) == (5, "on_vanishing_gradient")
    falling = [3 * 0.8**step for step in range(60)]
    assert said(falling, falling) == []


def test_a_rising_held_out_loss_is_overfitting_only_while_the_training_loss_falls() -> None:
    falling = [3 - 0.05 * step for step in range(50)]
    step, finding = first(falling, held_out={5: 3.0, 10: 2.6, 15: 2.5, 20: 2.56, 25: 2.62})
    assert (step, finding.rule) == (25, "on_overfitting")
    assert "training.num_train_epochs: 1.5 instead of 3" in finding.cause.change
    assert said(falling, held_out={5: 3.0, 10: 2.6, 15: 2.5, 20: 2.51, 25: 2.52}) == []
    assert said([2.0, 2.02] * 14, held_out={5: 3.0, 10: 2.6, 15: 2.5, 20: 2.56, 25: 2.62}) == []


@pytest.mark.parametrize(
    ("changes", "why", "change"),
    [
        ({"lora_alpha": 4096.0}, "lora_alpha / r = 256", "lora.lora_alpha: 32 instead of 4096"),
        ({"loraplus_lr_ratio": 64.0}, "B's learning rate", "optimizer.loraplus_lr_ratio: 16"),
        ({"warmup_steps": 0}, "no warm-up", "training.warmup_steps: 0.1"),
        ({"max_grad_norm": 0.0}, "not clipped", "training.max_grad_norm: 1.0"),
        ({}, "the learning rate is too high", "training.learning_rate: 4e-5 instead of 2e-4"),
    ],
)
def test_the_setting_that_is_furthest_from_usual_is_named(changes: dict[str, float], why: str, change: str) -> None:
    _, finding = first((1.5, 1.4, 9.0, 9.5, 9.9), setting=replace(USUAL, **changes))  # type: ignore[arg-type]
    assert why in finding.cause.why
    assert change in finding.cause.change


def test_b_that_does_not_move_and_b_that_moves_too_slowly() -> None:
    history = History()
    for step in range(1, 11):
        history.add({"loss": 2.0, "grad_norm": 1.0, "learning_rate": 2e-4}, step=step)
    still = Movement(steps=10, still=("q_proj.lora_B",), count=4, largest=1e-3, may_be_pruned=False)
    finding = zero_b(still, history, USUAL)
    assert finding is not None and "1 of 4 B matrices" in finding.what
    assert zero_b(replace(still, may_be_pruned=True), history, USUAL) is None
    assert zero_b(replace(still, steps=9), history, USUAL) is None
    slow = replace(still, still=(), largest=1e-9)
    finding = zero_b(slow, history, replace(USUAL, learning_rate=1e-9))
    assert finding is not None and "learning rate is too low" in finding.cause.why
    assert zero_b(slow, history, replace(USUAL, total_steps=10**6)) is None


@pytest.mark.parametrize(
    ("weights", "setting", "why"),
    [
        (Weights("layers.1.mlp", None, 0.0), USUAL, "weights of the base are not finite (layers.1.mlp)"),
        (Weights(None, "q_proj.lora_B", 0.0), USUAL, "learning rate"),
        (Weights(None, None, 0.0), replace(USUAL, is_float16=True), "float16"),
        (Weights(None, None, 0.0), USUAL, "these rows"),
    ],
)
def test_why_something_is_not_finite(weights: Weights, setting: Setting, why: str) -> None:
    history = History()
    for step, loss in enumerate(LEARNING, start=1):
        history.add({"loss": loss, "grad_norm": 1.0, "learning_rate": 2e-4}, step=step)
    finding = not_finite("loss is nan", ["a.jsonl:3"], weights=weights, history=history, setting=setting)
    assert why in finding.cause.why
    assert "rows a.jsonl:3" in str(finding)
