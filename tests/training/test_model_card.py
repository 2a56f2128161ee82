"""The README.md that goes with every adapter, and the table a run ends with."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import BitsAndBytesConfig

from lorafit import precision
from lorafit.recipe.recipe import CausalLmRecipe
from lorafit.report.tables import train_table
from lorafit.training.model_card import model_card, sparkline
from lorafit.training.seen import rows_seen
from support.reports import FACTS, HISTORY
from support.runs import logits, reloaded, run, small_recipe

HUB_BASE = {"model_name_or_path": "org/base"}


def card(*, history: list[dict[str, Any]] = HISTORY, **sections: Any) -> str:
    """The card of a made-up run."""
    recipe = {"model": HUB_BASE, "data": {"train": [{"path": "/home/anna/secret-project/rows.jsonl"}]}} | sections
    return model_card(CausalLmRecipe.model_validate(recipe), facts=FACTS, history=history)


def metadata(text: str) -> dict[str, Any]:
    """The block before the text, as the Hub reads it."""
    return yaml.safe_load(text.split("---\n")[1])


def block(text: str, language: str) -> str:
    """The first code block of a language."""
    return re.search(rf"```{language}\n(.*?)```", text, re.DOTALL).group(1)  # type: ignore[union-attr]


def test_the_card_of_a_run_holds_the_figures_of_its_manifest(tmp_path: Path, tiny_base: Path) -> None:
    result, _ = run(small_recipe(tmp_path, tiny_base, training={"max_steps": 5, "logging_steps": 2}))
    text = (Path(result.adapter) / "README.md").read_text(encoding="utf-8")
    manifest = json.loads((tmp_path / "run/manifest.json").read_text(encoding="utf-8"))
    train, held_out = manifest["data"]["train"], manifest["data"]["eval"]
    assert f"on about 20 of 24 rows (83 % of an epoch): 5 steps, {manifest['tokens']:,} tokens, seed 42." in text
    assert f"| before | {manifest['eval_loss_before']:.4f} |" in text
    assert f"| after | {manifest['eval_loss_after']:.4f} |" in text
    assert f"| train | 24 | 24 | {train['tokens']:,} | {train['trained_tokens']:,} | {train['longest']} | 0 |" in text
    assert f"| held out | 8 | 8 | {held_out['tokens']:,} |" in text
    assert f"| all | 14 |  |  |  | {sum(module['parameters'] for module in manifest['modules']):,} |" in text
    for fingerprint in (manifest["data"]["fingerprint"], manifest["base"]["fingerprint"]):
        assert f"`{fingerprint}`" in text
    assert all(f"{name} {version}" in text for name, version in manifest["versions"].items())


def test_every_step_is_counted_and_not_only_the_logged_ones(tmp_path: Path, tiny_base: Path) -> None:
    """24 rows in batches of 4: six steps are one epoch, and the last of them is not logged."""
    result, _ = run(small_recipe(tmp_path, tiny_base, training={"max_steps": 6, "logging_steps": 4}))
    manifest = json.loads((tmp_path / "run/manifest.json").read_text(encoding="utf-8"))
    assert result.tokens == manifest["data"]["train"]["tokens"]


@pytest.mark.parametrize(
    ("epochs", "said"),
    [
        (0.07, "about 518 of 7,398 rows (7 % of an epoch)"),
        (0.0005, "about 4 of 7,398 rows (0.05 % of an epoch)"),
        (1.0, "7,398 rows (1 epoch)"),
        (0.9999, "7,398 rows (1 epoch)"),
        (2.5, "7,398 rows (2.5 epochs)"),
    ],
)
def test_only_rows_that_were_seen_count(epochs: float, said: str) -> None:
    assert rows_seen(epochs, rows=7398) == said


def test_card_and_result_name_the_step_whose_adapter_is_kept(tmp_path: Path, tiny_base: Path) -> None:
    """A learning rate that overshoots: the loss falls, then rises."""
    training = {"max_steps": 40, "learning_rate": 0.2, "eval_strategy": "steps", "eval_steps": 2}
    result, _ = run(small_recipe(tmp_path, tiny_base, training=training, early_stopping={"patience": 2}))
    assert result.adapter_step is not None and result.adapter_step < result.steps
    text = (Path(result.adapter) / "README.md").read_text(encoding="utf-8")
    assert f"This adapter is that of step {result.adapter_step}, the best on the held-out rows." in text
    assert f" epochs; the adapter is that of step {result.adapter_step}, the best" in train_table(result)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the choice of a CPU")
@pytest.mark.parametrize(("native", "computed"), [(True, torch.bfloat16), (False, torch.float32)])
def test_the_card_loads_the_adapter_as_it_was_trained(
    native: bool, computed: torch.dtype, tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "cpu_computes_bfloat16", lambda: native)
    result, _ = run(small_recipe(tmp_path, tiny_base, quantization={"load_in_4bit": True}))
    text = (Path(result.adapter) / "README.md").read_text(encoding="utf-8")
    source = block(text, "python").replace("path/to/this/adapter", result.adapter)
    loaded: dict[str, Any] = {}
    exec(source.replace("path/to/the/base/model", str(tiny_base)), loaded)
    as_trained = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=computed,
    )
    same = reloaded(result, tiny_base, quantization_config=as_trained, dtype="auto")
    assert torch.equal(logits(loaded["model"].eval()), logits(same))
    assert loaded["model"].config.quantization_config.bnb_4bit_compute_dtype == computed
    assert loaded["tokenizer"].chat_template


def test_the_card_of_a_run_names_no_row_and_no_path(tmp_path: Path, tiny_base: Path) -> None:
    result, _ = run(small_recipe(tmp_path, tiny_base))
    text = (Path(result.adapter) / "README.md").read_text(encoding="utf-8")
    assert "`train.jsonl`" in text and f"`{tiny_base.name}`" in text
    assert not re.search(r"(^|[\s`\"'(])(/|~|\.\./)\w", text), text
    assert "What is" not in text and "It is" not in text
    assert "base_model" not in metadata(text)


def test_the_hub_reads_the_metadata_of_a_hub_base_and_hub_data() -> None:
    sources = [{"hub": "org/rows", "split": "train[:10]"}, {"path": "/rows.jsonl"}, {"hub": "org/rows", "name": "b"}]
    text = card(data={"train": sources}, quantization={"load_in_4bit": True}, lora={"use_rslora": True})
    assert metadata(text) == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "datasets": ["org/rows"],
        "tags": ["lora", "qlora", "rslora", "sft", "lorafit"],
    }
    assert 'revision="c0ffee"' in block(text, "python")


def test_the_card_says_where_a_system_text_goes() -> None:
    data = {"train": [{"path": "rows.jsonl"}]}
    assert "system texts stand at the start of the first user's message" in card(data=data | {"system": "merge"})
    assert "system texts" not in card(data=data)


def test_paths_lose_their_directories_wherever_they_stand() -> None:
    extra = {"cache_dir": "/home/anna/cache", "subfolder": "fp32"}
    strategy = {"strategy": "/home/anna/mine.yaml"}
    text = card(model=HUB_BASE | {"extra": extra}, launch=strategy, output_dir="/home/anna/run")
    assert "anna" not in text and "secret-project" not in text
    shown = yaml.safe_load(block(text, "yaml"))
    assert shown["model"]["extra"] == {"cache_dir": "cache", "subfolder": "fp32"}
    assert shown["launch"] == {"strategy": "mine.yaml"}
    assert shown["data"]["train"] == [{"path": "rows.jsonl"}]
    assert "output_dir" not in shown


def test_vllm_is_offered_for_plain_lora_on_a_hub_base_only() -> None:
    command = "vllm serve org/base --enable-lora --max-lora-rank 32 --lora-modules"
    assert command in card()
    others: list[dict[str, Any]] = [
        {"lora": {"use_dora": True}},
        {"lora": {"modules_to_save": ["lm_head"]}},
        {"lora": {"rank_pattern": {"q_proj": 8}}},
        {"lora": {"bias": "all"}},
        {"adalora": {"tinit": 1, "tfinal": 1}},
        {"model": {"model_name_or_path": "/models/base"}},
    ]
    assert ["vllm" in card(**changes) for changes in others] == [False] * len(others)


def test_held_out_losses_between_the_first_and_the_last_are_listed() -> None:
    evaluations = [{"step": step, "eval_loss": 3.0 - step / 100} for step in range(0, 101)]
    text = card(history=[*evaluations, *HISTORY])
    assert "| before | 3.0000 | 20.09 |" in text and "| after | 2.0000 | 7.39 |" in text
    assert "| 1 | 2.9900 |" in text
    assert len(re.findall(r"^\| \d+ \| \d\.\d{4} \|$", text, re.MULTILINE)) == 11
    assert "held-out" not in card()
    assert "30 steps of the 40 planned" in card()


@pytest.mark.parametrize(
    ("values", "bars"),
    [([1.0], "▁"), ([2.0, 2.0], "▁▁"), ([8.0, 1.0], "█▁"), ([float(i) for i in range(8)], "▁▂▃▄▅▆▇█")],
)
def test_a_curve_is_drawn_from_its_lowest_to_its_highest(values: list[float], bars: str) -> None:
    assert sparkline(values) == bars


def test_a_long_curve_is_drawn_as_means() -> None:
    assert sparkline([float(i // 25) for i in range(1000)]) == sparkline([float(i) for i in range(40)])


def test_the_final_table_says_what_came_of_the_run(tmp_path: Path, tiny_base: Path) -> None:
    result, _ = run(small_recipe(tmp_path, tiny_base))
    before, after = result.eval_loss_before, result.eval_loss_after
    assert before is not None and after is not None
    lines = train_table(result).splitlines()
    names = " ".join(line[:15].strip() for line in lines)
    assert names == "outcome held-out loss perplexity steps tokens time peak memory adapter next"
    assert f"{before:.4f} before" in lines[1] and f"{after:.4f} after" in lines[1]
    assert f"{after / before - 1:+.1%}" in lines[1]
    assert lines[1].index(" before") == lines[2].index(" before") and lines[1].index(" after") == lines[2].index(
        " after"
    )
    assert f"{result.tokens:,}   {result.tokens_per_second:,.0f} per second" in lines[4]
    assert f"{result.adapter} (0.0 MB)" in lines[7]
    assert f"lorafit report {result.run} " in lines[8]
    assert Path(lines[8].rpartition(" ")[2]).is_file()


def test_a_run_without_held_out_rows_says_so(tmp_path: Path, tiny_base: Path) -> None:
    result, _ = run(small_recipe(tmp_path, tiny_base, data={"train": [{"path": "train.jsonl"}], "eval": []}))
    assert "not known: data.eval and data.eval_fraction are empty" in train_table(result)
    assert "perplexity" not in (Path(result.adapter) / "README.md").read_text(encoding="utf-8")
