"""`lorafit init` and `lorafit schema`."""

import json
import os
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import get_args

import jsonschema
import pytest
import yaml

from lorafit.base_at_hand import positions_at_hand
from lorafit.cli import _exit_code
from lorafit.errors import RecipeError
from lorafit.recipe import load
from lorafit.recipe.schema import recipe_schema
from lorafit.recipe.starter import Goal, Preset, starter_recipe, write_recipe
from lorafit.recipe.yaml_reader import read_file
from lorafit.validation import validate
from support import ROOT
from support.recipes import SMALLEST, loaded, written

BASE, ROWS = ROOT / "recipes/quickstart/base", ROOT / "recipes/quickstart/eval.jsonl"


@pytest.mark.parametrize(("preset", "goal"), list(product(get_args(Preset), get_args(Goal))))
def test_a_starting_recipe_validates_and_says_what_was_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: Preset, goal: Goal
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    output = Path("recipes/mine.yaml")
    model, data = os.path.relpath(BASE), os.path.relpath(ROWS)
    text = starter_recipe(
        model=model,
        data=data,
        mapping={},
        positions=positions_at_hand(model),
        preset=preset,
        goal=goal,
        output=output,
    )
    write_recipe(text, output)
    result = validate(output)
    recipe = result.loaded.recipe
    assert (recipe.model.model_name_or_path, recipe.data.train[0].path) == (str(BASE), str(ROWS))
    assert (recipe.quantization is not None, recipe.lora.use_dora) == (preset == "qlora", preset == "dora")
    assert result.advice == ()
    assert str(tmp_path) not in output.read_text(encoding="utf-8")


def test_goals_differ_in_rank_and_modules(tmp_path: Path) -> None:
    ranks = {}
    for goal in get_args(Goal):
        text = starter_recipe(model="gpt2", data="a/b", mapping={}, preset="lora", goal=goal, output=Path("x.yaml"))
        recipe = loaded(tmp_path, text).recipe
        ranks[goal] = (recipe.lora.r, recipe.lora.exclude_modules)
        assert recipe.data.train[0].hub == "a/b"
        assert recipe.data.template == "chat"
    assert ranks == {"style": (8, r".*\.mlp\..*"), "knowledge": (64, None), "code": (32, None)}


def test_a_base_without_chat_template_starts_plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    text = starter_recipe(
        model="base", data="rows.jsonl", mapping={}, preset="lora", goal="code", output=Path("x.yaml")
    )
    assert loaded(tmp_path, text).recipe.data.template == "plain"
    (tmp_path / "base" / "chat_template.json").write_text('{"chat_template": "a"}', encoding="utf-8")
    text = starter_recipe(
        model="base", data="rows.jsonl", mapping={}, preset="lora", goal="code", output=Path("y.yaml")
    )
    assert loaded(tmp_path, text).recipe.data.template == "chat"


@pytest.mark.parametrize(
    ("data", "written"),
    [
        ("/data/rows.jsonl", "/data/rows.jsonl"),
        ("~/rows.jsonl", "~/rows.jsonl"),
        ("https://example.org/rows.jsonl", "https://example.org/rows.jsonl"),
        ("rows.jsonl", "../rows.jsonl"),
        ("../shared/*.jsonl", "../../shared/*.jsonl"),
        ("recipes/rows.jsonl", "rows.jsonl"),
    ],
)
def test_paths_stay_as_they_were_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str, written: str
) -> None:
    (tmp_path / "recipes").mkdir()
    monkeypatch.chdir(tmp_path)
    for model in ("/models/base", "~/base"):
        text = starter_recipe(
            model=model, data=data, mapping={}, preset="lora", goal="style", output=Path("recipes/x.yaml")
        )
        recipe = yaml.safe_load(text)
        assert (recipe["model"]["model_name_or_path"], recipe["data"]["train"][0]["path"]) == (model, written)


@pytest.mark.parametrize(
    ("answers", "pattern"),
    [
        (["2+2\n#### 4", "9*9\n#### 81", "so\n#### 42", "x\n#### 43"], r"####\s*(\S+)"),
        (["a\nAnswer: the sea", "b\nAnswer: rain", "c\nAnswer: a tree"], r"Answer:\s*(.+)"),
        ([r"so \boxed{4}.", r"$\boxed{5}$", r"thus \boxed{6}"], r"\\boxed\{([^{}]*)\}"),
        (["a\n#### 1", "b\n#### 2", "c\nno result"], None),
        (["a\n#### 1", "b\n#### 2"], None),
        (["It is 12.", "It is 13.", "It is 4."], None),
        (["a\nend", "b\nend", "c\nend"], None),
        ([], None),
    ],
)
def test_answers_with_a_marked_result_are_recognised(answers: list[str], pattern: str | None) -> None:
    from lorafit.data.answer_pattern import answer_pattern
    from lorafit.evaluation.scores import found

    assert answer_pattern(answers) == pattern
    if pattern is not None:
        results = [found(pattern, answer) for answer in answers]
        assert all(results) and len(set(results)) == len(answers)


@pytest.mark.parametrize(
    "row",
    [
        lambda answer: {"question": "q", "answer": answer},
        lambda answer: {"instruction": "i", "input": "", "output": answer},
        lambda answer: {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]},
    ],
)
def test_a_starting_recipe_offers_the_pattern_of_the_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: Callable[[str], dict[str, object]]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [row(f"{i} it's\n#### {i}") for i in range(5)]
    Path("rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    assert _exit_code(["init", "--data", "rows.jsonl"]) == 0
    text = Path("recipe.yaml").read_text(encoding="utf-8")
    offered = text[text.index("# eval:") :].replace("# ", "", 1).replace("\n# ", "\n")
    with_it = written(tmp_path, text[: text.index("# eval:")] + offered, name="with.yaml")
    generate = load(with_it).recipe.eval.generate
    assert generate is not None and (generate.answer, generate.metrics) == (r"####\s*(\S+)", ("exact_match",))
    assert load(Path("recipe.yaml")).recipe.eval.generate is None


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    path = written(tmp_path, "mine")
    with pytest.raises(RecipeError, match="never overwritten"):
        write_recipe(SMALLEST, path)
    assert path.read_text(encoding="utf-8") == "mine"
    for nowhere in (tmp_path / "nowhere" / "x.yaml", path / "x.yaml"):
        with pytest.raises(RecipeError, match="cannot be written"):
            write_recipe(SMALLEST, nowhere)


def test_the_schema_in_the_repository_is_current() -> None:
    stored = (ROOT / "lorafit.schema.json").read_text(encoding="utf-8")
    assert json.loads(stored) == recipe_schema(), "run `lorafit schema --output lorafit.schema.json`"


def test_the_schema_explains_every_key() -> None:
    schema = recipe_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    objects = [schema, *schema["$defs"].values()]
    assert len(objects) > 10
    for described in objects:
        assert described["additionalProperties"] is False
        for name, value in described["properties"].items():
            assert "description" in value or "$ref" in json.dumps(value), name


def test_the_schema_takes_every_shipped_recipe() -> None:
    validator = jsonschema.Draft202012Validator(recipe_schema())
    shipped = sorted((ROOT / "recipes").rglob("*.yaml"))
    assert shipped
    for path in shipped:
        validator.validate(read_file(path).value)
        assert load(path)


@pytest.mark.parametrize("line", ["lora: {rr: 1}", "lora: {r: 0}", 'lora: {r: "1"}', "training: {packing: 1}", "x: 1"])
def test_the_schema_refuses_what_loading_refuses(tmp_path: Path, line: str) -> None:
    text = f"{SMALLEST}{line}\n"
    with pytest.raises(RecipeError):
        loaded(tmp_path, text)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(yaml.safe_load(text), recipe_schema())


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (("question", "answer"), {"prompt": "question", "completion": "answer"}),
        (("problem", "solution", "id"), {"prompt": "problem", "completion": "solution"}),
        (("prompt", "completion"), None),
        (("left", "right"), None),
    ],
)
def test_familiar_columns_are_mapped_and_no_others(
    columns: tuple[str, ...], expected: dict[str, str] | None, tmp_path: Path
) -> None:
    from lorafit.data.guess_columns import familiar_mapping

    (tmp_path / "rows.jsonl").write_text(json.dumps(dict.fromkeys(columns, "text")) + "\n", encoding="utf-8")
    assert familiar_mapping(str(tmp_path / "rows.jsonl")).get("columns") == expected
    assert familiar_mapping(str(tmp_path / "missing.jsonl")) == {}


@pytest.mark.parametrize(
    ("goal", "positions", "written"), [("code", 512, 512), ("code", 8192, 4096), ("style", None, 2048)]
)
def test_the_length_of_rows_stays_within_the_positions_of_a_base_at_hand(
    tmp_path: Path, goal: str, positions: int | None, written: int
) -> None:
    (tmp_path / "base").mkdir()
    config = {"model_type": "llama"} | ({"max_position_embeddings": positions} if positions else {})
    (tmp_path / "base/config.json").write_text(json.dumps(config), encoding="utf-8")
    output = tmp_path / "x.yaml"
    assert _exit_code(["init", "--model", str(tmp_path / "base"), "--goal", goal, "--output", str(output)]) == 0
    assert yaml.safe_load(output.read_text(encoding="utf-8"))["training"]["max_length"] == written


@pytest.mark.parametrize(
    ("files", "train", "held_out"),
    [
        (("train.jsonl", "test.jsonl"), "d/train.jsonl", "d/test.jsonl"),
        (("train.jsonl", "test.jsonl", "validation.jsonl"), "d/train.jsonl", "d/validation.jsonl"),
        (("train-0.jsonl", "train-1.jsonl", "dev.jsonl"), "d/train-*.jsonl", "d/dev.jsonl"),
    ],
)
def test_a_directory_with_splits_starts_with_each_on_its_side(
    files: tuple[str, ...], train: str, held_out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d").mkdir()
    for number, name in enumerate(files):
        rows = [{"prompt": f"{number} {row}?", "completion": "yes"} for row in range(40)]
        (tmp_path / "d" / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert _exit_code(["init", "--model", str(BASE), "--data", "d", "-o", "r.yaml"]) == 0
    data = load(tmp_path / "r.yaml").recipe.data
    assert [Path(str(source.path)).relative_to(tmp_path).as_posix() for source in (*data.train, *data.eval)] == [
        train,
        held_out,
    ]
    assert data.eval_fraction is None
    assert validate(Path("r.yaml")).data.eval_rows == 40


def test_a_directory_whose_files_name_no_split_starts_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d").mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / "d" / name).write_text('{"prompt": "1?", "completion": "yes"}\n', encoding="utf-8")
    assert _exit_code(["init", "--model", str(BASE), "--data", "d", "-o", "r.yaml"]) == 0
    data = load(tmp_path / "r.yaml").recipe.data
    assert (data.train[0].path, data.eval_fraction) == (str(tmp_path / "d"), 0.05)
