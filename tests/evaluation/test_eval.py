"""`lorafit eval`: what it compares, on which rows, with how many models in memory, and what it leaves."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from lorafit.errors import DataError, RecipeError
from lorafit.evaluation import evaluate as evaluate_module
from lorafit.evaluation import models as models_module
from lorafit.evaluation import subject as subject_module
from lorafit.recipe.sections import EvalSection, GenerateSection
from support.eval_cases import GENERATE, copied, evaluated, plain_adapter, short_own_texts, told, trained_run  # noqa: F401
from support.tiny import sums, write_jsonl

pytestmark = pytest.mark.usefixtures("short_own_texts")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_run(tmp_path_factory.mktemp("eval") / "made")


@pytest.fixture(scope="module")
def alone(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without a merged model, which takes less time."""
    copy = copied(run, tmp_path_factory.mktemp("alone") / "made")
    shutil.rmtree(copy / "merged")
    return copy


def test_the_json_is_that_of_the_run_and_of_the_terminal(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said, out = told(capsys, str(run), "--json", "--set", GENERATE)
    assert code == 0
    result = json.loads(out)
    assert json.loads((run / "eval.json").read_text(encoding="utf-8")) == result
    manifest = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [entry["eval_loss"] for entry in manifest if "eval_loss" in entry]
    assert result["base"]["loss"] == pytest.approx(losses[0], rel=1e-5)
    assert result["adapter"]["loss"] == pytest.approx(losses[-1], rel=1e-5)
    assert result["merged"]["loss"] == pytest.approx(losses[-1], rel=1e-4)
    assert result["difference"]["loss"]["mean"] == pytest.approx(losses[-1] - losses[0], rel=1e-4)
    assert result["difference"]["loss"].keys() == {"mean", "low", "high", "verdict"}
    assert result["verdict"].startswith("adapter better by ")
    assert result["merged_to_adapter"]["loss"]["verdict"] == "no difference"
    assert {"loss", "perplexity", "bits_per_byte", "token_accuracy", "exact_match", "rouge_l"} <= result["base"].keys()
    assert result["sequences_per_second"].keys() == {"scored", "answered"}
    assert len(result["samples"]) == 8
    assert any("answers/s" in line for line in said)


def test_the_terminal_shows_verdict_gain_and_damage(alone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, out = told(capsys, str(alone), "--samples", "2", "--set", GENERATE)
    assert code == 0
    assert out.startswith("adapter better by ")
    assert "held-out rows: eval.jsonl, 8 sequences" in out
    assert "general text: 16 texts of 16 tokens that the base wrote by itself" in out
    assert out.count("reference | It is 1") == 2
    assert "sequences per second" in out


def test_one_model_is_gone_before_the_next_is_loaded(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[weakref.ref] = []
    load = models_module.load_base_model

    def watched(*rest: Any, **keys: Any) -> Any:
        assert all(model() is None for model in loaded)
        model = load(*rest, **keys)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(models_module, "load_base_model", watched)
    result, _ = evaluated(run, GENERATE)
    assert len(loaded) == 2
    assert set(result.held_out.figures) == {"base", "adapter", "merged"}


def test_a_zero_adapter_is_no_difference_in_anything(alone: Path, tmp_path: Path, capsys: Any) -> None:
    zero = plain_adapter(alone.parent / "base", tmp_path / "zero", size=0.0)
    code, _, out = told(
        capsys, str(zero), "--data", str(alone.parent / "eval.jsonl"), "--json", "--fail-if-worse", "--set", GENERATE
    )
    assert code == 0
    result = json.loads(out)
    assert result["verdict"].startswith("no difference")
    found = [*result["difference"].values(), *result["general"]["difference"].values()]
    assert len(found) == 10
    assert all((one["mean"], one["low"], one["high"], one["verdict"]) == (0, 0, 0, "no difference") for one in found)


def test_a_plain_adapter_on_a_file_has_the_figures_of_its_run(alone: Path, tmp_path: Path) -> None:
    rows = [{"question": row["prompt"], "answer": row["completion"]} for row in sums(8, first=100)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)  # columns that are guessed
    ours, _ = evaluated(alone, merged=None)
    plain, said = evaluated(alone / "adapter", data=data, base=str(alone.parent / "base"))
    for model in ("base", "adapter"):
        assert plain.held_out.figures[model] == pytest.approx(ours.held_out.figures[model])
    assert plain.held_out.difference == ours.held_out.difference
    assert any("carries no record of its training" in line for line in said)


def test_an_adapter_of_the_hub_is_fetched(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, tuple[str, ...]]] = []

    def snapshot(section: Any, *, files: tuple[str, ...]) -> Path:
        asked.append((section.model_name_or_path, files))
        return alone / "adapter"

    monkeypatch.setattr(subject_module, "hub_snapshot", snapshot)
    result, _ = evaluated("someone/adapter", data=alone.parent / "eval.jsonl", base=str(alone.parent / "base"))
    assert result.held_out.sequences == 8
    assert [name for name, _ in asked] == ["someone/adapter"]
    assert "adapter_model.safetensors" in asked[0][1]


def test_other_rows_of_a_run_are_read_as_its_own(alone: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "other.jsonl", sums(5, first=300))
    result, _ = evaluated(alone, data=data)
    assert (result.held_out.source, result.held_out.sequences) == ("other.jsonl", 5)


def test_worse_with_confidence_ends_with_5(alone: Path, tmp_path: Path, capsys: Any) -> None:
    assert told(capsys, str(alone), "--fail-if-worse")[0] == 0
    unlearned = shutil.copytree(alone / "adapter", tmp_path / "unlearned")
    tensors = load_file(unlearned / "adapter_model.safetensors")
    turned = {name: -tensor if "lora_B" in name else tensor for name, tensor in tensors.items()}
    save_file(turned, unlearned / "adapter_model.safetensors", {"format": "pt"})
    rows, base = str(alone.parent / "eval.jsonl"), str(alone.parent / "base")
    arguments = (str(unlearned), "--data", rows, "--base", base, "--quiet")
    code, said, out = told(capsys, *arguments, "--fail-if-worse")
    assert code == 5
    assert len(said) == 1
    assert "worse than the base with confidence: adapter: loss" in said[0]
    assert out.startswith("adapter worse by ")
    assert told(capsys, *arguments)[0] == 0


def test_held_out_rows_may_be_a_share_of_the_training_rows(alone: Path, tmp_path: Path) -> None:
    of_share = copied(alone, tmp_path / "share")
    recipe = (of_share / "recipe.yaml").read_text()
    (of_share / "recipe.yaml").write_text(
        recipe.replace("  eval:\n  - path: ../eval.jsonl\n", "  eval_fraction: 0.25\n")
    )
    result, said = evaluated(of_share)
    assert result.held_out.sequences == 6
    assert any("the data are not those of training" in line for line in said)  # the run was split otherwise


def test_answers_are_asked_for_as_they_were_trained(alone: Path) -> None:
    """The prompt ends where the answer begins, whatever was trained on."""
    for train_on in ("answers", "all"):
        result, _ = evaluated(alone, GENERATE, f"data.train_on={train_on}")
        sample = result.samples[0]
        assert sample["prompt"] == "<|im_start|>user\nWhat is 100 + 2?<|im_end|>\n<|im_start|>assistant\n"
        assert sample["reference"] == "It is 102."
        assert sample["where"] == "eval.jsonl:1"


def test_general_text_may_be_named(alone: Path, tmp_path: Path) -> None:
    (tmp_path / "general.txt").write_text("The sea is wide.\nThe hills are green.\n" + "long " * 40 + "\n")
    result, _ = evaluated(alone, f"eval.general=[{{path: {tmp_path / 'general.txt'}}}]")
    assert result.general is not None
    assert (result.general.source, result.general.sequences) == ("general.txt", 3)
    assert result.general.difference["loss"].verdict in ("worse", "better", "no difference")


@pytest.mark.parametrize("kind", ["labels", "texts"])
def test_labels_are_compared_as_a_classification(alone: Path, tmp_path: Path, kind: str) -> None:
    labels = ["even", "odd"] if kind == "labels" else [str(number) for number in range(12)]
    rows = [{"prompt": f"Is {i} even or odd?", "completion": labels[i % len(labels)]} for i in range(12)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    wanted = "eval.generate={max_new_tokens: 4, metrics: [classification]}"
    if kind == "texts":
        with pytest.raises(DataError, match="12 different answers in 12 rows are no labels"):
            evaluated(alone, wanted, data=data)
        return
    result = evaluated(alone, wanted, data=data)[0].as_dict()
    assert result["adapter"]["confusion"]["labels"] == ["even", "odd"]
    assert sum(map(sum, result["adapter"]["confusion"]["counts"])) == 12
    assert {"accuracy", "macro_f1"} <= result["difference"].keys()


def test_every_key_is_read(alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int | None] = []
    answers = evaluate_module.answers

    def answer_and_note(*rest: Any, **keys: Any) -> Any:
        batches.append(keys["batch_size"])
        return answers(*rest, **keys)

    monkeypatch.setattr(evaluate_module, "answers", answer_and_note)
    (tmp_path / "general.txt").write_text("The sea is wide.\n")

    def facts(*overrides: str) -> dict[str, Any]:
        try:
            result = evaluated(alone, GENERATE, *overrides)[0].as_dict()
        except Exception as error:
            return {"error": type(error).__name__}
        return {
            "result": {key: result[key] for key in ("base", "adapter", "general", "answered")},
            "batch": batches[-1],
        }

    flips = {
        "compare_base": "false",
        "generate": "null",
        "general": f"[{{path: {tmp_path / 'general.txt'}}}]",
        "tasks": "[no-such-task]",
        "generate.max_new_tokens": "1",
        "generate.metrics": "[chrf]",
        "generate.answer": "'^.'",
        "generate.answers_at_once": "3",
        "generate.limit": "4",
    }
    assert set(flips) == {*EvalSection.model_fields, *(f"generate.{key}" for key in GenerateSection.model_fields)}
    plain = facts()
    for key, value in flips.items():
        assert facts(f"eval.{key}={value}") != plain, key


def test_tasks_of_the_harness_are_run_on_each_model(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (pip install 'lorafit[eval]')")
    monkeypatch.chdir(tmp_path)
    docs = [{"q": f"What is {i} + 1?", "choices": [f"It is {i + 1}.", "zz"], "gold": 0} for i in range(4)]
    (tmp_path / "docs.json").write_text(json.dumps(docs))
    (tmp_path / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\ndataset_kwargs: {data_files: {test: docs.json}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: choices\ndoc_to_target: gold\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\nmetadata: {version: 1}\n"
    )
    result, _ = evaluated(run, tasks=["mine.yaml"])
    assert result.tasks["mine"].sequences == 4
    assert set(result.tasks["mine"].figures) == {"base", "adapter", "merged"}
    assert "acc" in result.tasks["mine"].difference
    with pytest.raises(RecipeError, match="'nowhere' cannot be used as a task"):
        evaluated(run, tasks=["nowhere"])


def test_nothing_that_steers_a_terminal_is_printed(alone: Path, tmp_path: Path, capsys: Any) -> None:
    evil = "\x1b]0;owned\x07\x1b[31mred\u202e"
    data = write_jsonl(
        tmp_path / "evil.jsonl", [{"prompt": f"{evil} {i}", "completion": f"{evil} {i % 2}"} for i in range(4)]
    )
    code, said, out = told(
        capsys, str(alone), "--data", str(data), "--samples", "4",
        "--set", "eval.generate={max_new_tokens: 4, metrics: [classification]}", "--set", "training.max_length=200",
    )  # fmt: skip
    assert code == 0
    assert r"\x1b[31mred\u202e" in out
    assert not {letter for text in (out, *said) for letter in text if letter != "\n" and not letter.isprintable()}


def test_a_copied_run_finds_its_merged_model(run: Path, tmp_path: Path) -> None:
    moved = copied(run, tmp_path / "moved")
    result, _ = evaluated(moved)
    assert result.merged_model == str(moved / "merged")
    shutil.rmtree(moved / "merged")
    assert evaluated(moved)[0].merged_model is None
