"""Tokens added to a base: where their rows begin, that they are trained, and that plain PEFT and a merge have them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from lorafit.builders.added_tokens import added_tokens
from lorafit.builders.base_model import check_base_model, load_base_model
from lorafit.builders.model_modules import weight_of
from lorafit.builders.new_rows import begin_rows
from lorafit.builders.tokenizer import load_tokenizer
from lorafit.errors import DataError, ModelError
from lorafit.evaluation.models import models
from lorafit.evaluation.subject import read_subject
from lorafit.merging.adapter_files import read_adapter
from lorafit.merging.merge import read_base
from lorafit.merging.verification_prompts import Prompts, PromptsJob
from lorafit.merging.verify import judge, verification_job
from lorafit.merging.verify_reference import reference
from lorafit.merging.verify_written import compare
from lorafit.planning.fake_step import FakeRun
from lorafit.planning.known_shapes import architecture
from lorafit.recipe import load
from lorafit.recipe.sections import ModelSection
from lorafit.training.token_rows import tokens_line
from lorafit.training.train import run_training
from support.merge_cases import choose
from support.plan_probe import apart
from support.random_adapters import merged
from support.runs import cache_of, logits, small_recipe
from support.tiny import build_base, byte_tokenizer, llama_config, write_jsonl

TOKENS = ["<tool>", "</tool>"]
GROWN, SPARE = 259, 264
"""Rows of the embedding: as many as the tokenizer has tokens, or five more."""


def _calls(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"add {i} and {i % 5}", "completion": f"<tool>{i} {i % 5}</tool>"} for i in range(count)]


def _rows(**keys: Any) -> dict[str, Any]:
    return {"train": [{"path": "train.jsonl"}], "eval": [{"path": "eval.jsonl"}], **keys}


def _section(base: Path, *tokens: str) -> ModelSection:
    return ModelSection(model_name_or_path=str(base), add_tokens=tokens)


def _trained(directory: Path, base: Path, **sections: Any) -> tuple[Path, PeftModel]:
    """The run directory, and the model as it was trained."""
    model = {"model_name_or_path": str(base), "add_tokens": TOKENS}
    loaded = small_recipe(directory, base, **({"model": model} | sections))
    for side in ("train", "eval"):
        write_jsonl(directory / f"{side}.jsonl", _calls(24) if side == "train" else _calls(32)[24:])
    trained = run_training(loaded, cache_dir=cache_of(directory))
    return Path(trained.result.run), trained.model.eval()


def _as_a_stranger_loads_it(base: Path, adapter: Path, *, rows: int | None, **keys: Any) -> PeftModel:
    model = AutoModelForCausalLM.from_pretrained(base, **keys)
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return PeftModel.from_pretrained(model, adapter).eval()


@pytest.mark.parametrize("rows", [GROWN, SPARE])
@pytest.mark.parametrize("tied", [False, True])
def test_plain_peft_and_the_merged_model_are_what_was_trained(tied: bool, rows: int, tmp_path: Path) -> None:
    base = build_base(tmp_path / "base", config=llama_config(tie_word_embeddings=tied, vocab_size=rows))
    run, model = _trained(tmp_path, base)
    expected = logits(model)
    grown = None if rows == SPARE else 261
    assert torch.equal(logits(_as_a_stranger_loads_it(base, run / "adapter", rows=grown)), expected)
    merged(run, tmp_path / "merged")
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (logits(alone) - expected).abs().max() < 1e-5
    assert alone.config.vocab_size == max(rows, 261)
    assert alone.config.tie_word_embeddings is tied
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer("a<tool>b", add_special_tokens=False)["input_ids"] == [67, 259, 68]
    assert tokenizer.decode([67, 259, 68], skip_special_tokens=True) == "a<tool>b"


@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens_of_a_quantised_base_reload(tied: bool, tmp_path: Path) -> None:
    base = build_base(tmp_path / "base", config=llama_config(tie_word_embeddings=tied, vocab_size=GROWN))
    run, model = _trained(tmp_path, base, quantization={"load_in_4bit": True})
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    again = _as_a_stranger_loads_it(base, run / "adapter", rows=261, quantization_config=quantised)
    there = dict(model.named_parameters())
    rows = {name: tensor for name, tensor in again.named_parameters() if "trainable_tokens_delta" in name}
    assert len(rows) == (1 if tied else 2)
    for name, tensor in rows.items():
        assert torch.equal(tensor.to(there[name].dtype), there[name])
    merged(run, tmp_path / "merged")
    table = weight_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").get_input_embeddings())
    assert torch.equal(table[259:], next(iter(rows.values())).float())


def test_a_merge_with_a_larger_vocabulary_is_verified(tmp_path: Path) -> None:
    base = build_base(tmp_path / "base", config=llama_config(vocab_size=GROWN), dtype=torch.bfloat16)
    run, _ = _trained(tmp_path, base)
    merged(run, tmp_path / "merged")
    adapter = read_adapter(run)
    files = read_base(adapter)
    recipe = load(run / "recipe.yaml").recipe
    ids, _ = choose(PromptsJob(adapter.base, recipe, frozenset([2]), files.vocab_size, cache_dir=None))
    assert any(259 in row for row in ids)
    (tmp_path / "work").mkdir()
    prompts = Prompts(tuple(map(tuple, ids[:8])), "8 rows")
    job = verification_job(
        tmp_path / "merged", adapter=adapter, base_files=files, dtype=None, prompts=prompts, work=tmp_path / "work"
    )
    report = judge(compare(job, reference(job)), job=job, prompts=prompts, adapter=adapter, onto="original")
    assert report.passed, report.wrong
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= {module.name for module in report.modules}


def test_a_new_row_begins_as_the_mean_of_its_pieces(tmp_path: Path) -> None:
    base = build_base(tmp_path / "base", config=llama_config(vocab_size=GROWN))
    plain = AutoModelForCausalLM.from_pretrained(base)
    model = load_base_model(_section(base, "<tool>"), None, dtype="auto", device_map=None)
    pieces = byte_tokenizer()("<tool>", add_special_tokens=False)["input_ids"]
    assert len(pieces) == 6
    for begun, before in (
        (weight_of(model.get_input_embeddings()), weight_of(plain.get_input_embeddings())),
        (weight_of(model.get_output_embeddings()), weight_of(plain.get_output_embeddings())),
    ):
        assert begun.shape[0] == 260
        assert torch.equal(begun[259], before[pieces].mean(dim=0))
        assert torch.equal(begun[:259], before)


def test_a_token_the_base_has_begins_anew_only_where_it_was_never_trained(tmp_path: Path) -> None:
    base = build_base(tmp_path / "base", config=llama_config(vocab_size=SPARE))
    model = AutoModelForCausalLM.from_pretrained(base)
    before = weight_of(model.get_input_embeddings()).detach().clone()
    with torch.no_grad():
        weight_of(model.get_output_embeddings())[2] = 0
    added = added_tokens(byte_tokenizer(), ["<|im_end|>"], rows=SPARE)
    assert added.known == {"<|im_end|>"}
    assert added.trained == (2,)
    begin_rows(model, added)
    assert torch.equal(weight_of(model.get_input_embeddings()), before)
    head = weight_of(model.get_output_embeddings())
    assert torch.equal(head[2], head[list(added.pieces["<|im_end|>"])].mean(dim=0))
    assert len(added.pieces["<|im_end|>"]) == len("<|im_end|>")


def test_rows_between_the_embedding_and_a_new_token_are_trained_and_saved_too(tmp_path: Path) -> None:
    base = build_base(tmp_path / "base", config=llama_config(vocab_size=GROWN))
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<image>"])
    tokenizer.save_pretrained(base)
    files = check_base_model(_section(base, "<tool>"))
    assert (files.trained_token_ids, files.vocab_size) == ((259, 260), 261)
    model = load_base_model(_section(base, "<tool>"), None, dtype="auto", device_map=None)
    table = weight_of(model.get_input_embeddings())
    assert torch.allclose(table[259], table[:259].mean(dim=0), atol=1e-7)


def test_a_word_of_the_vocabulary_cuts_other_text_as_before(tmp_path: Path) -> None:
    base = build_base(tmp_path / "base")
    tokenizer = load_tokenizer(_section(base, "a", "<tool>"))
    assert len(tokenizer) == 260
    assert "a" not in tokenizer.get_added_vocab()


def test_a_head_with_a_bias_is_refused_before_a_weight_is_read(tmp_path: Path) -> None:
    from transformers import PhiConfig

    settings: dict[str, Any] = {"vocab_size": 264, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    base = build_base(tmp_path / "base", config=PhiConfig(**settings, num_attention_heads=4, eos_token_id=2))
    check_base_model(_section(base))
    with pytest.raises(ModelError, match="has a bias in its output head, which peft would leave out"):
        check_base_model(_section(base, "<tool>"))


@pytest.mark.parametrize("rows", [GROWN, SPARE])
def test_the_card_loads_what_was_trained_with_its_stop_token(rows: int, tmp_path: Path) -> None:
    base = build_base(tmp_path / "base", config=llama_config(vocab_size=rows))
    run, model = _trained(tmp_path, base, data=_rows(template="plain", stop_token="</tool>"))
    text = (run / "adapter/README.md").read_text(encoding="utf-8")
    assert "`<tool>` (259), `</tool>` (260)" in text
    assert ("base.resize_token_embeddings(261, mean_resizing=False)" in text) is (rows == GROWN)
    found = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert found
    loaded: dict[str, Any] = {}
    source = found[1].replace("path/to/this/adapter", str(run / "adapter"))
    exec(source.replace("path/to/the/base/model", str(base)), loaded)
    assert torch.equal(logits(loaded["model"].eval()), logits(model))
    assert loaded["model"].generation_config.eos_token_id == [260, 2]
    assert loaded["tokenizer"].eos_token == "</tool>"
    assert json.loads((run / "manifest.json").read_text())["added_tokens"] == {"<tool>": 259, "</tool>": 260}


def test_what_is_added_is_said(tmp_path: Path) -> None:
    base = build_base(tmp_path / "base", config=llama_config(vocab_size=GROWN))
    files = check_base_model(_section(base, "<tool>", "<|im_end|>"))
    assert files.added is not None
    expected = (
        "<tool> is 259, <|im_end|> is 2; the embedding grows from 259 to 260 rows; of the base already: <|im_end|>"
    )
    assert tokens_line(files.added) == f"trained tokens: {expected}"


def test_tokens_beyond_the_embedding_are_given_rows_by_the_mend_that_is_named(tmp_path: Path) -> None:
    base = build_base(tmp_path / "base", config=llama_config(vocab_size=GROWN))
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(TOKENS)
    tokenizer.save_pretrained(base)
    with pytest.raises(DataError, match=r'has 259 embeddings; give .* model.add_tokens: \["<tool>", "</tool>"\]'):
        _trained(tmp_path, base, model={"model_name_or_path": str(base)})
    run, _ = _trained(tmp_path, base)
    assert json.loads((run / "manifest.json").read_text())["added_tokens"] == {"<tool>": 259, "</tool>": 260}


def test_a_plain_adapter_with_new_tokens_is_evaluated_with_them(tmp_path: Path) -> None:
    base = build_base(tmp_path / "base", config=llama_config(vocab_size=GROWN))
    run, _ = _trained(tmp_path, base)
    rows = tmp_path / "eval.jsonl"
    subject = read_subject(str(run / "adapter"), data=rows, merged=None, base=str(base), overrides=[])
    assert subject.recipe.model.add_tokens == tuple(TOKENS)
    losses = {}
    for name, model in models(subject, with_base=True):
        with torch.no_grad():
            losses[name] = model(input_ids=torch.tensor([[67, 259, 68, 260]])).logits[0, -1, 259]
    assert losses["base"] != losses["adapter"]


def test_a_plan_counts_the_rows_of_added_tokens(tmp_path: Path) -> None:
    base = build_base(tmp_path / "base", config=llama_config(vocab_size=GROWN))
    model = {"model_name_or_path": str(base)}

    def trained_bytes(tokens: list[str]) -> int:
        loaded = small_recipe(tmp_path, base, model=model | {"add_tokens": tokens})
        run = FakeRun(loaded, config=architecture(loaded.recipe.model), bf16=False, checkpointing=False)
        return run.trained_bytes

    assert apart(trained_bytes, TOKENS) - apart(trained_bytes, []) == 2 * 2 * 64 * 4
