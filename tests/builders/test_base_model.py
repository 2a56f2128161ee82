"""The base model on disk: what is refused before a weight is read, and that every weight is read."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    MistralConfig,
    MixtralConfig,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3MoeConfig,
)

from lorafit.builders.architectures import model_types, types_with_model
from lorafit.builders.base_model import check_base_model, load_base_model
from lorafit.builders.model_files import BaseModelFiles
from lorafit.builders.weight_files import fingerprint, tensor_table
from lorafit.errors import MachineError, ModelError
from lorafit.recipe.sections import ModelSection, QuantizationSection
from support.tiny import build_base, llama_config

SMALL: dict[str, Any] = {"vocab_size": 264, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
GROUPED = {**SMALL, **IDS, "intermediate_size": 128, "num_key_value_heads": 2, "max_position_embeddings": 512}
ARCHITECTURES: dict[str, PretrainedConfig] = {
    "llama": llama_config(),
    "llama_tied": llama_config(tie_word_embeddings=True),
    "gpt2": GPT2Config(vocab_size=264, n_embd=64, n_layer=2, n_head=4, n_positions=128, **IDS),
    "qwen2": Qwen2Config(**GROUPED),
    "mistral": MistralConfig(**GROUPED),
    "gemma2": Gemma2Config(**GROUPED, head_dim=16),
    "phi": PhiConfig(**SMALL, **IDS, intermediate_size=128),
    "falcon": FalconConfig(**SMALL, **IDS, multi_query=True),
    "gpt_neox": GPTNeoXConfig(**SMALL, **IDS, intermediate_size=128),
    "bloom": BloomConfig(vocab_size=264, hidden_size=64, n_layer=2, n_head=4, **IDS),
    "mixtral": MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": Qwen3MoeConfig(  # type: ignore[call-arg]  # head_dim, which its table of fields leaves out
        **GROUPED, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, mlp_only_layers=[]
    ),
}
assert len(ARCHITECTURES) == 12


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directory of a tiny model of an architecture, built once."""
    root = tmp_path_factory.mktemp("bases")

    def base(name: str) -> Path:
        directory = root / name
        return directory if directory.is_dir() else build_base(directory, config=ARCHITECTURES[name])

    return base


@pytest.fixture
def copied(tiny_base: Path, tmp_path: Path) -> Path:
    """A copy of the tiny base, to break."""
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


def section(directory: Path | str, **keys: Any) -> ModelSection:
    return ModelSection(model_name_or_path=str(directory), **keys)


def checked(directory: Path | str, quantization: QuantizationSection | None = None, **keys: Any) -> BaseModelFiles:
    return check_base_model(section(directory, **keys), quantization=quantization)


def refusal(directory: Path | str, quantization: QuantizationSection | None = None, **keys: Any) -> str:
    """The one line a base model is refused with."""
    with pytest.raises(ModelError) as caught:
        checked(directory, quantization, **keys)
    assert len(caught.value.problems) == 1
    line = str(caught.value)
    assert "\n" not in line
    return line


def change_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; `...` removes one."""
    facts = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in facts.items() if value is not ...}))


def in_two_files(directory: Path) -> Path:
    """The weights cut in two, with their index, as large models come."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory, max_shard_size="150KB")
    assert (directory / "model.safetensors.index.json").is_file()
    return directory


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_checked_and_loaded_with_the_weights_of_its_files(
    bases: Callable[[str], Path], name: str
) -> None:
    files = checked(bases(name))
    assert files.vocab_size == 264
    assert files.stop_token_ids == {2}
    assert files.total_bytes == sum(
        path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little")
        for path in files.directory.glob("*.safetensors")
    )
    model = load_base_model(section(bases(name)), None, dtype="auto", device_map=None)
    expected = AutoModelForCausalLM.from_pretrained(bases(name))
    assert not next(iter(model.parameters())).is_meta
    for (key, own), (_, other) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(own, other), key


def test_the_tensor_table_is_what_safetensors_reads(tiny_base: Path) -> None:
    files = checked(tiny_base)
    with safe_open(tiny_base / "model.safetensors", framework="pt") as stored:
        names = set(stored.keys())
        assert set(files.tensors) == names and len(names) == 21
        raw = (tiny_base / "model.safetensors").read_bytes()
        for name in names:
            tensor, place = stored.get_tensor(name), files.tensors[name]
            assert (place.shape, place.dtype) == (tuple(tensor.shape), "F32")
            assert raw[place.start : place.start + place.nbytes] == tensor.numpy().tobytes()


def test_a_model_in_several_files_is_whole_like_one_in_one(tiny_base: Path, copied: Path) -> None:
    files = checked(in_two_files(copied))
    assert len({tensor.file for tensor in files.tensors.values()}) > 1
    assert files.total_bytes == checked(tiny_base).total_bytes
    assert files.fingerprint() == checked(tiny_base).fingerprint()


@pytest.mark.parametrize(
    ("name", "quantization"),
    [("llama", {"load_in_4bit": True}), ("gpt2", {"load_in_8bit": True}), ("mixtral", {"load_in_4bit": True})],
)
def test_a_quantised_base_has_the_layers_that_were_asked_for(
    bases: Callable[[str], Path], name: str, quantization: dict[str, Any]
) -> None:
    model = load_base_model(section(bases(name)), QuantizationSection(**quantization), dtype="auto", device_map=None)
    kinds = {type(module).__name__ for module in model.modules()}
    assert ("Linear4bit" if "load_in_4bit" in quantization else "Linear8bitLt") in kinds
    assert type(model.get_output_embeddings()) is torch.nn.Linear


def test_dtype_attention_and_further_arguments_reach_the_model(tiny_base: Path) -> None:
    model = load_base_model(
        section(tiny_base, attn_implementation="eager", extra={"experts_implementation": "eager"}),
        None,
        dtype=torch.bfloat16,
        device_map=None,
    )
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert load_base_model(section(tiny_base), None, dtype="auto", device_map=None).dtype == torch.float32


def test_a_missing_tensor_is_refused_and_not_made_up(copied: Path) -> None:
    path = copied / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight: copy the whole model again"):
        load_base_model(section(copied), None, dtype="auto", device_map=None)


def test_a_tensor_of_another_shape_is_refused_with_both_shapes(copied: Path) -> None:
    change_json(copied / "config.json", intermediate_size=192)
    expected = r"mlp\.down_proj\.weight as \[64, 128\], config\.json makes it \[64, 192\] and 5 more tensors"
    with pytest.raises(ModelError, match=expected):
        load_base_model(section(copied), None, dtype="auto", device_map=None)


def test_weights_of_a_deeper_model_are_refused(copied: Path) -> None:
    change_json(copied / "config.json", num_hidden_layers=1)
    expected = r"holds 9 tensors \(model\.layers\.1\..*\), config\.json makes 1 layers \(num_hidden_layers\)"
    with pytest.raises(ModelError, match=expected):
        load_base_model(section(copied), None, dtype="auto", device_map=None)


def test_an_attention_that_is_not_installed_is_refused_before_weights_are_read(tiny_base: Path) -> None:
    line = refusal(tiny_base, attn_implementation="flash_attention_3")
    assert line.endswith("; model.attn_implementation is flash_attention_3: write sdpa, or install what it needs")


def test_a_base_that_the_gpu_cannot_hold_says_what_to_change(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(MachineError, match=r"does not fit: set quantization\.load_in_4bit: true"):
        load_base_model(section(tiny_base), None, dtype="auto", device_map=None)


def test_a_tensor_without_a_place_is_said_once(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = copied / "model.safetensors"
    save_file(load_file(path) | {"score.weight": torch.ones(2, 2)}, path, metadata={"format": "pt"})
    with caplog.at_level(logging.WARNING):
        load_base_model(section(copied), None, dtype="auto", device_map=None)
    assert [record.getMessage() for record in caplog.records] == [
        f"{copied}: not used, the architecture has no place for them: score.weight"
    ]


@pytest.mark.parametrize("subfolder", ["", "a/b"])
def test_a_hub_model_is_read_from_the_cache_and_keeps_its_name(tiny_base: Path, tmp_path: Path, subfolder: str) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--org--name"
    shutil.copytree(tiny_base, repository / "snapshots" / commit / subfolder)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    model = section("org/name", extra={"cache_dir": str(tmp_path / "hub"), "subfolder": subfolder})
    files = check_base_model(model)
    assert (files.revision, files.directory) == (commit, repository / "snapshots" / commit / subfolder)
    assert checked(tiny_base).revision is None
    base = load_base_model(model, None, dtype="auto", device_map=None)
    assert base.name_or_path == base.config._name_or_path == "org/name"


def test_a_hub_model_that_is_not_at_hand_offline_says_how_to_get_it(tmp_path: Path) -> None:
    line = refusal("org/name", extra={"cache_dir": str(tmp_path)})
    assert line.startswith("model.model_name_or_path: org/name is not whole in the cache")
    assert (
        f"({tmp_path}) and HF_HUB_OFFLINE is set" in line and f"`hf download org/name --cache-dir {tmp_path}`" in line
    )
    line = refusal("org/name", revision="v1")
    assert "`hf download org/name --revision v1`" in line


def test_a_name_that_is_no_hub_id_is_refused() -> None:
    assert "is neither a directory nor a Hub id" in refusal("org/na me")


def test_what_looks_like_a_path_never_reaches_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorafit.builders.model_files.hub_snapshot", lambda *_, **__: pytest.fail("asked the Hub"))
    for name in ("./org/name", "a/b/c", "models/", "~/nowhere/at/all", str(tmp_path / "none")):
        assert refusal(name) == f"{name}: there is no such directory: correct the path"


def broken_config(text: str) -> Callable[[Path], object]:
    return lambda base: (base / "config.json").write_text(text)


def changed_config(**changes: Any) -> Callable[[Path], object]:
    return lambda base: change_json(base / "config.json", **changes)


def only(name: str) -> Callable[[Path], object]:
    return lambda base: (base / "model.safetensors").rename(base / name)


def cut_weights(base: Path) -> None:
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def stored_as_float8(base: Path) -> None:
    path = base / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, path, metadata={"format": "pt"})


def with_a_hole(base: Path) -> None:
    """The last tensor eight bytes later, and eight bytes of nothing before it."""
    path = base / "model.safetensors"
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    last = max((entry for name, entry in header.items() if name != "__metadata__"), key=lambda e: e["data_offsets"])
    begin = start + last["data_offsets"][0]
    last["data_offsets"] = [place + 8 for place in last["data_offsets"]]
    written = json.dumps(header).encode()
    path.write_bytes(len(written).to_bytes(8, "little") + written + content[start:begin] + bytes(8) + content[begin:])


def too_deep(name: str) -> Callable[[Path], object]:
    return lambda base: (base / name).write_text("[" * 100_000)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
BREAKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty directory": (
        lambda base: [step(base) for step in (shutil.rmtree, Path.mkdir)],
        ": is empty or missing: copy the model there",
    ),
    "a file": (
        lambda base: [step(base) for step in (shutil.rmtree, Path.touch)],
        ": is a file: name the directory it lies in",
    ),
    "no config": (lambda base: (base / "config.json").unlink(), ": has no config.json: name the directory"),
    "broken config": (broken_config('{"model_type": '), "/config.json: is not JSON ("),
    "config is a list": (broken_config("[]"), "/config.json: is not a JSON object: copy the file again"),
    "config is a pointer": (broken_config(POINTER), "/config.json: is a git-lfs pointer: run `git lfs pull`"),
    "no model type": (changed_config(model_type=...), "/config.json: has no model_type"),
    "unknown model type": (changed_config(model_type="lama"), "knows no model_type 'lama'; did you mean llama?"),
    "own code": (
        changed_config(model_type="own", auto_map={"AutoConfig": "c.C"}),
        "read base/*.py, then set model.trust_remote_code: true",
    ),
    "wrong type in config": (changed_config(hidden_size="wide"), "/config.json: transformers cannot use it: "),
    "unknown activation": (changed_config(hidden_act="nope"), "/config.json: transformers cannot build it: 'nope'"),
    "stop token outside": (
        lambda base: change_json(base / "generation_config.json", eos_token_id=[2, 9999]),
        "/config.json: eos_token_id 9999 has no row in the embedding of 264",
    ),
    "masked model": (
        changed_config(model_type="bert", architectures=["BertForMaskedLM"]),
        "/config.json: is a BertForMaskedLM, not a model that predicts the next token",
    ),
    "encoder and decoder": (
        changed_config(model_type="t5", architectures=["T5ForConditionalGeneration"]),
        "is a T5ForConditionalGeneration, not a model that predicts the next token",
    ),
    "hub kernel": (
        changed_config(attn_implementation="kernels-community/flash-attn"),
        "asks for the attention kernel 'kernels-community/flash-attn', code downloaded from the Hub",
    ),
    "renamed weights": (changed_config(transformers_weights="other.safetensors"), "renames the weights"),
    "gptq": (
        changed_config(quantization_config={"quant_method": "gptq", "bits": 4}),
        "/config.json: is a checkpoint quantised with gptq: name the unquantised model",
    ),
    "bitsandbytes without a section": (
        changed_config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "is a bitsandbytes checkpoint: write `quantization: {load_in_4bit: true}` in the recipe too",
    ),
    "broken generation config": (
        lambda base: (base / "generation_config.json").write_text("{"),
        "/generation_config.json: is not JSON (",
    ),
    "odd stop token": (
        lambda base: change_json(base / "generation_config.json", eos_token_id="</s>"),
        "/generation_config.json: has eos_token_id '</s>'; it is a token id or a list of them",
    ),
    "adapter besides": (
        lambda base: (base / "adapter_config.json").write_text("{}"),
        "/adapter_config.json: lies in a base model and would be loaded with it: move the adapter elsewhere",
    ),
    "adapter": (
        lambda base: (
            (base / "config.json")
            .rename(base / "adapter_config.json")
            .write_text('{"base_model_name_or_path": "org/base"}')
        ),
        ": is an adapter, not a base model: set model.model_name_or_path to its base (org/base)",
    ),
    "no tokenizer": (
        lambda base: list(map(Path.unlink, base.glob("tokenizer*"))),
        ": has no tokenizer: copy its files there (tokenizer.json, tokenizer_config.json)",
    ),
    "no weights": (lambda base: (base / "model.safetensors").unlink(), ": has no weights: model.safetensors, or"),
    "pickle": (only("pytorch_model.bin"), "has its weights in pytorch_model.bin, a pickle that can run code"),
    "pickle of another name": (only("consolidated.00.pth"), "has its weights in consolidated.00.pth, a pickle"),
    "gguf": (only("model.gguf"), "holds model.gguf; a GGUF cannot be trained"),
    "other safetensors": (only("consolidated.safetensors"), "has consolidated.safetensors but no model.safetensors"),
    "cut weights": (cut_weights, "the copy broke off, copy it again"),
    "empty weights": (
        lambda base: (base / "model.safetensors").write_bytes(b""),
        "/model.safetensors: is not a whole safetensors file (0 bytes)",
    ),
    "weights are a pointer": (
        lambda base: (base / "model.safetensors").write_text(POINTER),
        "/model.safetensors: is a git-lfs pointer, not weights: run `git lfs pull`",
    ),
    "weights are a page": (
        lambda base: (base / "model.safetensors").write_text("<!DOCTYPE html>" * 9),
        "/model.safetensors: is not a whole safetensors file (135 bytes)",
    ),
    "odd header": (
        lambda base: (base / "model.safetensors").write_bytes((9).to_bytes(8, "little") + b'{"a": [] '),
        "/model.safetensors: has a header that is not safetensors",
    ),
    **{
        f"deep {name}": (too_deep(name), f"/{name}: is not JSON (")
        for name in ("config.json", "generation_config.json")
    },
    "deep index": (
        lambda base: (
            (base / "model.safetensors").rename(base / "model-1.safetensors"),
            (base / "model.safetensors.index.json").write_text("[" * 100_000),
        ),
        "/model.safetensors.index.json: is not an index of weight files",
    ),
    "deep header": (
        lambda base: (base / "model.safetensors").write_bytes((10**5).to_bytes(8, "little") + b"[" * 10**5),
        "/model.safetensors: has a header that is not safetensors",
    ),
    "hole": (with_a_hole, "/model.safetensors: has a hole or an overlap at byte "),
    "countless layers": (
        changed_config(num_hidden_layers=10**7),
        "/config.json: says num_hidden_layers: 10,000,000, and no model has more than 10,000",
    ),
    "float8": (stored_as_float8, "stores lm_head.weight (1 weights in all) as F8_E4M3, and config.json does not say"),
}
assert len(BREAKS) == 40


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_base_is_refused_in_one_line_with_the_mend(copied: Path, name: str) -> None:
    break_it, expected = BREAKS[name]
    checked(copied)
    break_it(copied)
    line = refusal(copied)
    assert expected in line
    assert line.startswith(str(copied))


def test_each_weight_file_that_is_not_whole_is_named(copied: Path) -> None:
    in_two_files(copied)
    files = sorted(copied.glob("model-*.safetensors"))
    assert len(files) >= 3
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:-1])
    with pytest.raises(ModelError) as caught:
        checked(copied)
    assert [problem.where for problem in caught.value.problems] == [str(files[0]), str(files[1])]


def test_tensors_that_the_index_names_and_the_files_lack_are_refused(copied: Path) -> None:
    index = in_two_files(copied) / "model.safetensors.index.json"
    facts = json.loads(index.read_text())
    facts["weight_map"]["model.gone.weight"] = next(iter(facts["weight_map"].values()))
    index.write_text(json.dumps(facts))
    assert "names 1 tensors that its files lack (model.gone.weight)" in refusal(copied)
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    assert "is not an index of weight files" in refusal(copied)


def test_all_problems_of_a_config_are_said_at_once(copied: Path) -> None:
    change_json(copied / "config.json", model_type="lama", attn_implementation="a/b", quantization_config={})
    (copied / "tokenizer.json").unlink()
    (copied / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError) as caught:
        checked(copied)
    assert len(caught.value.problems) == 4


def test_own_code_runs_only_with_the_recipes_consent(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(copied.parent / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    (copied / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    change_json(copied / "config.json", model_type="own", auto_map=auto_map, architectures=["OwnForCausalLM"])
    assert "set model.trust_remote_code: true" in refusal(copied)
    assert not (copied.parent / "modules").exists()
    assert checked(copied, trust_remote_code=True).vocab_size == 264
    model = load_base_model(section(copied, trust_remote_code=True), None, dtype="auto", device_map=None)
    assert type(model).__name__ == "OwnForCausalLM"


def test_own_code_may_come_with_an_architecture_that_the_library_knows(copied: Path) -> None:
    change_json(copied / "config.json", auto_map={"AutoConfig": "configuration_own.OwnConfig"})
    assert checked(copied).vocab_size == 264


def test_a_named_attention_overrides_a_hub_kernel(copied: Path) -> None:
    change_json(copied / "config.json", attn_implementation="a/b")
    assert checked(copied, attn_implementation="sdpa").vocab_size == 264


def test_a_bitsandbytes_checkpoint_needs_the_settings_it_was_made_with(copied: Path) -> None:
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}
    change_json(copied / "config.json", quantization_config=stored)
    line = refusal(copied, QuantizationSection(load_in_4bit=True))
    assert line.startswith('quantization.bnb_4bit_quant_type: is "nf4", the checkpoint is quantised with "fp4"')
    checked(copied, QuantizationSection(load_in_4bit=True, bnb_4bit_quant_type="fp4"))


def test_a_bitsandbytes_checkpoint_is_loaded_as_it_is(tiny_base: Path, tmp_path: Path) -> None:
    quantization = QuantizationSection(load_in_4bit=True)
    first = load_base_model(section(tiny_base), quantization, dtype="auto", device_map=None)
    stored = Path(shutil.copytree(tiny_base, tmp_path / "stored"))
    first.save_pretrained(stored)
    checked(stored, quantization)
    again = load_base_model(section(stored), quantization, dtype="auto", device_map=None)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(first(input_ids=ids).logits, again(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"subfoldr": "x"}, "did you mean subfolder?"),
        (
            {"ignore_mismatched_sizes": True},
            "ignore_mismatched_sizes is not an argument of from_pretrained that may be",
        ),
        ({"token": "hf_secret"}, "token is not an argument"),
        ({"dtype": "float32"}, "dtype has its own key in the recipe"),
    ],
)
def test_further_arguments_that_would_change_what_is_loaded_are_refused(
    tiny_base: Path, extra: dict[str, Any], expected: str
) -> None:
    line = refusal(tiny_base, extra=extra)
    assert line.startswith("model.extra: ") and expected in line and "hf_secret" not in line


def test_a_subfolder_is_where_the_model_is_looked_for(tiny_base: Path) -> None:
    assert checked(tiny_base.parent, extra={"subfolder": tiny_base.name}).directory == tiny_base
    model = section(tiny_base.parent, extra={"subfolder": tiny_base.name})
    assert load_base_model(model, None, dtype="auto", device_map=None).num_parameters() > 0


def test_stop_tokens_are_those_of_generation_and_else_of_the_config(copied: Path) -> None:
    change_json(copied / "generation_config.json", eos_token_id=[2, 5])
    assert checked(copied).stop_token_ids == {2, 5}
    (copied / "generation_config.json").unlink()
    assert checked(copied).stop_token_ids == {2}


def test_the_fingerprint_tells_changed_weights_and_settings_but_not_the_place(
    tiny_base: Path, copied: Path, tmp_path: Path
) -> None:
    own = checked(tiny_base).fingerprint()
    change_json(copied / "config.json", transformers_version="5.0.0", _name_or_path="elsewhere")
    assert checked(copied).fingerprint() == own
    path = copied / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][-1] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    assert checked(copied).fingerprint() != own
    change_json(copied / "config.json", rms_norm_eps=1e-5)
    other = Path(shutil.copytree(tiny_base, tmp_path / "other"))
    change_json(other / "config.json", rms_norm_eps=1e-3)
    assert checked(other).fingerprint() != own


def weights(directory: Path, files: dict[str, dict[str, torch.Tensor]]) -> str:
    """Fingerprint of a directory of weight files with their index."""
    directory.mkdir()
    for name, tensors in files.items():
        save_file(tensors, directory / name)
    index = {"weight_map": {tensor: name for name, tensors in files.items() for tensor in tensors}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return fingerprint(directory, config={}, tensors=tensor_table(directory))


def test_the_fingerprint_does_not_depend_on_how_the_tensors_are_cut_into_files(tmp_path: Path) -> None:
    a, b = torch.ones(3), torch.zeros(5)
    first = weights(tmp_path / "first", {"model-1.safetensors": {"a": a, "b": b}})
    assert weights(tmp_path / "second", {"model-1.safetensors": {"b": b}, "model-2.safetensors": {"a": a}}) == first
    assert weights(tmp_path / "third", {"model-1.safetensors": {"a": b, "b": a}}) != first


@pytest.mark.parametrize("share", [0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
def test_the_fingerprint_samples_a_large_tensor_from_end_to_end(tmp_path: Path, share: float) -> None:
    large = torch.zeros(1_000_000)
    changed = large.clone()
    changed[round(share * (len(large) - 1024)) :][:1024] = 1  # one block's worth, where a block lies
    assert weights(tmp_path / "first", {"model-1.safetensors": {"a": large}}) != weights(
        tmp_path / "second", {"model-1.safetensors": {"a": changed}}
    )


def test_files_are_looked_at_without_torch(tiny_base: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from lorafit.builders import model_files, weight_files
base = Path({str(tiny_base)!r})
assert model_files.read_config(base) and len(weight_files.tensor_table(base)) == 21
print(sorted({{"torch", "transformers", "peft", "trl", "datasets"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_architectures_read_off_the_librarys_source_are_the_librarys() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert model_types() == set(CONFIG_MAPPING_NAMES)
    assert types_with_model("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES") == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
