"""Tokens whose rows the base never trained are named before the run, and the mend that is named helps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lorafit.builders.base_model import check_base_model
from lorafit.builders.tokenizer import load_tokenizer
from lorafit.builders.untrained_rows import Matrix, never_trained, rows_on_disk
from lorafit.errors import ModelError, RecipeError
from lorafit.recipe.sections import ModelSection
from lorafit.training import load_model as model_module
from support import ROOT
from support.runs import run, small_recipe
from support.tiny import build_base, llama_config, write_jsonl

QUICKSTART = ROOT / "recipes/quickstart/base"
STOP, START = 2, 1
"""Ids of <|im_end|> and <|im_start|>."""


def _found(matrix: Matrix, *suspects: int, peers: tuple[int, ...] = ()) -> dict[int, str]:
    return never_trained(lambda ids: matrix[list(ids)], suspects, ordinary=range(len(matrix)), peers=peers)


def _random(columns: int = 64, *, mean: float = 0.0) -> Matrix:
    """[800, columns] rows as they are drawn, or around a common one, as trained rows are."""
    chance = np.random.default_rng(0)
    return (chance.normal(0, 0.02, (800, columns)) + mean * chance.normal(0, 0.02, columns)).astype(np.float32)


@pytest.mark.parametrize("mean", [0.0, 1.0, 3.0])
def test_rows_that_say_nothing_are_found_by_what_they_are(mean: float) -> None:
    matrix = _random(mean=mean)
    matrix[1] = 0
    matrix[2] = 1e-8
    matrix[3] = matrix[700] + 1e-6
    matrix[4] = matrix[5:].mean(axis=0)
    found = _found(matrix, 1, 2, 3, 4, 5, 6, peers=(700, 701))
    assert found.keys() == {1, 2, 3, 4}
    assert found[1] == "zero"
    assert found[2] == "as good as zero"
    assert found[3] == "the same as that of id 700"


@pytest.mark.parametrize("columns", [16, 64, 1024])
@pytest.mark.parametrize("mean", [0.0, 3.0])
def test_random_and_trained_rows_raise_no_alarm(columns: int, mean: float) -> None:
    assert _found(_random(columns, mean=mean), *range(800), peers=tuple(range(800))) == {}


def test_the_special_tokens_of_the_quickstart_were_trained() -> None:
    section = ModelSection(model_name_or_path=str(QUICKSTART))
    files, tokenizer = check_base_model(section), load_tokenizer(section)
    special = sorted(tokenizer.added_tokens_decoder)
    used = [id_ for id_ in special if id_ not in (tokenizer.pad_token_id, tokenizer.unk_token_id)]
    assert len(used) >= 2
    assert files.vocabulary
    for name in files.vocabulary.values():
        rows = rows_on_disk(files.directory, files.tensors[name])
        assert never_trained(rows, used, ordinary=range(files.vocab_size), peers=special) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_read_from_the_file_as_they_are(dtype: torch.dtype, tmp_path: Path) -> None:
    base = build_base(tmp_path / "base", dtype=dtype)
    files = check_base_model(ModelSection(model_name_or_path=str(base)))
    assert list(files.vocabulary) == ["model.embed_tokens", "lm_head"]
    table = AutoModelForCausalLM.from_pretrained(base).get_output_embeddings().weight.detach()
    rows = rows_on_disk(base, files.tensors["lm_head.weight"])([7, 263, 0])
    assert np.array_equal(rows, table[[7, 263, 0]].float().numpy())


def _untrained_base(directory: Path, ids: list[int], *, tied: bool, matrices: tuple[str, ...]) -> Path:
    base = build_base(directory, config=llama_config(tie_word_embeddings=tied))
    tensors = load_file(base / "model.safetensors")
    for name in tensors:
        if any(matrix in name for matrix in matrices):
            tensors[name][ids] = 0
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    return base


BOTH = ("embed_tokens", "lm_head")
NAMED = r'model.add_tokens: \["<\|im_start\|>", "<\|im_end\|>"\]'


@pytest.mark.parametrize("tied", [False, True])
def test_a_stop_token_that_could_never_be_written_is_refused_and_its_mend_helps(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = _untrained_base(tmp_path / "base", [STOP, START], tied=tied, matrices=BOTH)
    with monkeypatch.context() as patched:
        patched.setattr(model_module, "load_base_model", None)  # calling it would be a TypeError
        head = "model.embed_tokens" if tied else "lm_head"
        said = (
            rf"answers end with <\|im_end\|> \(its row is zero\), which was never trained in {head} .*train .*{NAMED}"
        )
        with pytest.raises(ModelError, match=said) as caught:
            run(small_recipe(tmp_path, base))
        assert caught.value.exit_code == 4
    assert not (tmp_path / "run").exists()
    model = {"model_name_or_path": str(base), "add_tokens": ["<|im_start|>", "<|im_end|>"]}
    _, lines = run(small_recipe(tmp_path, base, model=model))
    assert not [line for line in lines if "never trained" in line]


def test_other_tokens_are_warned_of_by_module(tmp_path: Path) -> None:
    base = _untrained_base(tmp_path / "base", [START], tied=False, matrices=("embed_tokens",))
    _, lines = run(small_recipe(tmp_path, base))
    assert [line for line in lines if "never trained" in line] == [
        "warning: model.embed_tokens: rows of tokens in the data were never trained and are frozen: <|im_start|> "
        '(zero); train their rows with model.add_tokens: ["<|im_start|>"], or use a template of tokens that the base '
        "knows"
    ]


@pytest.mark.parametrize(
    "lora",
    [
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": {"embed_tokens": [STOP], "lm_head": [STOP]}},
    ],
    ids=["whole head", "rows"],
)
def test_rows_that_the_recipe_trains_are_not_named(lora: dict[str, Any], tmp_path: Path) -> None:
    base = _untrained_base(tmp_path / "base", [STOP], tied=False, matrices=("lm_head",))
    _, lines = run(small_recipe(tmp_path, base, lora={"r": 4, **lora}))
    assert not [line for line in lines if "never trained" in line]


def test_the_rows_of_an_untied_head_are_not_trained_with_those_of_the_embedding(tmp_path: Path) -> None:
    base = _untrained_base(tmp_path / "base", [STOP], tied=False, matrices=("lm_head",))
    with pytest.raises(ModelError, match="never trained in lm_head"):
        run(small_recipe(tmp_path, base, lora={"r": 4, "trainable_token_indices": [STOP]}))


def test_tokens_that_cannot_be_trained_here_are_mended_by_a_template(tmp_path: Path) -> None:
    base = _untrained_base(tmp_path / "base", [STOP], tied=False, matrices=("lm_head",))
    lora = {"r": 4, "modules_to_save": ["embed_tokens"]}
    with pytest.raises(ModelError, match="could never stop; use a template of tokens that the base knows, or the inst"):
        run(small_recipe(tmp_path, base, lora=lora))


def test_added_tokens_that_no_row_has_are_refused_or_warned_of(tmp_path: Path, tiny_base: Path) -> None:
    model = {"model_name_or_path": str(tiny_base), "add_tokens": ["<never>", "<nowhere>"]}
    with pytest.raises(RecipeError, match="no training row has <never> or <nowhere>: their rows would learn nothing"):
        run(small_recipe(tmp_path, tiny_base, model=model))
    rows = [{"prompt": "a", "completion": f"<never>{number}"} for number in range(24)]
    loaded = small_recipe(tmp_path, tiny_base, model=model, data={"train": [{"path": "rows.jsonl"}], "eval": []})
    write_jsonl(tmp_path / "rows.jsonl", rows)
    _, lines = run(loaded)
    assert "warning: model.add_tokens: no training row has <nowhere>: the embedding stays where it begins" in lines
    assert json.loads((tmp_path / "run/manifest.json").read_text())["outcome"] == "finished"
