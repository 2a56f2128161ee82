"""The self-test passes on what is right, sees what is wrong, and leaves no trace."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import GradientState
from peft import PeftModel
from peft.tuners.lora import Linear
from torch import nn
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from typer.testing import CliRunner

from lorafit.cli import app
from lorafit.errors import VerificationError
from lorafit.lines import heard
from lorafit.recipe import LoadedRecipe
from lorafit.speed import answer_head
from lorafit.speed.answer_head import use_answer_head
from lorafit.training import selftest
from lorafit.training.inputs import read_inputs
from lorafit.training.restore_model import unchanged
from lorafit.training.selftest import SelfTest, is_remembered, remember_passed, self_test
from lorafit.training.selftest_bench import tolerances
from lorafit.training.selftest_only import self_test_only
from lorafit.training.train import Trained, run_training
from support.runs import small_recipe

PACKED = {"packing": True, "max_length": 96}
PLAIN_PATH = {"varlen_attention": False, "fused_lora": False, "answer_head": False, "last_layer": False}
NOISY = {"lora": {"r": 4, "lora_dropout": 0.3}, "training": {"neftune_noise_alpha": 5.0}}


def self_tested(loaded: LoadedRecipe) -> SelfTest:
    return self_test_only(loaded, cache_dir=loaded.path.parent / "cache")


def failure(loaded: LoadedRecipe) -> str:
    with pytest.raises(VerificationError) as caught:
        self_tested(loaded)
    assert caught.value.exit_code == 5
    return str(caught.value)


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"training": PACKED},
        {"training": PACKED | {"bf16": True}, "speed": PLAIN_PATH},
        {"training": {"gradient_checkpointing": True}, "lora": {"r": 4, "use_dora": True, "lora_dropout": 0.2}},
        {"lora": None, "adalora": {"target_r": 2, "init_r": 4, "tinit": 0, "tfinal": 1}},
        {"quantization": {"load_in_4bit": True}, "training": PACKED | {"neftune_noise_alpha": 5.0}},
        {"lora": {"r": 4, "modules_to_save": ["lm_head"], "trainable_token_indices": [5]}},
        {"lora": {"r": 4, "init_lora_weights": "pissa"}, "model": {"attn_implementation": "eager"}},
    ],
    ids=["padded", "packed", "packed-bf16", "dora", "adalora", "qlora", "saved-whole", "pissa"],
)
def test_what_is_right_passes(sections: dict[str, Any], tmp_path: Path, tiny_base: Path) -> None:
    if "model" in sections:
        sections = sections | {"model": {"model_name_or_path": str(tiny_base), **sections["model"]}}
    result = self_tested(small_recipe(tmp_path, tiny_base, **sections))
    wanted = "packing" if sections.get("training", {}).get("packing") else "padding"
    assert [check.name for check in result.checks] == ["accumulation", wanted, "adapter off"]
    assert all(0 <= check.difference <= check.tolerance for check in result.checks)


def ones_for_a_mask(collate: Callable[..., Any]) -> Callable[..., Any]:
    def torch_call(self: Any, examples: Any) -> Any:
        batch = collate(self, examples)
        return batch | {"attention_mask": torch.ones_like(batch["input_ids"])}

    return torch_call


def padding_on_the_left(collate: Callable[..., Any]) -> Callable[..., Any]:
    def torch_call(self: Any, examples: Any) -> Any:
        batch = collate(self, examples)
        gaps = (batch.pop("attention_mask") == 0).sum(dim=1).tolist()
        turned = {name: [row.roll(gap) for row, gap in zip(rows, gaps, strict=True)] for name, rows in batch.items()}
        return {name: torch.stack(rows) for name, rows in turned.items()} | {
            # TRL counts tokens by one of the two
            "position_ids": torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
        }

    return torch_call


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_mask_of_ones_over_packed_documents_is_seen(
    attention: str, tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = ones_for_a_mask(DataCollatorForLanguageModeling.torch_call)
    monkeypatch.setattr(DataCollatorForLanguageModeling, "torch_call", broken)
    model = {"model_name_or_path": str(tiny_base), "attn_implementation": attention}
    said = failure(small_recipe(tmp_path, tiny_base, training=PACKED, model=model, speed=PLAIN_PATH))
    assert "training.packing: a packed document is not computed as it is alone" in said
    assert f"with {attention} attention it sees its neighbours; write false" in said
    assert len(said.splitlines()) == 1


def test_padding_on_the_left_without_mask_is_seen(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = padding_on_the_left(DataCollatorForLanguageModeling.torch_call)
    monkeypatch.setattr(DataCollatorForLanguageModeling, "torch_call", broken)
    said = failure(small_recipe(tmp_path, tiny_base, speed=PLAIN_PATH))
    assert "model.attn_implementation: a padded row is not computed as it is alone" in said
    assert "or training.packing: true" in said


def each_divided_again(self: Any, model: nn.Module, inputs: Any, num_items: Any = None) -> torch.Tensor:
    """As versions of the library did that divided by the steps what the tokens had divided."""
    return RIGHT_STEP(self, model, inputs, num_items * self.current_gradient_accumulation_steps)


def mean_of_means(self: Any, model: nn.Module, inputs: Any, num_items: Any = None) -> torch.Tensor:
    """As versions did that averaged over micro-batches of unlike length."""
    own = (inputs["labels"][:, 1:] != -100).sum() * self.current_gradient_accumulation_steps
    return RIGHT_STEP(self, model, inputs, own)


RIGHT_STEP = SFTTrainer.training_step


@pytest.mark.parametrize("wrong", [each_divided_again, mean_of_means], ids=lambda step: step.__name__)
@pytest.mark.parametrize("bf16", [False, True])
def test_a_wrong_scale_of_accumulation_is_seen(
    wrong: Any, bf16: bool, tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SFTTrainer, "training_step", wrong)
    said = failure(small_recipe(tmp_path, tiny_base, training={"bf16": bf16}))
    assert "training.gradient_accumulation_steps: 8 micro-batches of 1 row and 2 of 4" in said
    assert len(said.splitlines()) == 1


def test_an_adapter_that_works_when_switched_off_is_seen(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Linear, "disable_adapters", property(lambda self: False))
    said = failure(small_recipe(tmp_path, tiny_base))
    assert "lora: switched off, the LORA adapter still moves the model" in said


def test_the_head_of_the_run_is_what_is_tried(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong_with_more_rows(model: Any) -> None:
        use_answer_head(model)
        right = model.forward

        def forward(*inputs: Any, **named: Any) -> Any:
            output = right(*inputs, **named)
            output.log_probs = output.log_probs * len(output.log_probs)
            return output

        model.forward = forward

    monkeypatch.setattr(answer_head, "use_answer_head", wrong_with_more_rows)
    assert "a padded row is not computed as it is alone" in failure(small_recipe(tmp_path, tiny_base))
    self_tested(small_recipe(tmp_path, tiny_base, speed={"answer_head": False}))


def fingerprint(model: PeftModel) -> dict[str, Any]:
    """All that a forward and backward pass could depend on, by module."""
    seen: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            is_collection = isinstance(value, (dict, list, set))
            seen[f"{name}.{key}"] = (id(value), [*map(id, value)] if is_collection else None)
    for name, parameter in model.named_parameters():
        whole = hashlib.sha256(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        seen[f"{name} data"] = whole, id(parameter), parameter.data_ptr(), parameter.grad, parameter.requires_grad
    seen["config"] = model.config.to_dict(), model.generation_config.to_dict()
    seen["random"] = torch.get_rng_state().tolist()
    seen["loaders"] = len(GradientState().dataloader_references)
    return seen


@pytest.mark.parametrize("sections", [NOISY, {"training": PACKED}], ids=["noisy", "packed"])
def test_the_model_is_what_it_was(
    sections: dict[str, Any], tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = []

    def watched(model: PeftModel, *rest: Any, **named: Any) -> SelfTest:
        before = fingerprint(model)
        result = self_test(model, *rest, **named)
        compared.append((before, fingerprint(model)))
        return result

    monkeypatch.setattr(selftest, "self_test", watched)
    self_tested(small_recipe(tmp_path, tiny_base, **sections))
    ((before, after),) = compared
    assert len(before) > 1000
    assert before == after


def test_what_fails_leaves_the_model_as_it_was_too(tiny_base: Path) -> None:
    base = small_model(tiny_base)
    model, weight = nn.ModuleDict({"base": base}), base.lm_head.weight
    with pytest.raises(ZeroDivisionError), unchanged(model):
        weight.data = weight.data + 1
        base.lm_head = nn.Identity()
        base.forward = print
        torch.rand(3)
        raise ZeroDivisionError
    assert base.lm_head.weight is weight
    assert "forward" not in vars(base)


def small_model(base: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base)


def events(loaded: LoadedRecipe) -> list[dict[str, Any]]:
    file = loaded.output_dir() / "events.jsonl"
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []


def trained(loaded: LoadedRecipe, cache: Path) -> tuple[Trained, list[str]]:
    said: list[str] = []
    with heard(said.append):
        done = run_training(loaded, cache_dir=cache)
    return done, [line for line in said if line.startswith("self-test")]


@pytest.mark.parametrize("sections", [NOISY, {"training": PACKED}], ids=["noisy", "packed"])
def test_a_run_tests_itself_once_and_comes_to_the_same_adapter(
    sections: dict[str, Any], tmp_path: Path, tiny_base: Path
) -> None:
    places = [tmp_path / name for name in ("first", "second")]
    adapters, said, kinds = [], [], []
    for place in places:
        place.mkdir()
        loaded = small_recipe(place, tiny_base, **sections)
        done, lines = trained(loaded, tmp_path / "cache")
        adapters.append((Path(done.result.adapter) / "adapter_model.safetensors").read_bytes())
        said.append(lines)
        kinds.append([(event["kind"], event["step"], sorted(event["figures"])) for event in events(loaded)])
    assert adapters[0] == adapters[1]
    wanted = "packing" if sections["training"].get("packing") else "padding"
    assert kinds == [[("selftest", 0, sorted(["accumulation", "adapter off", wanted, "seconds"]))], []]
    assert len(said[0]) == 1
    assert said[0][0].startswith("self-test passed in ")
    assert said[1] == []


def test_another_attention_is_another_combination(tmp_path: Path, tiny_base: Path) -> None:
    keys = set()
    kinds: list[dict[str, Any]] = [
        {},
        {"training": PACKED},
        {"model": {"model_name_or_path": str(tiny_base), "attn_implementation": "eager"}},
        {"lora": {"r": 4, "use_dora": True}},
        {"training": {"bf16": True}},
    ]
    for number, sections in enumerate(kinds):
        (tmp_path / str(number)).mkdir()
        loaded = small_recipe(tmp_path / str(number), tiny_base, **sections)
        keys.add(json.dumps(self_tested(loaded).combination, sort_keys=True))
    assert len(keys) == 5


def test_the_rank_is_no_part_of_the_combination(tmp_path: Path, tiny_base: Path) -> None:
    loaded = small_recipe(tmp_path, tiny_base)
    assert self_tested(loaded).combination == self_tested(small_recipe(tmp_path, tiny_base, lora={"r": 2})).combination


def test_a_failure_is_refused_before_anything_is_written(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SFTTrainer, "training_step", mean_of_means)
    loaded = small_recipe(tmp_path, tiny_base)
    with pytest.raises(VerificationError):
        trained(loaded, tmp_path / "cache")
    assert not loaded.output_dir().exists()
    assert not (tmp_path / "cache" / "selftest").exists()


def test_the_command_prints_what_it_compared_and_leaves_only_its_mark(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path / "cache"))
    loaded = small_recipe(tmp_path, tiny_base, launch={"num_processes": 2})
    before = {path.name for path in tmp_path.iterdir()}
    result = CliRunner().invoke(app, ["train", str(loaded.path), "--selftest", "--json", "--quiet"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert set(found) == {"combination", "checks", "seconds"}
    assert [set(check) for check in found["checks"]] == [{"name", "difference", "tolerance", "setting"}] * 3
    assert {path.name for path in tmp_path.iterdir()} == before | {"cache"}
    assert len(list((tmp_path / "cache" / "selftest").iterdir())) == 1
    table = CliRunner().invoke(app, ["train", str(loaded.path), "--selftest", "--quiet"])
    assert "a padded row is computed as it is alone" in table.stdout


def test_tolerances_follow_the_type(tmp_path: Path, tiny_base: Path) -> None:
    plain = small_recipe(tmp_path, tiny_base).recipe
    computes = {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float32"}
    four = small_recipe(tmp_path, tiny_base, quantization=computes).recipe
    eight = small_recipe(tmp_path, tiny_base, quantization={"load_in_8bit": True}).recipe
    exact = tolerances(plain, dtype=torch.float32, bf16=False)
    assert exact == (1e-4, 1e-4)
    half = tolerances(plain, dtype=torch.float16, bf16=False)
    brain = tolerances(plain, dtype=torch.float32, bf16=True)
    assert exact < half < brain == tolerances(plain, dtype=torch.bfloat16, bf16=False)
    assert tolerances(four, dtype=torch.float32, bf16=False) == exact
    assert tolerances(eight, dtype=torch.float32, bf16=False) > brain


def test_several_processes_leave_it_out_in_one_line(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Two:
        num_processes = 2

    loaded = small_recipe(tmp_path, tiny_base)
    inputs = read_inputs(loaded, cache_dir=None)
    monkeypatch.setattr(selftest, "PartialState", Two)
    monkeypatch.setattr(selftest, "combination_of", lambda *_, **__: {"model": "any"})
    said: list[str] = []
    trainer: Any = SimpleNamespace(
        model=small_model(tiny_base),
        args=SimpleNamespace(bf16=False, gradient_checkpointing=False),
    )
    with heard(said.append):
        tested = selftest.self_test_once(
            trainer, loaded, rows=inputs.data.train, cache_dir=tmp_path / "cache", only=False
        )
    assert tested is None
    assert said == ["self-test left out with several processes: `lorafit train RECIPE --selftest` does it in one"]


def test_what_passed_counts_where_the_cache_cannot_be_written(tmp_path: Path) -> None:
    tested = SelfTest(combination={"model": "llama"}, checks=(), seconds=1.0)
    (tmp_path / "file").write_text("")
    for cache in (tmp_path / "file" / "cache", Path("/proc/cache")):
        remember_passed(cache, tested)
        assert not is_remembered(cache, tested.combination)
    remember_passed(tmp_path / "cache", tested)
    assert is_remembered(tmp_path / "cache", tested.combination)
