"""Every field of 20 recipes, broken in one or two places: refused, or provably the same recipe."""

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from lorafit.recipe import Recipe, load
from lorafit.recipe.schema_walk import field_at, keys_of, section_at, section_in
from lorafit.recipe.yaml_reader import KeyPath
from support.recipes import problems, written

MODEL = {"model_name_or_path": "org/base"}
ROWS = {"train": [{"path": "rows.jsonl"}]}
HELD_OUT = {**ROWS, "eval": [{"path": "eval.jsonl", "format": "text", "limit": 100}]}

RECIPES: list[dict[str, Any]] = [
    {"model": MODEL, "data": ROWS},
    {"model": {**MODEL, "revision": "abc", "dtype": "bfloat16", "attn_implementation": "sdpa"}, "data": HELD_OUT},
    {
        "model": {**MODEL, "trust_remote_code": True, "add_tokens": ["<a>"], "extra": {"cache_dir": "c"}},
        "data": {**ROWS, "stop_token": "<a>"},
        "output_dir": "runs/a",
    },
    {"model": MODEL, "data": ROWS, "quantization": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}},
    {
        "model": MODEL,
        "data": ROWS,
        "quantization": {
            "load_in_4bit": True,
            "bnb_4bit_use_double_quant": False,
            "bnb_4bit_compute_dtype": "float32",
            "bnb_4bit_quant_storage": "bfloat16",
            "llm_int8_skip_modules": ["lm_head"],
        },
        "launch": {"num_processes": 2, "strategy": "fsdp2"},
    },
    {"model": MODEL, "data": ROWS, "quantization": {"load_in_8bit": True, "llm_int8_threshold": 5.0}},
    {"model": MODEL, "data": ROWS, "lora": {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "use_rslora": True}},
    {
        "model": MODEL,
        "data": ROWS,
        "lora": {
            "target_modules": ["q_proj", "v_proj"],
            "exclude_modules": ["mlp"],
            "layers_to_transform": [0, 1],
            "layers_pattern": "layers",
            "rank_pattern": {"q_proj": 4},
            "alpha_pattern": {"q_proj": 4},
        },
    },
    {
        "model": MODEL,
        "data": ROWS,
        "lora": {"use_dora": True, "init_lora_weights": "gaussian", "modules_to_save": ["head"]},
    },
    {"model": MODEL, "data": ROWS, "lora": {"target_parameters": ["experts.w"], "trainable_token_indices": [3, 4]}},
    {
        "model": MODEL,
        "data": ROWS,
        "lora": {"bias": "lora_only", "lora_bias": True, "extra": {"ensure_weight_tying": True}},
    },
    {"model": MODEL, "data": ROWS, "lora": {"init_lora_weights": "eva", "eva_config": {"rho": 1.5}}},
    {
        "model": MODEL,
        "data": ROWS,
        "adalora": {"target_r": 4, "init_r": 8, "tinit": 10, "tfinal": 20, "delta_t": 2, "orth_reg_weight": 0.1},
        "lora": {"target_modules": "all-linear"},
    },
    {
        "model": MODEL,
        "data": {
            "train": [
                {"path": "a.csv", "format": "prompt_completion", "columns": {"prompt": "q", "completion": "a"}},
                {"hub": "org/rows", "name": "main", "split": "train", "revision": "v1", "weight": 0.5},
            ],
            "eval_fraction": 0.1,
            "template": "chat",
            "template_kwargs": {"enable_thinking": False},
        },
    },
    {"model": MODEL, "data": {**ROWS, "train_on": "all", "over_length": "truncate", "max_lost_rows": 0.5}},
    {
        "model": MODEL,
        "data": ROWS,
        "training": {
            "max_length": 512,
            "packing": True,
            "num_train_epochs": 2.0,
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-4,
            "lr_scheduler_type": "cosine",
            "lr_scheduler_kwargs": {"num_cycles": 0.5},
            "warmup_steps": 0.1,
            "optim": "adamw_torch",
            "weight_decay": 0.1,
            "max_grad_norm": 0.5,
        },
    },
    {
        "model": MODEL,
        "data": ROWS,
        "training": {
            "max_steps": 100,
            "bf16": "auto",
            "fp16": True,
            "gradient_checkpointing": "auto",
            "neftune_noise_alpha": 5.0,
            "logging_steps": 5,
            "report_to": ["wandb"],
            "run_name": "a",
            "seed": 1,
            "dataloader_num_workers": 1,
        },
    },
    {
        "model": MODEL,
        "data": HELD_OUT,
        "training": {
            "eval_strategy": "steps",
            "eval_steps": 0.25,
            "load_best_model_at_end": True,
            "train_sampling_strategy": "group_by_length",
            "torch_compile": True,
            "loss_type": "dft",
            "extra": {"adam_beta2": 0.95},
        },
        "early_stopping": {"patience": 2, "min_delta": 0.01},
    },
    {
        "model": MODEL,
        "data": HELD_OUT,
        "task": "causal_lm",
        "optimizer": {"loraplus_lr_ratio": 16.0},
        "checkpoints": {"every": "10min", "keep": 3},
        "health": {"on_nan": "warn"},
        "speed": {"fused_lora": False, "answer_head": False, "last_layer": False},
        "silence": ["alpha"],
        "eval": {
            "compare_base": True,
            "generate": {"max_new_tokens": 8, "metrics": ["exact_match", "bleu"], "answer": "a|b", "limit": 5},
            "general": [{"path": "general.txt"}],
            "tasks": ["hellaswag"],
        },
        "rank_sweep": {
            "ranks": [2, 8],
            "eps": 0.01,
            "alpha": "rslora",
            "seeds": 2,
            "budget": 0.9,
            "tune_lr": True,
            "lr_trials": 3,
        },
    },
    {
        "model": MODEL,
        "data": ROWS,
        "checkpoints": {"every": 50},
        "launch": {"num_processes": "auto", "strategy": "zero2"},
        "merge": {"dtype": "float16", "base": "original", "verify": False},
    },
]


class Mapping(list[tuple[str, Any]]):
    """A mapping that may hold a key twice."""


def pairs(value: Any) -> Any:
    if isinstance(value, dict):
        return Mapping((key, pairs(entry)) for key, entry in value.items())
    return [pairs(entry) for entry in value] if isinstance(value, list) else value


def text_of(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)}: {text_of(entry)}" for key, entry in value) + "}"
    return "[" + ", ".join(map(text_of, value)) + "]" if isinstance(value, list) else json.dumps(value)


def fields_of(value: Any, at: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Every key of the schema that is written, with its value."""
    if isinstance(value, Mapping):
        for key, entry in value:
            if field_at((*at, key)):
                yield (*at, key), entry
                yield from fields_of(entry, (*at, key))
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            yield from fields_of(entry, (*at, index))


def changed(value: Any, key: KeyPath, *entries: tuple[str, Any]) -> Any:
    """`value` with other entries in place of the one at `key`."""
    step, rest = key[0], key[1:]
    if isinstance(step, int):
        return [changed(entry, rest, *entries) if index == step else entry for index, entry in enumerate(value)]
    new = Mapping()
    for name, entry in value:
        if name == step:
            new += entries if not rest else [(name, changed(entry, rest, *entries))]
        else:
            new.append((name, entry))
    return new


@dataclass(frozen=True)
class Case:
    kind: str
    key: KeyPath
    recipe: Any
    is_second_edit: bool = False


def misspelt(name: str, random_: random.Random) -> str:
    at = random_.randrange(len(name))
    letter = random_.choice("abcdefghijklmnopqrstuvwxyz_")
    match random_.choice(["drop", "double", "swap", "change", "add", "case"]):
        case "drop" if len(name) > 1:
            return name[:at] + name[at + 1 :]
        case "double":
            return name[: at + 1] + name[at:]
        case "swap" if len(name) > 1:
            at = max(at, 1)
            return name[: at - 1] + name[at] + name[at - 1] + name[at + 1 :]
        case "change":
            return name[:at] + letter + name[at + 1 :]
        case "case":
            return "".join(part.capitalize() for part in name.split("_"))
    return name[:at] + letter + name[at:]


def wrong_type(value: Any, random_: random.Random) -> Any:
    match value:
        case bool():
            return random_.choice(["yes", "true", 1, 0.0, [True]])
        case int():
            return random_.choice([str(value), value + 0.5, True, [value], "many"])
        case float():
            return random_.choice([str(value), True, [value], "fast"])
        case str():
            return random_.choice([1.5, [[1]], Mapping([("zz", Mapping([("zz", 1)]))])])
        case Mapping():
            return random_.choice(["text", 3, [1], True])
        case _:
            return random_.choice([1.5, True, Mapping([("zz", Mapping())])])


def out_of_range(value: Any, random_: random.Random) -> Any:
    match value:
        case bool() | Mapping():
            return None
        case int() | float():
            return (
                random_.choice([-1, -0.5, -(10**30)]) if isinstance(value, float) else random_.choice([-1, -(10**30)])
            )
        case str():
            return random_.choice(["", f"{value}zzzz"])
        case [int(), *_]:
            return [*value, -1]
    return None


FREE_TEXT = (
    "answer",
    "model_name_or_path",
    "revision",
    "path",
    "hub",
    "name",
    "split",
    "run_name",
    "output_dir",
    "layers_pattern",
)
"""Text of any kind but none is as good as another here."""


def mutations(recipe: Any, random_: random.Random) -> Iterator[Case]:
    """One case or more for every field."""
    written_fields = list(fields_of(recipe))
    for key, value in written_fields:
        name = str(key[-1])
        own = keys_of(section_at(key[:-1]))
        for _ in range(3):
            wrong = misspelt(name, random_)
            if wrong not in own:
                yield Case("misspelt", key, changed(recipe, key, (wrong, value)))
        yield Case("twice", key, changed(recipe, key, (name, value), (name, value)))
        yield Case("wrong type", key, changed(recipe, key, (name, wrong_type(value, random_))))
        outside = out_of_range(value, random_)
        if outside is not None and not (name in FREE_TEXT and outside != ""):
            yield Case("out of range", key, changed(recipe, key, (name, outside)))
        homes = [
            home
            for home, entry in written_fields
            if isinstance(entry, Mapping) and (field := field_at(home)) and section_in(field.annotation)
        ]
        homes = [
            home
            for home in homes
            if home != key[:-1] and home[: len(key)] != key and name not in keys_of(section_at(home))
        ]
        if homes:
            home = random_.choice(homes)
            moved = changed(recipe, home, (str(home[-1]), Mapping([*dict(written_fields)[home], (name, value)])))
            yield Case("moved", key, moved if key == home[: len(key)] else changed(moved, key))
        if key in (("model",), ("model", "model_name_or_path"), ("data",), ("data", "train")) or name in (
            "path",
            "hub",
        ):
            yield Case("removed", key, changed(recipe, key))


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Recipe, Case]]:
    """Every mutation of every recipe, and as many again with a second edit."""
    random_ = random.Random(0)
    directory = tmp_path_factory.mktemp("recipes")
    found = []
    for recipe in map(pairs, RECIPES):
        right = load(written(directory, text_of(recipe))).recipe
        for case in mutations(recipe, random_):
            found.append((right, case))
            again = list(mutations(case.recipe, random_)) if random_.random() < 0.3 else []
            again = [second for second in again if second.key != case.key]  # which might undo the first
            if again:
                found.append((right, replace(random_.choice(again), is_second_edit=True)))
    return found


def test_there_are_twenty_recipes_that_write_nearly_every_key() -> None:
    assert len(RECIPES) == 20
    names = {str(key[-1]) for recipe in RECIPES for key, _ in fields_of(pairs(recipe))}
    sections = [section_at(()), *(section_at(home) for home in [("model",), ("lora",), ("training",), ("adalora",)])]
    missing = {name for section in sections for name in section.model_fields} - names
    assert missing <= {"corda_config", "extends"}


def test_broken_recipes_are_refused_or_the_same(
    cases: list[tuple[Recipe, Case]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("broken")
    assert len(cases) >= 1_500
    assert len({case.kind for _, case in cases}) == 6
    guessed = []
    for right, case in cases:
        text = text_of(case.recipe)
        said = problems(directory, text)
        if not said:
            assert load(directory / "x.yaml").recipe == right, f"{case.kind} {case.key}: {text}"
            continue
        assert all(line.startswith("x.yaml") and "\n" not in line for line in said)
        assert len(said) == len(set(said))
        if case.kind == "misspelt" and not case.is_second_edit:
            name = rf"\b{case.key[-1]}\b"
            guessed.append(any(re.search(rf"(did you mean|write|here it is) .*{name}", line) for line in said))
    assert len(guessed) > 500
    assert sum(guessed) / len(guessed) >= 0.95
