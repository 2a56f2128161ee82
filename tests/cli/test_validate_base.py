"""`lorafit validate` reads a base that lies on this machine: it refuses what `train` refuses, in the same words."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config

from lorafit.cli import _exit_code
from lorafit.errors import LorafitError
from lorafit.recipe import load
from lorafit.report.validation import validation_text
from lorafit.training.inputs import read_inputs
from lorafit.validation import Validation, validate
from support.recipes import written
from support.tiny import build_base, sums, write_jsonl

RECIPE = "model: {model_name_or_path: ./base}\ndata: {train: [{path: rows.jsonl}]}\n"
SHORT = "training: {max_length: 512}\n"
ASKED = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."}]


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    """A copy of the tiny base, to break."""
    write_jsonl(tmp_path / "rows.jsonl", sums(24))
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


def refused(directory: Path, text: str = RECIPE + SHORT) -> tuple[int, list[str]]:
    """Exit code and lines of `validate`; `train` ends with the same ones before it reads a row."""
    path = written(directory, text)
    said = []
    for command in (validate, lambda path: read_inputs(load(path), cache_dir=None)):
        with pytest.raises(LorafitError) as caught:
            command(path)
        lines = [str(problem).replace(f"{directory}/", "") for problem in caught.value.problems]
        said.append((caught.value.exit_code, lines))
    assert said[0] == said[1]
    return said[0]


def right(directory: Path, text: str = RECIPE + SHORT) -> Validation:
    return validate(written(directory, text))


def change(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; `...` removes one."""
    facts = json.loads(path.read_text("utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in facts.items() if value is not ...}), "utf-8")


def without_end(path: Path) -> None:
    change(path, eos_token_id=None)


def emptied(base: Path) -> None:
    shutil.rmtree(base)
    base.mkdir()


def adapter(base: Path) -> None:
    emptied(base)
    (base / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (
        shutil.rmtree,
        "x.yaml:1: model.model_name_or_path: base: there is no such directory: correct the path",
    ),
    "empty": (emptied, "x.yaml:1: model.model_name_or_path: base: is empty or missing: copy the model there, or name"),
    "an adapter": (adapter, "x.yaml:1: model.model_name_or_path: base: is an adapter, not a base model: set"),
    "no config": (
        lambda base: (base / "config.json").unlink(),
        "x.yaml:1: model.model_name_or_path: base: has no config",
    ),
    "broken config": (lambda base: (base / "config.json").write_text("{"), "base/config.json: is not JSON ("),
    "pointer": (
        lambda base: (base / "config.json").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "base/config.json: is a git-lfs pointer: run `git lfs pull` in that directory",
    ),
    "pointer to weights": (
        lambda base: (base / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "base/model.safetensors: is a git-lfs pointer, not weights: run `git lfs pull` in that directory",
    ),
    "no weights": (
        lambda base: (base / "model.safetensors").unlink(),
        "x.yaml:1: model.model_name_or_path: base: has no weights: model.safetensors,",
    ),
    "unknown architecture": (
        lambda base: change(base / "config.json", model_type="lama"),
        "base/config.json: transformers ",
    ),
    "another task": (
        lambda base: change(base / "config.json", architectures=["LlamaForSequenceClassification"]),
        "base/config.json: is a LlamaForSequenceClassification, not a model that predicts the next token: name a",
    ),
    "no tokenizer": (
        lambda base: list(map(Path.unlink, base.glob("*token*"))),
        "x.yaml:1: model.model_name_or_path: base: has no tokenizer: copy its files there",
    ),
    "no end of text": (
        lambda base: change(base / "tokenizer_config.json", eos_token=...),
        "x.yaml:1: model.model_name_or_path: base: the tokenizer has no end-of-text token: write",
    ),
    "nothing to stop on": (
        lambda base: list(map(without_end, (base / "config.json", base / "generation_config.json"))),
        "x.yaml:1: model.model_name_or_path: base: names no token that generation stops on: write eos_token_id in",
    ),
    "a stop outside": (
        lambda base: change(base / "generation_config.json", eos_token_id=264),
        "base/config.json: eos_token_id 264 has no row in the embedding of 264: correct it there and in generation_",
    ),
    "no chat template": (
        lambda base: (base / "chat_template.jinja").unlink(),
        "x.yaml:2: data.template: chat: the tokenizer has no chat template; set data.template: alpaca, plain or",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_base_that_cannot_be_trained_is_refused_as_by_train(name: str, base: Path, tmp_path: Path) -> None:
    break_it, said = BROKEN[name]
    break_it(base)
    code, lines = refused(tmp_path)
    assert (code, len(lines)) == (4, 1), lines
    assert lines[0].startswith(said)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_base_that_may_not_be_read_is_named_with_the_reason(base: Path, tmp_path: Path) -> None:
    (base / "config.json").chmod(0)
    assert refused(tmp_path)[1] == ["base/config.json: cannot be read (Permission denied): give your user the right to"]


MISFITS = {
    "lora: {target_modules: [q_proj, qq_proj]}": "x.yaml:4: lora.target_modules: 'qq_proj' matches nothing in this",
    "lora: {exclude_modules: [mpl]}": "x.yaml:4: lora.exclude_modules: 'mpl' matches nothing in this model",
    "lora: {modules_to_save: [lm_haed]}": "x.yaml:4: lora.modules_to_save: 'lm_haed' matches nothing in this model",
    "lora: {rank_pattern: {x: 4}}": "x.yaml:4: lora.rank_pattern: 'x' matches no module with an adapter",
    "lora: {r: 65}": "x.yaml:4: lora.r: 65 is more than the shorter side of",
}


@pytest.mark.parametrize("lora", MISFITS)
def test_a_section_that_does_not_fit_is_refused_as_by_train(lora: str, base: Path, tmp_path: Path) -> None:
    code, lines = refused(tmp_path, f"{RECIPE}{SHORT}{lora}\n")
    assert (code, len(lines)) == (4, 1)
    assert lines[0].startswith(MISFITS[lora])


def test_rows_of_more_tokens_than_a_table_of_positions_has_are_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", sums(24))
    ids: dict[str, Any] = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    build_base(
        tmp_path / "base", config=GPT2Config(vocab_size=264, n_embd=64, n_layer=1, n_head=4, n_positions=256, **ids)
    )
    mend = "is more than the 256 positions of the base, beyond which it fails; write 256"
    code, lines = refused(tmp_path, RECIPE)
    assert (code, lines) == (2, [f"x.yaml: training.max_length: 2,048, the default, {mend}"])
    assert refused(tmp_path, f"{RECIPE}training: {{max_length: 257}}\n")[1] == [
        f"x.yaml:3: training.max_length: 257 {mend}"
    ]
    assert right(tmp_path, f"{RECIPE}training: {{max_length: 256}}\n").not_checked == ()


def test_rows_longer_than_what_rotary_positions_have_seen_are_advised_against(base: Path, tmp_path: Path) -> None:
    (advice,) = [one for one in right(tmp_path, RECIPE).advice if one.name == "positions"]
    assert str(advice) == (
        "training.max_length: 2,048, the default, is more than the 512 positions that the base was trained on, and "
        "rows beyond them are hard to learn; write 512 (silence: [positions])"
    )
    for quiet in (SHORT, "silence: [positions]\n"):
        assert "positions" not in [one.name for one in right(tmp_path, RECIPE + quiet).advice]


def test_a_variable_that_the_template_does_not_read_is_refused_as_by_train(base: Path, tmp_path: Path) -> None:
    data = "data: {train: [{path: rows.jsonl}], template_kwargs: {messagess: 1}}\n"
    code, (line,) = refused(tmp_path, RECIPE.splitlines()[0] + "\n" + data + SHORT)
    assert code == 2
    assert line.startswith("x.yaml:2: data.template_kwargs.messagess: the chat template never reads it")


def test_running_text_needs_no_chat_template(base: Path, tmp_path: Path) -> None:
    (base / "chat_template.jinja").unlink()
    write_jsonl(tmp_path / "rows.jsonl", [{"text": f"text {number}"} for number in range(40)])
    assert right(tmp_path).not_checked == ()


def test_rows_that_are_surely_too_long_are_refused_with_their_lines(base: Path, tmp_path: Path) -> None:
    rows = sums(24)
    rows[3]["completion"] = "x" * 600
    rows[7]["prompt"] = "y" * 700
    write_jsonl(tmp_path / "rows.jsonl", rows)
    path = written(tmp_path, RECIPE + SHORT)
    with pytest.raises(LorafitError) as caught:
        validate(path)
    assert caught.value.exit_code == 3
    assert [str(problem).replace(f"{tmp_path}/", "") for problem in caught.value.problems] == [
        "rows.jsonl:4: at least 612 tokens, the template's left out; training.max_length is 512",
        "rows.jsonl:8: at least 706 tokens, the template's left out; training.max_length is 512",
        "x.yaml:3: training.max_length: the longest row has at least 706 tokens; raise it above that, or set "
        "data.over_length: drop or truncate",
    ]
    with pytest.raises(LorafitError, match=r"rows.jsonl:4: 6\d\d tokens, training.max_length is 512"):
        read_inputs(load(path), cache_dir=None)
    dropped = RECIPE.replace("]}", "], over_length: drop, max_lost_rows: 1}")
    assert right(tmp_path, dropped + SHORT).data.train_rows == 24


def test_what_a_template_may_leave_out_counts_for_nothing(base: Path, tmp_path: Path) -> None:
    """Thoughts of earlier answers, system texts and the turns after the last answer."""
    long = "z" * 600
    turns = [
        {"role": "system", "content": long},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": f"<think>{long}</think>b"},
        {"role": "user", "content": long},
    ]
    write_jsonl(
        tmp_path / "rows.jsonl", [{"messages": [*turns, {"role": "user", "content": str(n)}]} for n in range(40)]
    )
    said, _ = right(tmp_path).not_checked
    assert said == f"the exact length of 40 long rows in tokens: see `lorafit preview {tmp_path}/x.yaml`"


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "system", "content": "s"}, *ASKED]},
        {"messages": [ASKED[0], ASKED[1] | {"reasoning_content": "t"}]},
        {"messages": ASKED, "tools": [{"type": "function", "function": {"name": "weather"}}]},
        {"prompt": "a", "completion": "b", "system": "s"},
    ],
)
def test_rows_that_only_the_template_can_tell_of_are_named(base: Path, tmp_path: Path, row: dict[str, Any]) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [row | {"id": number} for number in range(40)])
    (said,) = right(tmp_path).not_checked
    taken = "whether the template takes the system texts, tools and thoughts of 40 rows"
    assert said == f"{taken}: see `lorafit preview {tmp_path}/x.yaml`"


def test_what_was_not_checked_stands_in_the_last_line(base: Path, tmp_path: Path) -> None:
    result = right(tmp_path)
    assert validation_text(result).splitlines()[0] == f"{tmp_path}/x.yaml: nothing wrong"
    assert not any("not checked" in line for line in validation_text(result).splitlines())
    elsewhere = right(tmp_path, RECIPE.replace("./base", "org/nowhere") + SHORT)
    first, *_, last = validation_text(elsewhere).splitlines()
    assert first == f"{tmp_path}/x.yaml: right, as far as it was checked"
    assert last == (
        "not checked: the base, org/nowhere is not in the cache of this machine: names of modules, ranks, positions, "
        "tokenizer"
    )
    assert elsewhere.as_dict()["not_checked"] == list(elsewhere.not_checked)
    hub = RECIPE.replace("path: rows.jsonl", "hub: org/rows")
    assert right(tmp_path, hub + SHORT).not_checked == ("the rows of org/rows, which are read when training starts",)
    change(base / "config.json", model_type="qwen3_moe", architectures=["Qwen3MoeForCausalLM"])
    assert right(tmp_path).not_checked == (
        f"names of modules and ranks, the files of a qwen3_moe do not tell them: see `lorafit targets {base}`",
    )


@pytest.mark.parametrize("revision", ["main", "c" * 40])
def test_a_base_in_the_cache_is_looked_at_without_a_network(base: Path, tmp_path: Path, revision: str) -> None:
    model = tmp_path / "hub/models--org--base"
    (model / "refs").mkdir(parents=True)
    (model / "refs/main").write_text("c" * 40)
    snapshot = Path(shutil.move(base, model / "snapshots" / ("c" * 40)))
    text = f"model: {{model_name_or_path: org/base, revision: {revision}, extra: {{cache_dir: {tmp_path}/hub}}}}\n"
    text += RECIPE.splitlines()[1] + "\n" + SHORT
    assert right(tmp_path, text).not_checked == ()
    code, (line,) = refused(tmp_path, f"{text}lora: {{r: 65}}\n")
    assert code == 4 and line.startswith("x.yaml:4: lora.r: 65 is more than")
    (snapshot / "model.safetensors").unlink()
    assert right(tmp_path, f"{text}lora: {{r: 65}}\n").not_checked == (
        "the weights of org/base, they are not in the cache: names of modules, ranks",
    )
    (snapshot / "config.json").unlink()
    assert "org/base is not in the cache" in right(tmp_path, text).not_checked[0]


def test_all_that_is_wrong_with_recipe_base_and_rows_comes_at_once(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (base / "model.safetensors").unlink()
    (tmp_path / "rows.jsonl").write_text("{\n")
    path = written(tmp_path, f"{RECIPE}{SHORT}lora: {{rr: 1}}\n")
    assert _exit_code(["validate", str(path)]) == 2
    lines = capsys.readouterr().err.replace(f"{tmp_path}/", "").splitlines()
    assert [line.split(": ")[1] for line in lines] == ["x.yaml:4", "x.yaml:1", "rows.jsonl:1"]


def test_a_template_that_is_no_jinja_is_named_with_its_line(base: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.jinja").write_text(
        "{% for message in messages %}\n{{ message. }}\n{% endfor %}", encoding="utf-8"
    )
    with pytest.raises(LorafitError) as caught:
        right(tmp_path, RECIPE.replace("]}", "], template: ./broken.jinja}") + SHORT)
    assert caught.value.exit_code == 3
    assert str(caught.value).replace(f"{tmp_path}/", "").startswith("broken.jinja:2: ")


def test_a_key_that_is_wrong_in_itself_is_not_held_against_the_base_as_well(base: Path, tmp_path: Path) -> None:
    with pytest.raises(LorafitError, match=r"write a list, \[q_proj, v_proj\]$"):
        right(tmp_path, f'{RECIPE}{SHORT}lora: {{target_modules: "q_proj, v_proj"}}\n')
