"""Several adapters become one, exactly as peft's own call combines them."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lorafit.errors import AdapterError, LorafitError, ModelError, RecipeError, RunDirError
from lorafit.merging.combine import METHODS, PRUNING, SAME_RANK, CombineResult, combine, weighted
from support.merge_cases import random_adapter
from support.runs import run, small_recipe
from support.tiny import build_base, llama_config

DENSITY = {method: 0.5 for method in PRUNING}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> tuple[Path, Path]:
    """Two of rank 4 on `tiny_base`."""
    directory = tmp_path_factory.mktemp("adapters")
    first = random_adapter(tiny_base, directory / "first", target_modules=["q_proj", "down_proj"])
    second = random_adapter(tiny_base, directory / "second", target_modules=["q_proj", "down_proj"], lora_alpha=2)
    tensors = load_file(second / "adapter_model.safetensors")
    torch.manual_seed(7)
    save_file({k: 0.1 * torch.randn_like(v) for k, v in tensors.items()}, second / "adapter_model.safetensors")
    for adapter in (first, second):  # as nearly all are saved; the draws for the start come before those of dare
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": True}))
    return first, second


def combined(parts: list[tuple[Path, float]], out: Path, base: Path, **keys: Any) -> CombineResult:
    settings: dict[str, Any] = {
        "method": "linear",
        "density": None,
        "rank": None,
        "seed": 3,
        "base": str(base),
        "with_losses": False,
    }
    return combine(parts, out=out, cache_dir=None, **(settings | keys))


def by_peft(base: Path, parts: list[tuple[Path, float]], **keys: Any) -> dict[str, torch.Tensor]:
    """Its own call, on the whole base."""
    model = AutoModelForCausalLM.from_pretrained(base)
    adapted = PeftModel.from_pretrained(model, parts[0][0], adapter_name="a0")
    for index, (path, _) in enumerate(parts[1:], start=1):
        adapted.load_adapter(path, adapter_name=f"a{index}")
    torch.manual_seed(3)
    adapted.add_weighted_adapter([f"a{i}" for i in range(len(parts))], [weight for _, weight in parts], "new", **keys)
    return updates(adapted, "new")


def updates(model: PeftModel, adapter: str) -> dict[str, torch.Tensor]:
    return {
        name: module.get_delta_weight(adapter)  # type: ignore[attr-defined]  # each kind of layer has its own
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, LoraLayer) and adapter in module.scaling
    }


def loaded(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """With plain PEFT."""
    return updates(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter), "default")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_pefts_own_call_and_loads_with_plain_peft(
    method: str, adapters: tuple[Path, Path], tmp_path: Path, tiny_base: Path
) -> None:
    parts = [(adapters[0], 0.7), (adapters[1], -0.3)]
    result = combined(parts, tmp_path / "out", tiny_base, method=method, density=DENSITY.get(method))
    expected = by_peft(tiny_base, parts, combination_type=method, density=DENSITY.get(method))
    got = loaded(tiny_base, tmp_path / "out")
    assert got.keys() == expected.keys() and len(got) == 4
    for name, update in expected.items():
        torch.testing.assert_close(got[name], update, atol=1e-6, rtol=1e-5)
    assert result.rank == (8 if method == "cat" else 4)
    assert (result.off_the_sum < 1e-5) == (method == "cat")
    assert result.inputs == {"first": 0.7, "second": -0.3}


def test_the_report_says_overlap_and_conflict_of_each_module(
    adapters: tuple[Path, Path], tmp_path: Path, tiny_base: Path
) -> None:
    result = combined([(adapters[0], 1), (adapters[1], 2)], tmp_path / "out", tiny_base, method="cat")
    first, second = loaded(tiny_base, adapters[0]), loaded(tiny_base, adapters[1])
    assert [module.module for module in result.modules] == list(first)
    for module in result.modules:
        one, other = first[module.module].flatten(), second[module.module].flatten()
        assert module.cosine == pytest.approx(float(torch.cosine_similarity(one, other, dim=0)), abs=1e-5)
        assert module.sign_conflict == pytest.approx(float((one * other < 0).double().mean()), abs=1e-6)
    left = json.loads((tmp_path / "out" / "combine_report.json").read_text())
    assert left["modules"][0]["module"] == "model.layers.0.self_attn.q_proj"
    against = combined([(adapters[0], 1), (adapters[1], -2)], tmp_path / "against", tiny_base, method="cat")
    assert result.cosine is not None and against.cosine == pytest.approx(-result.cosine, abs=1e-5)


def test_rslora_keeps_its_scale(tmp_path: Path, tiny_base: Path) -> None:
    parts = [
        (random_adapter(tiny_base, tmp_path / name, use_rslora=True, target_modules=["q_proj"]), 0.5) for name in "ab"
    ]
    combined(parts, tmp_path / "out", tiny_base, method="cat")
    got, expected = loaded(tiny_base, tmp_path / "out"), loaded(tiny_base, parts[0][0])
    for name, update in expected.items():  # the two are equal
        torch.testing.assert_close(got[name], update, atol=1e-6, rtol=1e-5)


def test_modules_and_layers_that_only_one_input_has_are_kept(tmp_path: Path, tiny_base: Path) -> None:
    first = random_adapter(tiny_base, tmp_path / "a", target_modules=["q_proj"], layers_to_transform=[0])
    second = random_adapter(tiny_base, tmp_path / "b", target_modules=["v_proj", "q_proj"])
    result = combined([(first, 1), (second, 1)], tmp_path / "out", tiny_base, method="cat")
    got, one, other = (loaded(tiny_base, path) for path in (tmp_path / "out", first, second))
    assert got.keys() == one.keys() | other.keys() and len(got) == 4
    for name, update in got.items():
        torch.testing.assert_close(update, sum(part[name] for part in (one, other) if name in part))
    assert [module.cosine is None for module in result.modules].count(True) == 3


def test_ranks_may_differ_where_the_method_allows(tmp_path: Path, tiny_base: Path) -> None:
    first = random_adapter(tiny_base, tmp_path / "a", r=2)
    second = random_adapter(tiny_base, tmp_path / "b", r=6, rank_pattern={"q_proj": 3})
    for method in METHODS:
        parts, out = [(first, 1.0), (second, 1.0)], tmp_path / method
        if method in SAME_RANK:
            with pytest.raises(
                AdapterError, match=rf"{method} needs one rank in all modules \(a has 2, b has 3 and 6\)"
            ):
                combined(parts, out, tiny_base, method=method, density=DENSITY.get(method))
            assert not out.exists()
        else:
            result = combined(parts, out, tiny_base, method=method, density=DENSITY.get(method))
            assert result.rank == (8 if method == "cat" else 6)
            assert loaded(tiny_base, out).keys() == loaded(tiny_base, first).keys()
    wider = combined([(first, 1), (second, 1)], tmp_path / "wide", tiny_base, method="svd", rank=8)
    assert wider.rank == 8 and wider.off_the_sum < 1e-4, "the sum of rank 2 and 6 has rank 8"
    with pytest.raises(AdapterError, match=r"rank 40 is more than .* can have: write --rank 32"):
        combined([(first, 1), (second, 1)], tmp_path / "too wide", tiny_base, method="svd", rank=40)


def test_the_seed_decides_what_dare_drops(adapters: tuple[Path, Path], tmp_path: Path, tiny_base: Path) -> None:
    parts = [(adapters[0], 1.0), (adapters[1], 1.0)]
    for seed, name in ((1, "a"), (1, "b"), (2, "c")):
        combined(parts, tmp_path / name, tiny_base, method="dare_linear", density=0.5, seed=seed)
    first, same, other = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "abc")
    assert first == same != other


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"use_dora": True}, "has DoRA's magnitudes"),
        ({"modules_to_save": ["lm_head"]}, "has whole trained modules"),
        ({"trainable_token_indices": [3]}, "has trained tokens"),
    ],
)
def test_what_peft_would_leave_out_is_refused(
    settings: dict[str, Any], said: str, adapters: tuple[Path, Path], tmp_path: Path, tiny_base: Path
) -> None:
    odd = random_adapter(tiny_base, tmp_path / "odd", **settings)
    with pytest.raises(AdapterError, match=f"{said}.*, which cannot be combined"):
        combined([(adapters[0], 1), (odd, 1)], tmp_path / "out", tiny_base)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"method": "ties"}, "--density: ties keeps a share of the entries"),
        ({"method": "ties", "density": 1.5}, "--density: ties keeps a share of the entries"),
        ({"method": "cat", "density": 0.5}, "--density: cat keeps all entries: leave it out"),
        ({"method": "linear", "rank": 8}, "--rank: only svd, ties_svd, dare_linear_svd choose a rank"),
        ({"method": "svd", "rank": 0}, "--rank: only svd, ties_svd, dare_linear_svd choose a rank"),
        ({"method": "slerp"}, "--method: 'slerp' is none of linear, cat"),
    ],
)
def test_options_that_do_not_fit_the_method_are_refused(
    keys: dict[str, Any], said: str, adapters: tuple[Path, Path], tmp_path: Path, tiny_base: Path
) -> None:
    with pytest.raises(RecipeError) as caught:
        combined([(adapters[0], 1), (adapters[1], 1)], tmp_path / "out", tiny_base, **keys)
    assert str(caught.value).startswith(said)


def test_one_adapter_or_the_same_twice_is_refused(adapters: tuple[Path, Path], tmp_path: Path, tiny_base: Path) -> None:
    with pytest.raises(RecipeError, match="takes two adapters or more"):
        combined([(adapters[0], 1)], tmp_path / "out", tiny_base)
    with pytest.raises(RecipeError, match="named twice"):
        combined([(adapters[0], 1), (adapters[0], 1)], tmp_path / "out", tiny_base)


def test_weights_are_read_off_the_end_of_a_path(tmp_path: Path) -> None:
    assert weighted("runs/a:0.7") == (Path("runs/a"), 0.7)
    assert weighted("runs/a:-2e-1") == (Path("runs/a"), -0.2)
    assert weighted("runs/a") == (Path("runs/a"), 1.0)
    (tmp_path / "a:2").mkdir()
    assert weighted(f"{tmp_path}/a:2") == (tmp_path / "a:2", 1.0)
    for text in ("runs/a:", "runs/a:much", "runs/a:nan", "runs/a:0", ":0.5"):
        with pytest.raises(RecipeError, match="is no weight"):
            weighted(text)


def test_an_output_that_exists_is_refused_and_failures_leave_nothing(
    adapters: tuple[Path, Path], tmp_path: Path, tiny_base: Path
) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(RunDirError, match="exists already"):
        combined([(adapters[0], 1), (adapters[1], 1)], tmp_path / "out", tiny_base)
    with pytest.raises(LorafitError):
        combined([(adapters[0], 1), (tmp_path / "nowhere", 1)], tmp_path / "other", tiny_base)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_adapters_of_two_bases_are_refused(tmp_path: Path, tiny_base: Path) -> None:
    other = build_base(tmp_path / "base", config=llama_config(rms_norm_eps=1e-3))
    for name, base in (("a", tiny_base), ("b", other)):
        (tmp_path / name).mkdir()
        run(small_recipe(tmp_path / name, base))
    with pytest.raises(ModelError, match="adapters of two bases have no sum"):
        combine(
            [(tmp_path / "a" / "run", 1.0), (tmp_path / "b" / "run", 1.0)],
            out=tmp_path / "out", method="cat", density=None, rank=None, seed=0, base=None, with_losses=False,
            cache_dir=None,
        )  # fmt: skip


def test_runs_are_compared_on_their_held_out_rows(tmp_path: Path, tiny_base: Path) -> None:
    results = []
    for name, rate in (("a", 5e-3), ("b", 1e-2)):
        (tmp_path / name).mkdir()
        results.append(run(small_recipe(tmp_path / name, tiny_base, training={"learning_rate": rate}))[0])
    parts = [(Path(result.run), 0.5) for result in results]
    result = combine(
        parts, out=tmp_path / "out", method="cat", density=None, rank=None, seed=0, base=None, with_losses=True,
        cache_dir=tmp_path / "cache",
    )  # fmt: skip
    assert [loss.rows for loss in result.losses] == [8, 8]
    for loss, trained, name in zip(result.losses, results, result.inputs, strict=True):
        assert loss.rows_of == name
        assert loss.losses[name] == pytest.approx(trained.eval_loss_after, abs=1e-4)
        assert loss.losses["combined"] != loss.losses[name]
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    mode = stat.S_IMODE((tmp_path / "out" / "adapter_model.safetensors").stat().st_mode)
    assert mode == stat.S_IMODE((tmp_path / "out" / "adapter_config.json").stat().st_mode)
    assert str(tmp_path) not in (tmp_path / "out" / "adapter_config.json").read_text()
