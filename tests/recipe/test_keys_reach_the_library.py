"""No dead options: every key of a library section, flipped, changes the library object that is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from lorafit.builders.lora_config import lora_config
from lorafit.errors import Problem
from lorafit.preflight import Machine, bf16_choice, checkpointing_choice
from lorafit.recipe.recipe import CausalLmRecipe
from lorafit.recipe.sections import AdaLoraSection, LoraSection, SFTSection
from lorafit.training.arguments import training_arguments
from support.tiny import llama_config

CPU = Machine(device="cpu", name="a CPU", gpus=0, has_bf16=True, memory_bytes=2**34)

TRAINING_FLIPS: dict[str, Any] = {
    "max_length": 512,
    "packing": False,
    "num_train_epochs": 3.0,
    "max_steps": 7,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 3,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "linear",
    "lr_scheduler_kwargs": {"num_cycles": 2},
    "warmup_steps": 5.0,
    "optim": "sgd",
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
    "bf16": False,
    "fp16": True,
    "gradient_checkpointing": True,
    "neftune_noise_alpha": 5.0,
    "eval_strategy": "epoch",
    "eval_steps": 11.0,
    "load_best_model_at_end": True,
    "logging_steps": 2.0,
    "report_to": ("tensorboard",),
    "run_name": "named",
    "seed": 7,
    "dataloader_num_workers": 1,
    "train_sampling_strategy": "group_by_length",
    "torch_compile": True,
    "loss_type": "dft",
    "extra": {"adam_beta2": 0.95},
}


def _recipe(**training: Any) -> CausalLmRecipe:
    settings = {"packing": True, "eval_strategy": "steps", "eval_steps": 10.0} | training
    source = {"path": "/rows.jsonl"}
    return CausalLmRecipe.model_validate(
        {
            "model": {"model_name_or_path": "/base"},
            "data": {"train": [source], "eval": [source]},
            "training": settings,
        }
    )


def _sft(recipe: CausalLmRecipe, directory: Path) -> dict[str, Any]:
    config = training_arguments(
        recipe,
        output_dir=directory,
        run_name="run",
        bf16=bf16_choice(recipe.training, CPU).value,
        gradient_checkpointing=checkpointing_choice(recipe.training, CPU).value,
        use_cpu=True,
        has_eval_rows=True,
    )
    return {key: str(value) for key, value in vars(config).items()}


def test_every_training_key_has_a_flip() -> None:
    assert set(TRAINING_FLIPS) == set(SFTSection.model_fields)


@pytest.mark.parametrize("key", TRAINING_FLIPS)
def test_a_training_key_changes_the_sft_config(key: str, tmp_path: Path) -> None:
    if key == "torch_compile":
        pytest.importorskip("torch._inductor")
    before = _sft(_recipe(), tmp_path)
    after = _sft(_recipe(**{key: TRAINING_FLIPS[key]}), tmp_path)
    changed = {name for name in after if after[name] != before.get(name)}
    named = {"extra": "adam_beta2"}.get(key, key)  # both names of checkpointing change, where there are two
    assert named in changed


def test_early_stopping_keeps_the_best_and_the_library_removes_no_checkpoint(tmp_path: Path) -> None:
    recipe = _recipe()
    assert _sft(recipe, tmp_path)["save_total_limit"] == "None"
    raw = recipe.model_dump(exclude_unset=True) | {"early_stopping": {"patience": 2}}
    assert "BEST" in _sft(CausalLmRecipe.model_validate(raw), tmp_path)["save_strategy"].upper()


LORA_FLIPS: dict[str, Any] = {
    "r": 8,
    "lora_alpha": 5,
    "lora_dropout": 0.5,
    "target_modules": ("q_proj",),
    "exclude_modules": ("q_proj",),
    "target_parameters": ("q_proj.weight",),
    "use_rslora": True,
    "use_dora": True,
    "init_lora_weights": "gaussian",
    "eva_config": {"rho": 3.0},
    "corda_config": {"corda_method": "kpm"},
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"q_proj": 2},
    "layers_to_transform": 1,
    "layers_pattern": "layers",
    "modules_to_save": ("lm_head",),
    "trainable_token_indices": (5,),
    "bias": "all",
    "lora_bias": True,
    "extra": {"ensure_weight_tying": True},
}
NEEDED_BESIDE: dict[str, dict[str, Any]] = {
    "eva_config": {"init_lora_weights": "eva"},
    "corda_config": {"init_lora_weights": "corda"},
    "layers_to_transform": {"target_modules": ("q_proj",)},
    "layers_pattern": {"target_modules": ("q_proj",), "layers_to_transform": 1},
}


def _where(key: str, message: str) -> Problem:
    return Problem(key, message)


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_base)


def _lora(model: Any, adalora: AdaLoraSection | None = None, **keys: Any) -> dict[str, Any]:
    config = lora_config(LoraSection(**keys), adalora=adalora, model=model, where=_where)
    return {key: repr(value) for key, value in vars(config).items()}


def test_every_lora_key_has_a_flip() -> None:
    assert set(LORA_FLIPS) == set(LoraSection.model_fields)


@pytest.mark.parametrize("key", LORA_FLIPS)
def test_a_lora_key_changes_the_lora_config(key: str, model: Any) -> None:
    beside = NEEDED_BESIDE.get(key, {})
    before, after = _lora(model, **beside), _lora(model, **(beside | {key: LORA_FLIPS[key]}))
    changed = {name for name in after if after[name] != before.get(name)}
    assert ("ensure_weight_tying" if key == "extra" else key) in changed


ADALORA_FLIPS: dict[str, Any] = {
    "target_r": 3,
    "init_r": 20,
    "tinit": 9,
    "tfinal": 9,
    "delta_t": 3,
    "orth_reg_weight": 0.25,
}


@pytest.mark.parametrize("key", ADALORA_FLIPS)
def test_an_adalora_key_changes_the_adalora_config(key: str, model: Any) -> None:
    assert set(ADALORA_FLIPS) == set(AdaLoraSection.model_fields)
    before = _lora(model, AdaLoraSection())
    after = _lora(model, AdaLoraSection(**{key: ADALORA_FLIPS[key]}))
    assert before["deltaT" if key == "delta_t" else key] != after["deltaT" if key == "delta_t" else key]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"target_modules": ("q_proj", "k_prj")}, "'k_prj' matches nothing in this model; did you mean k_proj"),
        ({"exclude_modules": ("gate",)}, "'gate' matches nothing in this model; did you mean gate_proj"),
        ({"target_modules": "q_prj"}, "the expression 'q_prj' matches no module; did you mean q_proj"),
        ({"rank_pattern": {"qproj": 4}}, "'qproj' matches no module with an adapter; did you mean q_proj"),
        ({"alpha_pattern": {"zzz": 4}}, "'zzz' matches no module with an adapter; it has"),
        ({"modules_to_save": ("lm_haed",)}, "'lm_haed' matches nothing in this model; did you mean lm_head"),
        ({"target_parameters": ("experts.up",)}, "'experts.up' matches nothing in this model"),
        (
            {"target_modules": ("q_proj",), "layers_to_transform": (0, 2)},
            "layer 2 does not exist; this model has layers 0 to 1",
        ),
        ({"trainable_token_indices": (264,)}, "token 264 does not exist; ids run from 0 to 263"),
    ],
)
def test_a_name_that_matches_nothing_is_refused_with_the_nearest(keys: dict[str, Any], said: str, model: Any) -> None:
    from lorafit.errors import AdapterError

    with pytest.raises(AdapterError) as caught:
        _lora(model, **keys)
    assert any(said in str(problem) for problem in caught.value.problems), caught.value.problems
    assert caught.value.problems[0].where.startswith("lora.")


def test_all_names_that_match_nothing_are_reported_together(model: Any) -> None:
    from lorafit.errors import AdapterError

    with pytest.raises(AdapterError) as caught:
        _lora(model, target_modules=("nope", "q_proj"), modules_to_save=("neither",))
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("keys", [{"modules_to_save": ("embed_tokens",)}, {"trainable_token_indices": (5,)}])
def test_an_embedding_that_is_the_head_too_is_not_trained_under_fsdp(keys: dict[str, Any], model: Any) -> None:
    from lorafit.errors import AdapterError

    section = LoraSection(**keys)
    tied = AutoModelForCausalLM.from_config(llama_config(tie_word_embeddings=True))
    lora_config(section, adalora=None, model=tied, where=_where)
    lora_config(section, adalora=None, model=model, where=_where, by_fsdp=True)
    with pytest.raises(AdapterError, match="fsdp2 would train another model") as caught:
        lora_config(section, adalora=None, model=tied, where=_where, by_fsdp=True)
    assert caught.value.problems[0].where == f"lora.{next(iter(keys))}"


@pytest.mark.parametrize(
    ("own", "untied", "tied"),
    [
        (None, {"embed_tokens": [5], "lm_head": [5]}, {"embed_tokens": [5]}),
        ((7,), {"embed_tokens": [5, 7], "lm_head": [5]}, {"embed_tokens": [5, 7]}),
        ({"lm_head": (7,)}, {"embed_tokens": [5], "lm_head": [5, 7]}, {"embed_tokens": [5], "lm_head": [7]}),
    ],
)
def test_added_tokens_reach_the_rows_of_embedding_and_head(own: Any, untied: Any, tied: Any, model: Any) -> None:
    section = LoraSection(trainable_token_indices=own)
    other = AutoModelForCausalLM.from_config(llama_config(tie_word_embeddings=True))
    for base, expected in ((model, untied), (other, tied)):
        config = lora_config(section, adalora=None, model=base, where=_where, token_ids=(5,))
        assert config.trainable_token_indices == expected
