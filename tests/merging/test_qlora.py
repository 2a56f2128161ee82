"""An adapter of a 4-bit base is merged into 16 bits: the original's, or those its 4 bits stand for."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lorafit.builders.base_model import check_base_model
from lorafit.errors import AdapterError
from lorafit.lines import heard
from lorafit.merging import quantized_base
from lorafit.merging.adapter_files import read_adapter
from lorafit.merging.merge import MergeResult, merge
from lorafit.merging.quantized_base import BaseDifference, settle_base, write_dequantized
from lorafit.merging.verification_prompts import Prompts
from lorafit.recipe import load
from lorafit.recipe.sections import MergeSection, ModelSection
from support.merge_cases import random_adapter
from support.runs import QUICK, logits, run, small_recipe
from support.tiny import build_base

pytestmark = pytest.mark.xdist_group("merging qlora")  # its fixtures cost too much to be made by each worker

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_base(tmp_path_factory.mktemp("qlora") / "base", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """A QLoRA run."""
    directory = tmp_path_factory.mktemp("trained")
    training = {"max_steps": 12, "learning_rate": 2e-2}
    result, _ = run(small_recipe(directory, base, quantization=NF4, training=QUICK | training))
    return Path(result.run)


def merged(run_dir: Path, out: Path, said: list[str] | None = None, **keys: Any) -> MergeResult:
    settings: dict[str, Any] = {"dtype": None, "base": None, "onto": None, "verify": False}
    with heard((said if said is not None else []).append):
        return merge(
            run_dir,
            out=out,
            max_shard_size=None,
            progress=lambda total: lambda done: None,
            cache_dir=None,
            **(settings | keys),
        )


def quantized(base: Path) -> Any:
    config = BitsAndBytesConfig(**NF4, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="bfloat16")
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.bfloat16)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


def test_the_dequantised_base_is_what_the_four_bits_stand_for(trained: Path, base: Path, tmp_path: Path) -> None:
    files = check_base_model(ModelSection(model_name_or_path=str(base)))
    written = write_dequantized(read_adapter(trained), files, tmp_path / "base16")
    tensors, original = load_file(tmp_path / "base16" / "model.safetensors"), load_file(base / "model.safetensors")
    assert tensors.keys() == original.keys() == written.tensors.keys()
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    running = quantized(base)
    name = "model.layers.0.mlp.up_proj"
    unit = torch.eye(64, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(running.get_submodule(name)(unit).T, tensors[f"{name}.weight"])
    assert not torch.equal(tensors[f"{name}.weight"], original[f"{name}.weight"])
    assert torch.equal(tensors["lm_head.weight"], original["lm_head.weight"]), "the head is not quantised"
    assert "quantization_config" not in written.config


def test_nothing_of_the_dequantised_model_stays_in_memory(
    trained: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[weakref.ref[Any]] = []
    emptied: list[bool] = []
    load = quantized_base.load_base_model

    def watched(*rest: Any, **named: Any) -> Any:
        model = load(*rest, **named)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(quantized_base, "load_base_model", watched)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(loaded[0]() is None))
    files = check_base_model(ModelSection(model_name_or_path=str(base)))
    write_dequantized(read_adapter(trained), files, tmp_path / "base16")
    assert emptied == [True]


def test_a_base_that_does_not_fit_on_the_gpu_is_dequantised_on_the_cpu(
    trained: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices: list[Any] = []
    load = quantized_base.load_base_model

    def without_room(*rest: Any, device_map: Any, **named: Any) -> Any:
        devices.append(device_map)
        if device_map == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return load(*rest, device_map=device_map, **named)

    monkeypatch.setattr(quantized_base, "load_base_model", without_room)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    files = check_base_model(ModelSection(model_name_or_path=str(base)))
    adapter = read_adapter(trained)
    monkeypatch.setattr(quantized_base.torch.cuda, "is_available", lambda: not devices)
    write_dequantized(adapter, files, tmp_path / "base16")
    assert devices == ["cuda", None]


def test_both_bases_are_measured_and_auto_takes_the_nearer(trained: Path, base: Path, tmp_path: Path) -> None:
    said: list[str] = []
    result = merged(trained, tmp_path / "merged", said, onto="auto", verify=True)
    assert {one.onto for one in result.bases} == {"original", "dequantized"}
    nearer = min(result.bases, key=lambda one: one.mean_kl)
    assert result.onto == nearer.onto == "dequantized"
    lines = [line for line in said if "mean KL" in line]
    assert len(lines) == 2 and any(line.startswith("merge: onto the dequantized base, which") for line in said)
    assert not (tmp_path / "merged" / "dequantized").exists()
    assert json.loads((tmp_path / "merged" / "merge_report.json").read_text())["onto"] == "dequantized"
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}, "never into 4 bits"
    running = logits(PeftModel.from_pretrained(quantized(base), trained / "adapter").eval()).float()
    got = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32))
    merged(trained, tmp_path / "original", onto="original")
    other = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "original", dtype=torch.float32))
    assert (got - running).abs().max() < (other - running).abs().max() / 2


def test_after_a_quantised_run_the_nearer_base_is_taken_unless_something_else_is_asked_for(
    trained: Path, tmp_path: Path
) -> None:
    result = merged(trained, tmp_path / "merged")
    assert {one.onto for one in result.bases} == {"original", "dequantized"}
    assert result.onto == min(result.bases, key=lambda one: one.mean_kl).onto


def test_the_recipe_chooses_where_the_command_line_does_not(trained: Path, tmp_path: Path) -> None:
    path = trained / "recipe.yaml"
    text = path.read_text()
    try:
        path.write_text(f"{text}merge: {{base: dequantized, dtype: float32, verify: false}}\n")
        assert load(path).recipe.merge == MergeSection(base="dequantized", dtype="float32", verify=False)
        result = merged(trained, tmp_path / "recipe", verify=None)
        assert (result.onto, result.bases, result.top1_agreement) == ("dequantized", (), None)
        tensors = load_file(tmp_path / "recipe" / "model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
        result = merged(trained, tmp_path / "flags", onto="original", dtype="bfloat16")
        assert result.onto == "original"
        tensors = load_file(tmp_path / "flags" / "model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    finally:
        path.write_text(text)


def test_the_better_base_is_advised_where_another_was_asked_for(
    trained: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = check_base_model(ModelSection(model_name_or_path=str(base)))
    for nearer, other in (("original", "dequantized"), ("dequantized", "original")):
        found = (BaseDifference(other, 0.2, 1.0, 0.9), BaseDifference(nearer, 0.1, 1.0, 0.9))
        monkeypatch.setattr(quantized_base, "compare_bases", lambda *_, found=found, **__: found)
        for onto, taken, advised in ((nearer, nearer, False), (other, other, True), ("auto", nearer, False)):
            said: list[str] = []
            with heard(said.append):
                bases, chosen, chosen_files = settle_base(
                    read_adapter(trained), files, onto=onto, dtype=None, prompts=Prompts(((1, 2),), ""),
                    directory=tmp_path / f"{nearer}-{onto}",
                )  # fmt: skip
            assert (bases, chosen) == (found, taken)
            assert (chosen_files is files) == (taken == "original")
            assert any(line.startswith(f"advice: the {nearer} base is nearer") for line in said) == advised


def test_nothing_is_dequantised_where_nothing_was_quantised(tmp_path: Path, base: Path) -> None:
    plain = random_adapter(base, tmp_path / "plain")
    with pytest.raises(AdapterError, match=r"carries no recipe, so there is nothing to dequantise: .*--onto original"):
        merged(plain, tmp_path / "out", base=str(base), onto="auto")
    result, _ = run(small_recipe(tmp_path, base))
    with pytest.raises(AdapterError, match="was trained on a base that was not quantised"):
        merged(Path(result.run), tmp_path / "out", onto="dequantized")
    assert merged(Path(result.run), tmp_path / "out").onto == "original"


def test_eight_bits_are_dequantised_too(tmp_path: Path, base: Path) -> None:
    result, _ = run(small_recipe(tmp_path, base, quantization={"load_in_8bit": True}))
    merged(Path(result.run), tmp_path / "out", onto="dequantized")
    merged(Path(result.run), tmp_path / "original", onto="original")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "original"))
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(one[name], other[name])
    torch.testing.assert_close(one[name], other[name], atol=2e-3, rtol=0.05)
