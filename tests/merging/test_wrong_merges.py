"""Every way of merging wrongly that we could think of is caught, in 32 and in 16 bits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support.merge_cases import VARIANTS, Case, case, copied, rewrite, verdict

pytestmark = [
    # peft takes the vectors of lora_bias for matrices that were cut
    pytest.mark.filterwarnings("ignore:Adapter 'default'. 4 LoRA tensor.s. have invalid shape"),
    # what it says of tied weights, which these tests are about
    pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True` and"),
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied after merging"),
]

Tensors = dict[str, torch.Tensor]
Q0 = "model.layers.0.self_attn.q_proj.weight"
DOWN1 = "model.layers.1.mlp.down_proj.weight"
EXPERT = "model.layers.0.block_sparse_moe.experts.2.w1.weight"


def _scaled(names: str, factor: float) -> Callable[[Tensors, Tensors], None]:
    """The update of some tensors times a factor."""

    def change(merged: Tensors, base: Tensors) -> None:
        found = [name for name in merged if names in name and name in base]
        assert found
        for name in found:
            update = merged[name].float() - base[name].float()
            merged[name] = (base[name].float() + factor * update).to(merged[name].dtype)

    return change


def _transposed(name: str) -> Callable[[Tensors, Tensors], None]:
    def change(merged: Tensors, base: Tensors) -> None:
        merged[name] = (base[name].float() + (merged[name].float() - base[name].float()).T).to(merged[name].dtype)

    return change


def _tied_again(merged: Tensors, base: Tensors) -> None:
    merged["lm_head.weight"] = merged["model.embed_tokens.weight"].clone()


def _head_of_the_base(merged: Tensors, base: Tensors) -> None:
    merged["lm_head.weight"] = base["lm_head.weight"].to(merged[Q0].dtype)


def _head_shared_with_embedding(merged: Tensors, base: Tensors) -> None:
    merged["model.embed_tokens.weight"] = merged["lm_head.weight"].clone()


def _norm_of_the_base(merged: Tensors, base: Tensors) -> None:
    """DoRA's magnitude divided by ‖W‖ instead of ‖W + ΔW‖: each row is off by the ratio of the two."""
    weight = merged[Q0].float()
    direction_norm = (base[Q0].float() + 0.1 * (weight - base[Q0].float())).norm(dim=1, keepdim=True)
    merged[Q0] = (weight * direction_norm / weight.norm(dim=1, keepdim=True)).to(merged[Q0].dtype)


def _other_type(merged: Tensors, base: Tensors) -> None:
    to = torch.float16 if merged[Q0].dtype != torch.float16 else torch.bfloat16
    merged |= {name: tensor.to(to) for name, tensor in merged.items()}


def _through_float16(merged: Tensors, base: Tensors) -> None:
    """Rounded twice: through float16 on the way."""
    other = torch.float16 if merged[Q0].dtype == torch.float32 else torch.float8_e5m2
    merged[Q0] = merged[Q0].to(other).to(merged[Q0].dtype)


def _layers_swapped(merged: Tensors, base: Tensors) -> None:
    first, second = Q0, Q0.replace("layers.0", "layers.1")
    updates = [merged[name].float() - base[name].float() for name in (first, second)]
    for name, update in zip((second, first), updates, strict=True):
        merged[name] = (base[name].float() + update).to(merged[name].dtype)


def _half_the_rows(merged: Tensors, base: Tensors) -> None:
    rows = merged[Q0].shape[0] // 2
    merged[Q0][rows:] = base[Q0][rows:]


def _one_row(merged: Tensors, base: Tensors) -> None:
    merged[Q0][3] = base[Q0][3].to(merged[Q0].dtype)


def _token_lost(merged: Tensors, base: Tensors) -> None:
    merged["model.embed_tokens.weight"][77] = base["model.embed_tokens.weight"][77]


def _stranger_touched(merged: Tensors, base: Tensors) -> None:
    merged["model.norm.weight"][0] *= 1.01


def _tensor_lost(merged: Tensors, base: Tensors) -> None:
    del merged[DOWN1]


def _not_a_number(merged: Tensors, base: Tensors) -> None:
    merged[Q0][0, 0] = float("nan")


MUTATIONS: dict[str, tuple[str, Callable[[Tensors, Tensors], None]]] = {
    "one module skipped": ("lora", _scaled(Q0, 0)),
    "alpha taken for alpha/r": ("lora", _scaled("_proj", 4)),
    "alpha off by one": ("lora", _scaled("_proj", 9 / 8)),
    "rsLoRA scale lost": ("rslora", _scaled("_proj", 0.5)),
    "update transposed": ("lora", _transposed(Q0)),
    "update transposed in a Conv1D": ("conv1d", _transposed("transformer.h.0.attn.c_proj.weight")),
    "rank pattern ignored": ("patterns", _scaled("q_proj", 4)),
    "alpha pattern ignored": ("patterns", _scaled("down_proj", 4)),
    "head tied to an adapted embedding": ("tied embedding", _tied_again),
    "embedding tied to an adapted head": ("tied head", _head_shared_with_embedding),
    "DoRA norm of the base": ("dora", _norm_of_the_base),
    "stored in another type": ("lora", _other_type),
    "rounded twice": ("lora", _through_float16),
    "one expert skipped": ("experts", _scaled(EXPERT, 0)),
    "bias of the adapter lost": ("bias", _scaled("0.self_attn.q_proj.bias", 0)),
    "bias of the adapter unscaled": ("bias", _scaled("0.self_attn.q_proj.bias", 0.5)),
    "trained head not taken": ("head", _head_of_the_base),
    "two layers swapped": ("lora", _layers_swapped),
    "sign flipped": ("lora", _scaled("_proj", -1)),
    "adapter added twice": ("lora", _scaled("_proj", 2)),
    "half of the rows": ("lora", _half_the_rows),
    "one row left out": ("lora", _one_row),
    "trained token lost": ("tokens", _token_lost),
    "a weight without adapter changed": ("lora", _stranger_touched),
    "a tensor lost": ("lora", _tensor_lost),
    "not a number": ("lora", _not_a_number),
}

_cases: dict[tuple[str, str], Case] = {}


@pytest.fixture
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """One case for all mutations of a variant: the reference is computed once."""
    variant, dtype = request.param
    if request.param not in _cases:
        _cases[request.param] = case(tmp_path_factory.mktemp("case"), variant, dtype=dtype)
    return _cases[request.param]


def everywhere(names: dict[str, str]) -> pytest.MarkDecorator:
    """Each name with its case, in 16 bits, where rounding could hide something; and in 32."""
    cases = [
        pytest.param(name, (variant, dtype), id=f"{name} in {dtype}", marks=marks)
        for name, variant in names.items()
        for dtype, marks in (("bfloat16", ()), ("float32", pytest.mark.slow))
    ]
    return pytest.mark.parametrize(("name", "made"), cases, indirect=["made"])


@everywhere({variant: variant for variant in VARIANTS})
def test_a_right_merge_passes(name: str, made: Case) -> None:
    report = verdict(made, made.right)
    assert report.passed, report.wrong
    if made.job.dtype == "float32":
        assert report.max_abs_logit_difference < 1e-5 < 1e-3 < report.adapter_effect


@everywhere({name: variant for name, (variant, _) in MUTATIONS.items()})
def test_a_wrong_merge_is_caught(name: str, made: Case, tmp_path: Path) -> None:
    written, merged = copied(made, tmp_path / "written")
    MUTATIONS[name][1](merged, load_file(made.base_files.directory / "model.safetensors"))
    report = verdict(made, rewrite(written, merged))
    assert not report.passed
    print(f"| {name} | {made.job.dtype} | {report.max_abs_logit_difference:.2g} | {report.wrong[0]} |")


@everywhere({"rope": "lora"})
def test_other_settings_are_caught_by_the_logits(name: str, made: Case, tmp_path: Path) -> None:
    shutil.copytree(made.right, tmp_path / "written")
    path = tmp_path / "written" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    report = verdict(made, tmp_path / "written")
    assert not report.passed
    assert len(report.wrong) == 1 and report.wrong[0].startswith("a logit differs by")


@everywhere({"tied": "tied tokens"})
def test_a_model_that_stays_tied_is_right(name: str, made: Case) -> None:
    assert verdict(made, made.right).passed
    assert "lm_head.weight" not in load_file(made.right / "model.safetensors")
