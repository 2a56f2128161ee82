"""Levers that leave out positions, or add some, where a router's loss is a mean over all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, Qwen3MoeConfig

from lorafit.speed.lever import ROUTED, has_router_loss
from lorafit.speed.levers import LEVERS
from support.models import HEADS, SMALL, built
from support.runs import run, small_recipe
from support.tiny import build_base

EXPERTS = Qwen3MoeConfig(**SMALL, **HEADS, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2)
WITHOUT = {"router_aux_loss_coef": 0.0}
NAMES = {lever.key: lever.name for lever in LEVERS if not lever.keeps_router_loss}


@pytest.mark.parametrize(("extra", "ends"), [({}, f" off: {ROUTED}"), (WITHOUT, " on")], ids=["added", "left out"])
def test_they_stand_back_where_it_is_added(extra: dict[str, Any], ends: str, tmp_path: Path) -> None:
    base = build_base(tmp_path / "base", config=EXPERTS)
    _, said = run(small_recipe(tmp_path, base, training={"extra": extra}))
    assert {f"{NAMES[key]}{ends}" for key in ("answer_head", "last_layer")} <= set(said)


def test_a_recipe_may_add_it_or_leave_it_out(tmp_path: Path, tiny_base: Path) -> None:
    assert set(NAMES) == {"answer_head", "last_layer", "fixed_length"}
    written, left_out = (small_recipe(tmp_path, tiny_base, training={"extra": extra}).recipe for extra in ({}, WITHOUT))
    experts = built(EXPERTS)
    assert has_router_loss(experts, written)
    assert not has_router_loss(experts, left_out)
    assert not has_router_loss(built(LlamaConfig(**SMALL, **HEADS)), written)
