"""What a wrong key probably meant: a removed name, another section's key, a library key, or a misspelling."""

import re
from collections.abc import Iterable

from lorafit.recipe.library_keys import NOT_FOR_RECIPES, library_keys, library_object
from lorafit.recipe.recipe import DEFAULT_RECIPE, RECIPES, Recipe
from lorafit.recipe.schema_walk import field_at, keys_of, places, section_at
from lorafit.recipe.yaml_reader import KeyPath
from lorafit.tasks import DEFAULT_TASK

_RENAMED = {
    # transformers, peft, trl, bitsandbytes: gone, or never there
    "warmup_ratio": "training.warmup_steps (below 1 it is a share of all steps)",
    "max_seq_length": "training.max_length",
    "max_seq_len": "training.max_length",
    "evaluation_strategy": "training.eval_strategy",
    "group_by_length": "training.train_sampling_strategy: group_by_length",
    "torch_dtype": "model.dtype",
    "tokenizer": "nothing: the tokenizer is the base model's",
    "processing_class": "nothing: the tokenizer is the base model's",
    "overwrite_output_dir": "nothing: a used output_dir is never overwritten; choose another",
    "save_safetensors": "nothing: adapters are always saved as safetensors",
    "logging_dir": "nothing: metrics.jsonl and the loggers of training.report_to are in the run directory",
    "no_cuda": "nothing: " + NOT_FOR_RECIPES["training"]["use_cpu"],
    "push_to_hub_token": "nothing: " + NOT_FOR_RECIPES["training"]["hub_token"],
    "use_auth_token": "nothing: " + NOT_FOR_RECIPES["training"]["hub_token"],
    "push_to_hub_model_id": "nothing: nothing is pushed to the Hub while training",
    "push_to_hub_organization": "nothing: nothing is pushed to the Hub while training",
    "lora_plus_scale": "optimizer.loraplus_lr_ratio",
    "use_loraplus": "optimizer.loraplus_lr_ratio",
    "loraplus_ratio": "optimizer.loraplus_lr_ratio",
    "lr_ratio": "optimizer.loraplus_lr_ratio",
    "use_flash_attention_2": "model.attn_implementation: flash_attention_2",
    "per_gpu_train_batch_size": "training.per_device_train_batch_size",
    "per_gpu_eval_batch_size": "training.per_device_eval_batch_size",
    "adafactor": "training.optim: adafactor",
    "fp16_opt_level": "training.fp16",
    "half_precision_backend": "training.bf16",
    "early_stopping_patience": "early_stopping.patience",
    "early_stopping_threshold": "early_stopping.min_delta",
    "peft_config": "the lora section",
    "peft": "the lora section",
    "use_peft": "nothing: every run trains an adapter; its keys are in the lora section",
    "bnb_config": "the quantization section",
    "quantization_config": "the quantization section",
    "use_nested_quant": "quantization.bnb_4bit_use_double_quant",
    "use_bnb_nested_quant": "quantization.bnb_4bit_use_double_quant",
    "use_4bit": "quantization.load_in_4bit",
    "deltat": "adalora.delta_t",
    "total_step": "nothing: the run knows its steps",
    "use_adalora": "the adalora section",
    # names of other trainers
    "micro_batch_size": "training.per_device_train_batch_size",
    "eval_batch_size": "training.per_device_eval_batch_size",
    "batch_size": "training.per_device_train_batch_size",
    "train_batch_size": "training.per_device_train_batch_size",
    "grad_accum": "training.gradient_accumulation_steps",
    "gradient_accumulation": "training.gradient_accumulation_steps",
    "epochs": "training.num_train_epochs",
    "num_epochs": "training.num_train_epochs",
    "num_train_epoch": "training.num_train_epochs",
    "lr": "training.learning_rate",
    "lr_scheduler": "training.lr_scheduler_type",
    "scheduler": "training.lr_scheduler_type",
    "optimizer_type": "training.optim",
    "cutoff_len": "training.max_length",
    "sequence_len": "training.max_length",
    "model_max_length": "training.max_length",
    "sample_packing": "training.packing",
    "neat_packing": "training.packing",
    "pad_to_sequence_len": "nothing: rows are padded to the longest of their batch",
    "train_on_inputs": "data.train_on: all",
    "mask_prompt": "data.train_on: answers",
    "mask_history": "data.train_on: last_answer",
    "flash_attention": "model.attn_implementation: flash_attention_2",
    "flash_attn": "model.attn_implementation: flash_attention_2",
    "sdp_attention": "model.attn_implementation: sdpa",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "rank": "lora.r",
    "lora_target": "lora.target_modules",
    "lora_target_modules": "lora.target_modules",
    "lora_target_linear": "lora.target_modules: all-linear",
    "lora_modules_to_save": "lora.modules_to_save",
    "additional_target": "lora.modules_to_save",
    "lora_fan_in_fan_out": "nothing: lorafit reads it off the model",
    "peft_use_dora": "lora.use_dora",
    "peft_use_rslora": "lora.use_rslora",
    "dropout": "lora.lora_dropout",
    "base_model": "model.model_name_or_path",
    "base_model_name_or_path": "model.model_name_or_path",
    "pretrained_model_name_or_path": "model.model_name_or_path",
    "model_name": "model.model_name_or_path",
    "model_id": "model.model_name_or_path",
    "revision_of_model": "model.revision",
    "adapter": "nothing: lora alone is LoRA; with quantization.load_in_4bit it is QLoRA",
    "finetuning_type": "nothing: lora alone is LoRA; with quantization.load_in_4bit it is QLoRA",
    "stage": f"nothing: task: {DEFAULT_TASK.name} is the only one",
    "dataset": "data.train: [{path: ...}]",
    "datasets": "data.train: [{path: ...}]",
    "dataset_name": "data.train: [{hub: ...}]",
    "dataset_path": "data.train: [{path: ...}]",
    "train_file": "data.train: [{path: ...}]",
    "data_path": "data.train: [{path: ...}]",
    "train_data": "data.train: [{path: ...}]",
    "eval_dataset": "data.eval: [{path: ...}]",
    "test_datasets": "data.eval: [{path: ...}]",
    "validation_file": "data.eval: [{path: ...}]",
    "val_size": "data.eval_fraction",
    "val_set_size": "data.eval_fraction",
    "dataset_eval_split": "data.eval: [{hub: ..., split: ...}]",
    "dataset_train_split": "data.train: [{hub: ..., split: ...}]",
    "chat_template": "data.template",
    "prompt_template": "data.template",
    "field_messages": "data.train[].columns",
    "max_samples": "data.train[].limit",
    "wandb_project": "nothing: set WANDB_PROJECT; training.report_to: [wandb] switches it on",
    "use_wandb": "training.report_to: [wandb]",
    "quantization_bit": "quantization.load_in_4bit or load_in_8bit",
    "double_quantization": "quantization.bnb_4bit_use_double_quant",
    "gpus": "launch.num_processes",
    "num_gpus": "launch.num_processes",
    "resume": "nothing: give it to the command: `lorafit train RECIPE --resume`",
    "saves_per_epoch": "checkpoints.every",
    "evals_per_epoch": "training.eval_steps (below 1 it is a share of all steps)",
}
"""Names from elsewhere and what they are called here; `nothing: ...` says why there is no such key."""

_RENAMED_IN_SECTION = {
    "alpha": "lora.lora_alpha",
    "lora.alpha": "lora.lora_alpha",
    "model.name": "model.model_name_or_path",
    "model.path": "model.model_name_or_path",
    "model.id": "model.model_name_or_path",
    "training.optimizer": "training.optim",
    "data.path": "data.train: [{path: ...}]",
    "data.hub": "data.train: [{hub: ...}]",
    "data.format": "data.train[].format",
}


GUESSES = 20
"""So many unknown keys of a recipe are compared with all that there are: no one reads more, and each takes 10 ms."""


def nearest(word: str, choices: Iterable[str], *, share: int = 3) -> str | None:
    """The choice that is at most a third (one in `share`) of its letters away from `word`, if any is."""
    plain = _plain(word)
    ranked = []
    for choice in choices:
        allowed = max(1, min(len(choice), len(plain)) // share)
        if abs(len(choice) - len(plain)) <= allowed and (edits := _edits(plain, choice.lower())) <= allowed:
            ranked.append((edits, -_common_start(plain, choice), choice))
    return min(ranked)[2] if ranked else None


def unknown_key(
    key: KeyPath, recipe: type[Recipe] = DEFAULT_RECIPE, *, guesses: bool = True
) -> tuple[str, KeyPath | None]:
    """What to say about a key the schema does not have, and the key it is taken for where it is a misspelling."""
    name, section = str(key[-1]), section_at(key[:-1], recipe)
    here = f"not a key of {_named(key[:-1])}"
    if not guesses:
        return here, None
    if instead := _replacement(name, key):
        return f"{here}; {instead}", None
    elsewhere = [place for place in places(recipe) if place[-1] == name]
    if elsewhere:
        return f"{here}; write {' or '.join(_dotted(place) for place in elsewhere)}", None
    known = library_keys(recipe.TASK)
    own_first = sorted(known, key=lambda library: library != key[0])
    if library := next((library for library in own_first if name in known[library]), None):
        return f"{here}; {library_object(library, recipe.TASK)} knows it: write it under {library}.extra", None
    if others := [other.TASK.name for other in RECIPES.values() if field_at(key, other)]:
        return f"{here} with task: {recipe.TASK.name}; it is one with task: {' or '.join(others)}", None
    own = keys_of(section)
    if guess := nearest(name, own):
        return f"{here}; did you mean {guess}?", (*key[:-1], guess)
    if far := nearest(name, {str(place[-1]) for place in places(recipe)}):
        meant = " or ".join(_dotted(place) for place in places(recipe) if place[-1] == far)
        return f"{here}; did you mean {meant}?", None
    if (renamed := nearest(name, _RENAMED)) and len(name) > 5:
        return f"{here}; {_replacement(renamed, key)}", None
    return f"{here}; its keys are {', '.join(own)}", None


def extra_key(section: str, name: str, recipe: type[Recipe] = DEFAULT_RECIPE, *, guesses: bool = True) -> str | None:
    """What is wrong with a key under `extra`; None if the library takes it from there."""
    own = keys_of(section_at((section,), recipe))
    if name in own:
        return f"{section} has this key itself; write {section}.{name}"
    if name in NOT_FOR_RECIPES[section]:
        return f"not for a recipe; {NOT_FOR_RECIPES[section][name]}"
    by_section = library_keys(recipe.TASK)
    known = by_section[section]
    if name in known:
        return None
    said = f"{library_object(section, recipe.TASK)} has no such argument"
    if not guesses:
        return said
    if instead := _replacement(name, (section, name)):
        return f"{said}; {instead}"
    if others := [f"{other}.extra" for other, keys in by_section.items() if name in keys]:
        return f"{said}; it belongs in {' or '.join(others)}"
    guess = nearest(name, sorted(known - NOT_FOR_RECIPES[section].keys()))
    if guess is None:
        return f"{said}; leave it out"
    return f"{said}; did you mean {f'{section}.{guess}' if guess in own else guess}?"


def _replacement(name: str, key: KeyPath) -> str | None:
    """What replaces a name that libraries or other trainers use, unless that is the very key that is wrong."""
    plain = _plain(name)
    if instead := _RENAMED_IN_SECTION.get(_dotted(key), _RENAMED.get(plain)):
        if instead.startswith("nothing: "):
            return instead.removeprefix("nothing: ")
        return f"here it is {instead}"
    own_first = sorted(NOT_FOR_RECIPES, key=lambda section: section != key[0])
    return next((NOT_FOR_RECIPES[section][plain] for section in own_first if plain in NOT_FOR_RECIPES[section]), None)


def _named(key: KeyPath) -> str:
    return _dotted(key) if key else "a recipe"


def _dotted(key: KeyPath) -> str:
    return ".".join(str(step) for step in key)


def _plain(word: str) -> str:
    """`loraAlpha` and `lora-alpha` as `lora_alpha`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", word).lower().replace("-", "_").replace(" ", "_")


def _common_start(one: str, other: str) -> int:
    return next((index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))


def _edits(one: str, other: str) -> int:
    """Letters to insert, delete, change or swap with their neighbour to get from one word to the other."""
    before: list[int] = []
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        before, last, row = row, before, [i]
        for j, b in enumerate(other, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (a != b))
            if i > 1 and j > 1 and a == other[j - 2] and one[i - 2] == b:
                cost = min(cost, last[j - 2] + 1)
            row.append(cost)
    return row[-1]
