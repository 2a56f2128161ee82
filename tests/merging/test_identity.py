"""A merge takes the base and the adapter that training left, and no other."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lorafit.builders.base_model import check_base_model
from lorafit.errors import AdapterError, LorafitError, ModelError
from lorafit.lines import heard
from lorafit.merging.adapter_files import read_adapter
from lorafit.merging.identity import refuse_wrong_base
from lorafit.recipe.sections import ModelSection
from support.runs import run, small_recipe
from support.tiny import build_base, llama_config


def judged(adapter: Path, base: Path) -> list[str]:
    """What is said of an adapter (a run, or a plain one) and a base that are taken."""
    said: list[str] = []
    files = check_base_model(ModelSection(model_name_or_path=str(base)))
    with heard(said.append):
        refuse_wrong_base(read_adapter(adapter, base=str(base)), files)
    return said


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A run on `tiny_base`."""
    directory = tmp_path_factory.mktemp("trained")
    run(small_recipe(directory, tiny_base))
    return directory


@pytest.fixture
def run_copy(trained: Path, tmp_path: Path) -> Path:
    """A run to break."""
    shutil.copytree(trained, tmp_path / "copy")
    return tmp_path / "copy" / "run"


def plain(directory: Path, base: Path, **settings: Any) -> Path:
    """A plain PEFT adapter with a random update."""
    model = AutoModelForCausalLM.from_pretrained(base)
    keys: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **(keys | settings))).save_pretrained(str(directory))
    return directory


def edit_config(adapter: Path, **keys: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def edit_tensors(adapter: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = adapter / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def edit_base(base: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a base with other weights."""
    shutil.copytree(base, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_the_base_of_training_is_taken_without_a_word(trained: Path, tiny_base: Path, tmp_path: Path) -> None:
    assert judged(trained / "run", tiny_base) == []
    shutil.copytree(tiny_base, tmp_path / "elsewhere")
    assert judged(trained / "run", tmp_path / "elsewhere") == []


def test_a_better_model_card_beside_the_adapter_does_not_matter(run_copy: Path, tiny_base: Path) -> None:
    (run_copy / "adapter" / "README.md").write_text("# Better")
    assert judged(run_copy, tiny_base) == []


def _retrained(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"] += 1e-3


def other_bases(base: Path, directory: Path) -> dict[str, Path]:
    bases = {"weights": edit_base(base, directory / "weights", _retrained)}
    bases["deeper"] = build_base(directory / "deeper", config=llama_config(num_hidden_layers=3))
    bases["shallower"] = build_base(directory / "shallower", config=llama_config(num_hidden_layers=1))
    bases["merged"] = edit_base(base, directory / "merged", _retrained)
    (bases["merged"] / "merge_report.json").write_text("{}")
    bases["settings"] = Path(shutil.copytree(base, directory / "settings"))
    config = json.loads((base / "config.json").read_text())
    (bases["settings"] / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    return bases


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("weights", "is not the base of training: its weights or its config.json differ"),
        ("settings", "is not the base of training: its weights or its config.json differ"),
        ("deeper", "has 30 tensors, the base of training 21: layers more or fewer"),
        ("shallower", "has 12 tensors, the base of training 21: layers more or fewer"),
        ("merged", "is a model that an adapter was merged into already"),
    ],
)
def test_another_base_is_refused_in_one_line(
    kind: str, said: str, trained: Path, tiny_base: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError) as caught:
        judged(trained / "run", other_bases(tiny_base, tmp_path)[kind])
    assert caught.value.exit_code == 4
    assert len(caught.value.problems) == 1
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_another_revision_is_named(run_copy: Path, tiny_base: Path, tmp_path: Path) -> None:
    path = run_copy / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["base"] |= {"commit": "aaa", "name": "org/name", "fingerprint": "0" * 64}
    path.write_text(json.dumps(manifest))
    files = check_base_model(ModelSection(model_name_or_path=str(tiny_base)))
    other = dataclasses.replace(files, revision="bbb")
    with pytest.raises(ModelError, match="is at commit bbb, the adapter was trained on aaa; use org/name at aaa"):
        refuse_wrong_base(read_adapter(run_copy), other)


CONFIG_EDITS = {
    "use_rslora": True,
    "use_dora": True,
    "lora_alpha": 99,
    "fan_in_fan_out": True,
    "r": 8,
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"q_proj": 2},
    "target_modules": ["q_proj"],
    "layers_to_transform": [0],
    "bias": "all",
}


@pytest.mark.parametrize("key", CONFIG_EDITS)
def test_a_flag_flipped_after_training_is_refused(key: str, run_copy: Path, tiny_base: Path) -> None:
    edit_config(run_copy / "adapter", **{key: CONFIG_EDITS[key]})
    with pytest.raises(AdapterError, match=r"adapter_config.json: was changed after training"):
        judged(run_copy, tiny_base)


def _renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.replace("layers.0.self_attn.q_proj", "layers.0.self_attn.x_proj"): t for name, t in tensors.items()}


def _deleted(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if "layers.1.mlp.down_proj" not in name}


def _one_flipped(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    first = next(iter(tensors))
    return tensors | {first: -tensors[first]}


@pytest.mark.parametrize("change", [_renamed, _deleted, _one_flipped])
def test_tensors_changed_after_training_are_refused(
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], run_copy: Path, tiny_base: Path
) -> None:
    edit_tensors(run_copy / "adapter", change)
    with pytest.raises(AdapterError, match=r"adapter_model.safetensors: was changed after training"):
        judged(run_copy, tiny_base)


def test_a_broken_manifest_is_refused(run_copy: Path, tiny_base: Path) -> None:
    (run_copy / "manifest.json").write_text("{")
    with pytest.raises(AdapterError, match=r"manifest.json: cannot be read"):
        judged(run_copy, tiny_base)


def test_a_plain_adapter_is_taken_with_a_word_on_what_was_not_checked(tmp_path: Path, tiny_base: Path) -> None:
    (warning,) = judged(plain(tmp_path / "plain", tiny_base), tiny_base)
    assert warning.startswith("warning: ")
    assert "not checked: whether" in warning and warning.endswith(
        "is the base it was trained on, in that revision, and whether it was edited since"
    )


def _with_nan(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    tensors[min(tensors)][0, 0] = float("nan")
    return tensors


def _zero(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def _zero_b(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) if "lora_B" in name else tensor for name, tensor in tensors.items()}


def _empty_b(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor[:0] if "lora_B" in name else tensor for name, tensor in tensors.items()}


def _no_q(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if "q_proj" not in name}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_with_nan, "holds NaN or infinity in base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"),
        (_zero, "is all zero: it changes nothing"),
        (_zero_b, "is all zero: it changes nothing"),
        (_empty_b, "holds empty tensors"),
        (lambda tensors: {}, "holds no tensors"),
        (_renamed, "has no tensors for self_attn.q_proj in layer 0"),
        (_deleted, "has no tensors for mlp.down_proj in layer 1"),
        (_no_q, "names 'q_proj' in target_modules and has no tensors for it"),
    ],
)
def test_a_plain_adapter_that_no_training_leaves_is_refused(
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], said: str, tmp_path: Path, tiny_base: Path
) -> None:
    edit_tensors(plain(tmp_path / "plain", tiny_base), change)
    with pytest.raises(AdapterError, match=re.escape(said)) as caught:
        judged(tmp_path / "plain", tiny_base)
    assert len(caught.value.problems) == 1


def test_a_plain_adapter_in_a_pickle_is_refused(tmp_path: Path, tiny_base: Path) -> None:
    adapter = plain(tmp_path / "plain", tiny_base)
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match="a pickle that can run code"):
        judged(adapter, tiny_base)


@pytest.mark.parametrize(("layers", "said"), [(1, "in layer 1, which"), (3, "in layer 2 of")])
def test_a_plain_adapter_of_another_depth_is_refused(layers: int, said: str, tmp_path: Path, tiny_base: Path) -> None:
    base = build_base(tmp_path / "base", config=llama_config(num_hidden_layers=layers))
    with pytest.raises(AdapterError, match=said):
        judged(plain(tmp_path / "plain", tiny_base), base)


@pytest.mark.parametrize(
    "settings",
    [
        {"layers_to_transform": [1]},
        {"exclude_modules": ["model.layers.0.self_attn.q_proj"]},
        {"target_modules": r".*\.1\..*\.q_proj"},
        {"target_modules": ["layers.0.self_attn.q_proj"]},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ],
)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_a_plain_adapter_that_chooses_its_modules_is_taken(
    settings: dict[str, Any], tmp_path: Path, tiny_base: Path
) -> None:
    assert len(judged(plain(tmp_path / "plain", tiny_base, **settings), tiny_base)) == 1


def test_an_adapter_is_not_merged_twice(tmp_path: Path, tiny_base: Path) -> None:
    adapter = plain(tmp_path / "plain", tiny_base)
    merged = edit_base(tiny_base, tmp_path / "merged", _retrained)
    digest = hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()
    (merged / "merge_report.json").write_text(json.dumps({"adapter_sha256": digest}))
    with pytest.raises(LorafitError, match="this adapter is merged into it already"):
        judged(adapter, merged)
    (merged / "merge_report.json").write_text(json.dumps({"adapter_sha256": "0" * 64}))
    assert len(judged(adapter, merged)) == 1
