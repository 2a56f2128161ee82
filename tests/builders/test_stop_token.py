"""The stop token that a recipe names: trained, audited, previewed, saved with the adapter, merged, stopped on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GenerationConfig

from lorafit.base_at_hand import look_at_base
from lorafit.builders.tokenizer import load_tokenizer
from lorafit.data.preview import recipe_preview
from lorafit.errors import DataError, ModelError
from lorafit.evaluation.subject import read_subject
from lorafit.recipe.sections import ModelSection
from support.random_adapters import merged
from support.runs import run, small_recipe
from support.tiny import build_base, byte_tokenizer


def _base(directory: Path) -> Path:
    """A base that stops on its padding token, as bases before any chat do, with ChatML in its tokenizer."""
    base = build_base(directory)
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 0, "top_p": 0.9}))
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = "<|pad|>"
    tokenizer.save_pretrained(directory)
    return base


def _data(**keys: Any) -> dict[str, Any]:
    return {"data": {"train": [{"path": "train.jsonl"}], "eval": [{"path": "eval.jsonl"}], **keys}}


def test_answers_that_end_otherwise_are_refused_until_the_stop_token_is_named(tmp_path: Path) -> None:
    base = _base(tmp_path / "base")
    with pytest.raises(DataError, match=r"generation stops on '<\|pad\|>'.* name the token that ends them: data.stop_"):
        run(small_recipe(tmp_path, base))
    result, _ = run(small_recipe(tmp_path, base, **_data(stop_token="<|im_end|>")))
    adapter = Path(result.adapter)
    assert AutoTokenizer.from_pretrained(adapter).eos_token == "<|im_end|>"
    written = GenerationConfig.from_pretrained(adapter)
    assert (written.eos_token_id, written.top_p) == ([2, 0], 0.9)
    merged(Path(result.run), tmp_path / "merged")
    assert GenerationConfig.from_pretrained(tmp_path / "merged").eos_token_id == [2, 0]
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").eos_token == "<|im_end|>"
    subject = read_subject(result.run, data=None, merged=None, base=None, overrides=[])
    assert subject.stop_token_ids == {0, 2}


def test_without_a_named_stop_token_the_adapter_has_no_generation_config(tmp_path: Path, tiny_base: Path) -> None:
    result, _ = run(small_recipe(tmp_path, tiny_base))
    assert not (Path(result.adapter) / "generation_config.json").exists()


@pytest.mark.parametrize("template", ["plain", "alpaca"])
@pytest.mark.parametrize(("stop_token", "tokens"), [("<|im_end|>", []), ("<end>", ["<end>"])])
def test_a_layout_ends_answers_with_it(template: str, stop_token: str, tokens: list[str], tmp_path: Path) -> None:
    base = _base(tmp_path / "base")
    model = {"model": {"model_name_or_path": str(base), "add_tokens": tokens}}
    loaded = small_recipe(
        tmp_path, base, **model, training={"max_length": 256}, **_data(template=template, stop_token=stop_token)
    )
    shown = recipe_preview(loaded.recipe, rows=1, cache_dir=None)
    last = shown.rows[0].tokens[-1]
    assert (last.text, last.is_stop) == (stop_token, True)
    assert stop_token in shown.stop_tokens


def test_a_stop_token_is_left_out_with_the_special_tokens(tmp_path: Path) -> None:
    section = ModelSection(model_name_or_path=str(_base(tmp_path / "base")), add_tokens=("<end>", "<tool>"))
    tokenizer = load_tokenizer(section, stop_token="<end>")
    ids = tokenizer("a<tool>b<end>", add_special_tokens=False)["input_ids"]
    assert len(ids) == 4
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<tool>b"


@pytest.mark.parametrize(
    ("stop_token", "said"),
    [
        ("<|im_ent|>", r'"<\|im_ent\|>" is 10 tokens of the tokenizer, not one; did you mean <\|im_end\|>\?'),
        ("</answer>", "is 9 tokens of the tokenizer, not one; name one of its tokens, or add it with model.add_tokens"),
    ],
)
def test_what_is_not_one_token_is_refused(stop_token: str, said: str, tmp_path: Path, tiny_base: Path) -> None:
    with pytest.raises(ModelError, match=said):
        run(small_recipe(tmp_path, tiny_base, **_data(stop_token=stop_token)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("stop_token", "tokens", "said"),
    [
        ("<|im_end|>", [], None),
        ("<end>", ["<end>"], None),
        ("<end>", [], '"<end>" is no token of the tokenizer; name one of its tokens, or add it with model.add_tokens'),
    ],
)
def test_validate_looks_for_it_in_the_tokenizers_file(
    stop_token: str, tokens: list[str], said: str | None, tmp_path: Path, tiny_base: Path
) -> None:
    model = {"model_name_or_path": str(tiny_base), "add_tokens": tokens}
    look = look_at_base(small_recipe(tmp_path, tiny_base, model=model, **_data(stop_token=stop_token)))
    assert [problem.message for problem in look.problems] == ([said] if said else [])
