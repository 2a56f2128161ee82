"""Names of elsewhere, and near misses."""

import time
from pathlib import Path

import pytest

from lorafit.recipe import schema_walk, suggest
from lorafit.recipe.library_keys import LIBRARY_KEYS, NOT_FOR_RECIPES, library_keys
from lorafit.recipe.suggest import GUESSES, extra_key, nearest, unknown_key
from lorafit.tasks import DEFAULT_TASK
from support.recipes import SMALLEST, problems


def test_no_name_that_is_said_to_be_gone_is_a_key() -> None:
    keys = {str(place[-1]) for place in schema_walk.places()}
    sections = {str(place[0]) for place in schema_walk.places() if len(place) == 1}
    assert suggest._RENAMED.keys() & (keys | sections) == set()


def test_every_new_name_is_a_key() -> None:
    places = {".".join(map(str, place)) for place in schema_walk.places()}
    named = [new for new in suggest._RENAMED.values() if not new.startswith(("nothing: ", "the "))]
    named += suggest._RENAMED_IN_SECTION.values()
    assert len(named) > 60
    for new in named:
        key = new.split(" ")[0].rstrip(":").replace("[]", "")
        assert key in places, new


@pytest.mark.parametrize("section", LIBRARY_KEYS)
def test_what_is_not_for_recipes_is_a_library_key_that_the_section_lacks(section: str) -> None:
    reasons = NOT_FOR_RECIPES[section]
    assert reasons.keys() <= library_keys(DEFAULT_TASK)[section]
    assert not reasons.keys() & set(schema_walk.keys_of(schema_walk.section_at((section,))))


_OTHER_NAMES = [
    "warmup_ratio",
    "max_seq_length",
    "evaluation_strategy",
    "group_by_length",
    "no_cuda",
    "torch_dtype",
    "overwrite_output_dir",
    "save_safetensors",
    "logging_dir",
    "push_to_hub",
    "push_to_hub_token",
    "hub_token",
    "hub_model_id",
    "lora_plus_scale",
    "save_steps",
    "save_strategy",
    "save_total_limit",
    "completion_only_loss",
    "assistant_only_loss",
    "chat_template_path",
    "dataset_text_field",
    "packing_strategy",
    "eval_packing",
    "padding_free",
    "deepspeed",
    "fsdp",
    "resume_from_checkpoint",
    "auto_find_batch_size",
    "tokenizer",
    "micro_batch_size",
    "lora_r",
    "lora_rank",
    "lora_target",
    "cutoff_len",
    "base_model",
    "sample_packing",
    "sequence_len",
    "dataset",
    "adapter",
    "lora_target_modules",
    "val_set_size",
    "flash_attention",
    "num_epochs",
    "finetuning_type",
    "quantization_bit",
]


@pytest.mark.parametrize("name", _OTHER_NAMES)
@pytest.mark.parametrize("section", ["", "training", "lora"])
def test_names_of_other_versions_and_trainers_are_known(name: str, section: str) -> None:
    said, _ = unknown_key((section, name) if section else (name,))
    assert "did you mean" not in said and "its keys are" not in said and "extra" not in said, said


@pytest.mark.parametrize(
    ("word", "choice"),
    [
        ("lora_alfa", "lora_alpha"),
        ("loraAlpha", "lora_alpha"),
        ("lora-alpha", "lora_alpha"),
        ("R", "r"),
        ("lora_alhpa", "lora_alpha"),
        ("target_module", "target_modules"),
        ("zzz", None),
        ("completely_different", None),
    ],
)
def test_the_nearest_key_is_found(word: str, choice: str | None) -> None:
    assert nearest(word, ["r", "lora_alpha", "lora_dropout", "target_modules", "bias"]) == choice


@pytest.mark.parametrize(
    ("section", "name", "said"),
    [
        ("training", "adam_beta1", None),
        ("lora", "ensure_weight_tying", None),
        ("model", "cache_dir", None),
        ("training", "learning_rate", "training has this key itself; write training.learning_rate"),
        ("training", "adam_beta_1", "trl.SFTConfig has no such argument; did you mean adam_beta1?"),
        ("training", "learning_rat", "trl.SFTConfig has no such argument; did you mean training.learning_rate?"),
        ("training", "save_steps", "not for a recipe; write checkpoints.every and checkpoints.keep"),
        ("training", "max_seq_length", "trl.SFTConfig has no such argument; here it is training.max_length"),
        ("lora", "adam_beta1", "peft.LoraConfig has no such argument; it belongs in training.extra"),
        ("quantization", "zzzzzz", "BitsAndBytesConfig has no such argument; leave it out"),
        (
            "model",
            "token",
            "not for a recipe; log in with `hf auth login` or set HF_TOKEN; a recipe holds no secret",
        ),
    ],
)
def test_extra_takes_what_the_library_takes_and_the_section_lacks(section: str, name: str, said: str | None) -> None:
    assert extra_key(section, name) == said


@pytest.mark.parametrize("section", ["", "training.extra"])
def test_a_thousand_unknown_keys_are_named_at_once_and_the_first_of_them_compared(tmp_path: Path, section: str) -> None:
    """Each guess compares a word with every key that there is: 23 s for a thousand."""
    keys = [f"lora_alhpa{number}" for number in range(1000)]
    written = {
        "": "".join(f"{key}: 1\n" for key in keys),
        "training.extra": f"training: {{extra: {{{': 1, '.join(keys)}: 1}}}}",
    }
    started = time.process_time()
    said = problems(tmp_path, SMALLEST + written[section])
    assert time.process_time() - started < 3
    assert len(said) == 1000
    assert sum(";" in line for line in said) == GUESSES
    assert said[-1].rpartition(": ")[2] == {"": "not a key of a recipe"}.get(
        section, "trl.SFTConfig has no such argument"
    )
