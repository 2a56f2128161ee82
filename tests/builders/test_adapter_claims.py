"""An adapter whose files say something else than peft reads of them gets one verdict from every command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lorafit.builders.model_modules import weight_of
from lorafit.cli import _exit_code
from lorafit.evaluation.models import models
from lorafit.evaluation.subject import read_subject
from lorafit.lines import heard
from lorafit.merging.adapter_claims import name_in_peft
from lorafit.recipe.library_keys import LIBRARY_KEYS, NOT_FOR_RECIPES
from lorafit.recipe.sections import LoraSection
from support.eval_cases import changed_json
from support.random_adapters import logits, merged, random_adapter
from support.tiny import byte_tokenizer, sums, write_jsonl

pytestmark = pytest.mark.filterwarnings("ignore:.*save_embedding_layers.*:UserWarning")


@pytest.fixture
def adapter(tmp_path: Path, tiny_base: Path) -> Path:
    """On `tiny_base`."""
    directory = random_adapter(tmp_path / "adapter", tiny_base, target_modules=["q_proj", "down_proj"])
    changed_json(directory / "adapter_config.json", init_lora_weights=True)
    return directory


def verdicts(adapter: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, tuple[int, list[str]]]:
    """Exit code and lines of each command that reads an adapter, which leaves nothing where it refuses."""
    beside = adapter.parent
    other = beside / "other"
    if not other.exists():
        random_adapter(other, base, target_modules=["q_proj", "down_proj"])
        changed_json(other / "adapter_config.json", init_lora_weights=True)
    if not (beside / "rows.jsonl").exists():
        write_jsonl(beside / "rows.jsonl", sums(4))
    commands = {
        "merge": ["merge", str(adapter), "--base", str(base), "--out", str(beside / "merged"), "--no-verify"],
        "combine": ["combine", f"{other}:1", f"{adapter}:1", "--base", str(base), "--out", str(beside / "combined")],
        "eval": ["eval", str(adapter), "--base", str(base), "--data", str(beside / "rows.jsonl")],
    }
    found = {}
    for name, command in commands.items():
        capsys.readouterr()
        code = _exit_code(command)
        said = capsys.readouterr().err.splitlines()
        found[name] = (code, [line for line in said if not line.startswith(("warning:", "note:"))])
    return found


def refused_alike(adapter: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that all commands say."""
    found = verdicts(adapter, base, capsys)
    assert {name: code for name, (code, _) in found.items()} == {"merge": 4, "combine": 4, "eval": 4}, found
    lines = {line for _, said in found.values() for line in said}
    assert len(lines) == 1, lines
    assert not (adapter.parent / "merged").exists() and not (adapter.parent / "combined").exists()
    return lines.pop()


def renamed(adapter: Path, rename: Callable[[str], str]) -> Path:
    path = adapter / "adapter_model.safetensors"
    save_file({rename(name): tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    return adapter


Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
WRAPPED: dict[str, Callable[[str], str]] = {
    "twice": lambda name: f"base_model.model.{name}",
    "unwrapped": lambda name: name.removeprefix("base_model.model."),
    "compiled": lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
    "compiled outside": lambda name: f"_orig_mod.{name}",
    "distributed": lambda name: f"module.{name}",
    "with the adapter's name": lambda name: name.replace(".weight", ".default.weight"),
    "with another adapter's name": lambda name: name.replace(".weight", ".mine.weight"),
}


@pytest.mark.parametrize("way", WRAPPED)
def test_tensors_under_other_names_are_refused_with_the_right_ones(
    way: str, adapter: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused_alike(renamed(adapter, WRAPPED[way]), tiny_base, capsys)
    assert "calls 8 of its 8 tensors otherwise than peft, which would pass over them: rename" in line
    wrong = line.split("rename ")[1].split(" to ")[0]
    assert f" to {name_in_peft(wrong)}, and" in line and name_in_peft(WRAPPED[way](Q_PROJ)) == Q_PROJ


def test_kohyas_names_are_refused(adapter: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def kohya(name: str) -> str:
        flat = name.removeprefix("base_model.model.").replace(".lora_A", "@lora_down").replace(".lora_B", "@lora_up")
        return "lora_unet_" + flat.replace(".", "_").replace("@", ".")

    assert "kohya's layout" in refused_alike(renamed(adapter, kohya), tiny_base, capsys)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.q_proj.lora_magnitude_vector",
        "model.layers.0.q_proj.lora_B.bias",
        "model.embed_tokens.lora_embedding_A",
        "model.layers.0.mlp.experts.base_layer.lora_A.weight",
        "model.embed_tokens.token_adapter.trainable_tokens_delta",
        "lm_head.modules_to_save.weight",
        "model.embed_tokens.base_layer.weight",
    ],
)
def test_names_that_peft_writes_itself_stay(name: str) -> None:
    assert name_in_peft(f"base_model.model.{name}") == f"base_model.model.{name}"


def test_an_adapter_of_other_layers_is_refused_by_all(
    adapter: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The names are peft's, the module is not the base's."""
    renamed(adapter, lambda name: name.replace("down_proj", "gone_proj"))
    found = verdicts(adapter, tiny_base, capsys)
    assert [code for code, _ in found.values()] == [4, 4, 4]
    assert all(len(said) == 1 for _, said in found.values())


def test_a_target_that_the_base_does_not_have_is_noted(
    adapter: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed_json(adapter / "adapter_config.json", target_modules=["q_proj", "down_proj", "c_attn"])
    notes: list[str] = []
    with heard(notes.append):
        read_subject(str(adapter), data=_rows(adapter), merged=None, base=str(tiny_base), overrides=())
    assert any("names 'c_attn' in target_modules, which" in note for note in notes)
    found = verdicts(adapter, tiny_base, capsys)
    assert [code for code, _ in found.values()] == [0, 0, 0], found


def _rows(adapter: Path) -> Path:
    write_jsonl(adapter.parent / "rows.jsonl", sums(4))
    return adapter.parent / "rows.jsonl"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lora_magic_scale": 3.0}, "lora_magic_scale: 3.0 is not known to the peft installed"),
        ({"lora_magic": True, "peft_version": "9.9"}, "saved by peft 9.9: install that one, or a newer"),
        ({"lora_alpha": None}, "lora_alpha is None, not a number"),
        ({"lora_alpha": "16"}, "lora_alpha is '16', not a number"),
        ({"r": float("nan")}, "r is nan, not a number"),
    ],
)
def test_a_setting_that_peft_would_pass_over_is_refused(
    settings: dict[str, Any], said: str, adapter: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed_json(adapter / "adapter_config.json", **settings)
    assert said in refused_alike(adapter, tiny_base, capsys)


@pytest.mark.parametrize("key", ["lora_alpha", "r"])
def test_a_setting_that_is_absent_is_not_pefts_default(
    key: str, adapter: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    del config[key]
    path.write_text(json.dumps(config))
    assert f"has no {key}, for which peft would take 8" in refused_alike(adapter, tiny_base, capsys)


def test_unknown_settings_that_say_nothing_are_taken(adapter: Path, tiny_base: Path) -> None:
    changed_json(adapter / "adapter_config.json", magic=None, use_magic=False, magic_config={}, magic_layers=[])
    assert merged(adapter, adapter.parent / "merged", base=str(tiny_base)).streamed


def test_eval_measures_what_merge_merges_of_a_vocabulary_that_grew(tmp_path: Path, tiny_base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    model.resize_token_embeddings(270)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    with torch.no_grad():
        weight_of(model.get_input_embeddings())[264:] += 0.1
    larger = get_peft_model(model, config)
    larger.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=True)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained(tmp_path / "adapter")
    merged(tmp_path / "adapter", tmp_path / "merged", base=str(tiny_base))
    subject = read_subject(
        str(tmp_path / "adapter"), data=_rows(tmp_path / "adapter"), merged=tmp_path / "merged",
        base=str(tiny_base), overrides=["model.dtype=float32"],
    )  # fmt: skip
    found = {name: logits(model) for name, model in models(subject, with_base=False)}
    assert found["adapter"].shape[-1] == 270
    assert (found["adapter"] - found["merged"]).abs().max() <= 1e-4
    assert (found["adapter"] - logits(larger.eval())).abs().max() <= 1e-4


def test_combine_refuses_a_vocabulary_that_grew_in_one_line(
    adapter: Path, tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    for name in ("model.embed_tokens", "lm_head"):
        tensors[f"base_model.model.{name}.weight"] = torch.randn(270, 64)
    save_file(tensors, path, {"format": "pt"})
    code, said = verdicts(adapter, tiny_base, capsys)["combine"]
    assert code == 4 and len(said) == 2  # one of each matrix
    assert (
        "model.embed_tokens.weight (270 x 64 where the base has 264 rows), which cannot be combined"
        in said[1] + said[0]
    )
    del tensors["base_model.model.lm_head.weight"]
    save_file(tensors, path, {"format": "pt"})
    found = verdicts(adapter, tiny_base, capsys)
    assert [code for code, _ in found.values()] == [4, 4, 4], "half of the rows are missing"


def test_an_embedding_that_peft_saved_unchanged_can_be_combined(
    adapter: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.lm_head.weight"] = load_file(tiny_base / "model.safetensors")["lm_head.weight"]
    save_file(tensors, path, {"format": "pt"})
    assert verdicts(adapter, tiny_base, capsys)["combine"][0] == 0


def test_layers_that_are_repeated_are_not_merged(
    adapter: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random_adapter(adapter, tiny_base, target_modules=["q_proj"], layer_replication=[(0, 2), (1, 2)])
    changed_json(adapter / "adapter_config.json", init_lora_weights=True)
    found = verdicts(adapter, tiny_base, capsys)
    assert [code for code, _ in found.values()] == [4, 4, 0], found
    assert "use it with peft, unmerged" in found["merge"][1][0]
    assert "repeats layers of the base" in found["combine"][1][0]


def test_a_base_that_moved_is_named_with_the_option(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed_json(adapter / "adapter_config.json", base_model_name_or_path=str(tmp_path / "moved"))
    for command in (["merge", str(adapter)], ["eval", str(adapter), "--data", str(_rows(adapter))]):
        assert _exit_code(command) == 4
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1 and "names it as the base model: say where that is with --base" in said[0]


def test_an_adapter_in_a_folder_of_its_name_is_offered(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    adapter.rename(tmp_path / "out" / "mine")
    assert _exit_code(["merge", str(tmp_path / "out")]) == 4
    assert f"in folders of their names: name {tmp_path / 'out' / 'mine'}" in capsys.readouterr().err


def test_every_further_argument_of_lora_is_one_that_was_tried() -> None:
    left = LIBRARY_KEYS["lora"] - LoraSection.model_fields.keys() - NOT_FOR_RECIPES["lora"].keys()
    assert left == {"ensure_weight_tying"}, "try it in tests/recipe/test_keys_reach_the_library.py, or refuse it"
