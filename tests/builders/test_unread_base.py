"""A process that is handed its weights builds the model that the first one loads, without a weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lorafit.builders.unread_base import hold_trained, layout_of, unread_base
from lorafit.launching import launch
from lorafit.training.invariants import remember
from support.tiny import build_base, llama_config
from support.together import lora_model


def described(model: nn.Module) -> list[tuple[Any, ...]]:
    return [(name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in model.named_parameters()]


@pytest.mark.parametrize("tied", [False, True])
def test_only_the_weights_are_missing(tied: bool, tmp_path: Path) -> None:
    base = build_base(tmp_path, config=llama_config(tie_word_embeddings=tied), dtype=torch.bfloat16)
    loaded = AutoModelForCausalLM.from_pretrained(base)
    loaded.model.norm.weight.data = loaded.model.norm.weight.data.float()  # as some architectures keep theirs
    unread = unread_base(layout_of(loaded))
    assert described(unread) == described(loaded)
    assert list(unread.state_dict()) == list(loaded.state_dict())
    assert all(parameter.is_meta for parameter in unread.parameters())
    assert unread.training == loaded.training
    buffers = dict(unread.named_buffers())
    for name, buffer in loaded.named_buffers():
        assert torch.equal(buffers[name], buffer)


def test_what_is_trained_has_an_address_of_its_own(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = lora_model(tiny_base)
    unread = unread_base(layout_of(AutoModelForCausalLM.from_pretrained(tiny_base)))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda directory: unread)
    adapted = lora_model(tiny_base)
    hold_trained(adapted)
    assert described(adapted) == described(loaded)
    addresses = [parameter.data_ptr() for parameter in adapted.parameters() if parameter.requires_grad]
    assert len(addresses) == len(set(addresses)) == 28
    before = remember(adapted)
    assert len(before.moving) == 28 and set(before.frozen.values()) == {None}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [({}, True), ({"FSDP_VERSION": "1"}, False), ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}, False)],
)
def test_weights_are_handed_on_where_the_accelerate_file_says_so(
    changed: dict[str, str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsdp2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    for name, value in (fsdp2 | changed).items():
        monkeypatch.setenv(name, value)
    assert launch.first_hands_weights_on() is expected
