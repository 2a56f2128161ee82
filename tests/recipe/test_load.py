"""Layers of a recipe: extends, --set, paths, and the way back to YAML."""

import copy
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from lorafit.errors import RecipeError
from lorafit.recipe import load
from lorafit.recipe.recipe import CausalLmRecipe
from support.recipes import SMALLEST, loaded, problems, written

FULL = """\
output_dir: runs/full
model: {model_name_or_path: ./base, dtype: bfloat16, extra: {variant: "no"}}
quantization: {load_in_4bit: true}
lora: {r: 8, target_modules: [q_proj, v_proj], rank_pattern: {q_proj: 4}, layers_to_transform: [0, 2]}
data:
  train:
    - {path: "sub dir/a*.jsonl", weight: 2}
    - {hub: openai/gsm8k, name: main, columns: {prompt: question, completion: answer}}
  eval: [{path: ../eval.jsonl}]
  template: t.jinja
  template_kwargs: {date: "2e-4", flag: 12_3, note: "a: b # c", long: "0o17", empty: "", n: 1.0e-05}
training: {learning_rate: 2e-4, eval_strategy: steps, eval_steps: 0.25, report_to: [wandb], warmup_steps: 10}
checkpoints: {every: 30s}
launch: {strategy: mine.yaml}
silence: [alpha]
"""


@pytest.fixture
def full(tmp_path: Path) -> Path:
    home = tmp_path / "home"
    home.mkdir()
    (home / "t.jinja").touch()
    (home / "mine.yaml").touch()
    return written(home, FULL)


def test_a_smallest_recipe_loads(tmp_path: Path) -> None:
    recipe = loaded(tmp_path).recipe
    assert recipe.model.model_name_or_path == "gpt2"
    assert recipe.data.train[0].path == str(tmp_path / "rows.jsonl")
    assert (recipe.lora.r, recipe.training.learning_rate) == (16, 2e-4)


def test_a_loaded_recipe_cannot_be_changed(full: Path) -> None:
    recipe = load(full).recipe
    with pytest.raises(ValidationError):
        recipe.lora.r = 4  # type: ignore[misc]
    frozen: tuple[Any, ...] = (recipe.lora.rank_pattern, recipe.model.extra, recipe.data.train[1].columns)
    for mapping in frozen:
        with pytest.raises(TypeError):
            mapping["r"] = 4
    assert pickle.loads(pickle.dumps(recipe)) == recipe == copy.deepcopy(recipe)


def test_paths_start_at_the_recipe(full: Path) -> None:
    recipe, home = load(full).recipe, full.parent
    assert recipe.model.model_name_or_path == str(home / "base")
    assert [source.path for source in recipe.data.train] == [str(home / "sub dir/a*.jsonl"), None]
    assert recipe.data.eval[0].path == str(home.parent / "eval.jsonl")
    assert recipe.data.template == str(home / "t.jinja")
    assert recipe.launch.strategy == str(home / "mine.yaml")
    assert recipe.output_dir == "runs/full"


@pytest.mark.parametrize(
    ("name", "is_local"),
    [
        ("gpt2", False),
        ("Qwen/Qwen3-4B", False),
        ("./gpt2", True),
        ("gpt2/", True),
        ("a/b/c", True),
        ("../a", True),
        ("there", True),
        ("~/models/x", True),
    ],
)
def test_what_looks_like_a_path_never_reaches_the_hub(tmp_path: Path, name: str, is_local: bool) -> None:
    (tmp_path / "there").mkdir()
    base = loaded(tmp_path, SMALLEST.replace("gpt2", name)).recipe.model.model_name_or_path
    assert Path(base).is_absolute() == is_local
    assert is_local or base == name


def test_the_written_recipe_loads_back_equal_from_another_directory(full: Path) -> None:
    first = load(full)
    run = full.parent.parent / "elsewhere" / "run"
    run.mkdir(parents=True)
    text = first.yaml(relative_to=run)
    assert str(full.parent) not in text
    again = load(written(run, text, name="recipe.yaml"))
    assert again.recipe == first.recipe
    assert again.yaml(relative_to=run) == text


def test_a_child_is_laid_over_its_parents(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    written(
        tmp_path / "base", "lora: {r: 4, lora_alpha: 8, target_modules: [a, b]}\ntraining: {seed: 1}\n", name="b.yaml"
    )
    written(tmp_path / "base", f"extends: b.yaml\n{SMALLEST}", name="a.yaml")
    child = "extends: base/a.yaml\nlora: {r: 8, target_modules: [c]}\nquantization: {load_in_4bit: true}\n"
    result = loaded(tmp_path, child)
    assert result.recipe.lora.model_dump(include={"r", "lora_alpha", "target_modules"}) == {
        "r": 8,
        "lora_alpha": 8,
        "target_modules": ("c",),
    }
    assert result.recipe.training.seed == 1
    assert result.recipe.data.train[0].path == str(tmp_path / "base" / "rows.jsonl")
    places = {
        key: str(result.problem(key, "?")) for key in ("lora.r", "lora.lora_alpha", "data.train.0.path", "launch")
    }
    assert places == {
        "lora.r": f"{tmp_path}/x.yaml:2: lora.r: ?",
        "lora.lora_alpha": f"{tmp_path}/base/b.yaml:1: lora.lora_alpha: ?",
        "data.train.0.path": f"{tmp_path}/base/a.yaml:3: data.train.0.path: ?",
        "launch": f"{tmp_path}/x.yaml: launch: ?",
    }


def test_a_child_can_switch_a_section_off(tmp_path: Path) -> None:
    written(tmp_path, f"{SMALLEST}quantization: {{load_in_4bit: true}}\n", name="parent.yaml")
    assert loaded(tmp_path, "extends: parent.yaml\nquantization: null\n").recipe.quantization is None


@pytest.mark.parametrize(
    ("extends", "message"),
    [
        ("x.yaml", "x.yaml:1: extends: x.yaml extends this recipe in turn; break the circle"),
        ("y.yaml", "y.yaml:1: extends: x.yaml extends this recipe in turn; break the circle"),
        ("z.yaml", "x.yaml:1: extends: z.yaml: no such file (paths are relative to the recipe that names them)"),
        ("[a, b]", "x.yaml:1: extends: takes the path of one recipe"),
        ("bad.yaml", "bad.yaml:2:1: the key a again (first on line 1); keep one"),
    ],
)
def test_extends_that_leads_nowhere_is_refused(tmp_path: Path, extends: str, message: str) -> None:
    written(tmp_path, "extends: x.yaml\n", name="y.yaml")
    written(tmp_path, "a: 1\na: 2\n", name="bad.yaml")
    assert problems(tmp_path, f"extends: {extends}\n{SMALLEST}") == [message]


def test_problems_of_a_parent_are_named_in_the_parent(tmp_path: Path) -> None:
    written(tmp_path, "lora:\n  r: 0\n  rr: 1\n", name="parent.yaml")
    assert [line.split(": ")[0] for line in problems(tmp_path, f"extends: parent.yaml\n{SMALLEST}training: 1\n")] == [
        "x.yaml:4",
        "parent.yaml:2",
        "parent.yaml:3",
    ]


def test_set_changes_one_key_with_the_same_strictness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    overrides = (
        "lora.r=8",
        "training.learning_rate=1e-4",
        "data.train.0.path=y.jsonl",
        "lora.rank_pattern={q_proj: 2}",
    )
    result = loaded(tmp_path, overrides=(*overrides, "quantization.load_in_4bit=true", "lora.lora_alpha="))
    assert (result.recipe.lora.r, result.recipe.training.learning_rate) == (8, 1e-4)
    assert result.recipe.data.train[0].path == os.fspath(here / "y.jsonl")
    assert result.recipe.lora.rank_pattern == {"q_proj": 2}
    assert result.recipe.quantization is not None and result.recipe.quantization.load_in_4bit
    assert str(result.problem("lora.r", "?")) == "--set: lora.r: ?"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.r", "--set lora.r: is not `section.key=value`"),
        ("lora.r=true", "--set: lora.r: true is not a whole number of at least 1"),
        ("lora.rr=1", "--set: lora.rr: not a key of lora; did you mean r?"),
        ("lora.r.x=1", "--set lora.r.x: lora.r holds a value; there is no key x beneath it"),
        ("data.train.1.path=a", "--set data.train.1.path: data.train is a list with entries 0 to 0, no 1"),
        ("data.train.a.path=a", "--set data.train.a.path: data.train is a list with entries 0 to 0, no a"),
        ("lora.r=[1", "--set lora.r: a bracket that is not closed, or a comma is missing in it"),
        ("lora.r=*x", "--set lora.r: the alias *x; write the value out (or share it through `extends`)"),
        ("training.learning_rate=.nan", "--set training.learning_rate: .nan is not a finite number"),
        ("extends=x.yaml", "--set extends: belongs in the recipe file"),
        ("=1", "--set : is not `section.key=value`"),
    ],
)
def test_set_is_refused_like_the_file(tmp_path: Path, override: str, message: str) -> None:
    (line,) = problems(tmp_path, f"{SMALLEST}lora: {{r: 4}}\n", overrides=(override,))
    assert line.startswith(message)


def test_all_bad_overrides_are_named_at_once(tmp_path: Path) -> None:
    assert len(problems(tmp_path, SMALLEST, overrides=("a", "lora.r=[", "data.train.9.path=x"))) == 3


TOKEN = "hf_" + "aBcDeFgHiJkLmNoPqRsT"


@pytest.mark.parametrize(
    "text",
    [
        f"{SMALLEST}training: {{hub_token: anything}}\n",
        f"{SMALLEST}training: {{extra: {{hub_token: {TOKEN}}}}}\n",
        f"{SMALLEST}model_token: {TOKEN}\n",
        SMALLEST.replace("gpt2", f"https://user:{TOKEN}@huggingface.co/x"),
        f"{SMALLEST}lora: {{r: {TOKEN}}}\n",
        f"{SMALLEST}lora: {{target_modules: [q_proj, {TOKEN}]}}\n",
        f"{SMALLEST}{TOKEN}: 1\n",
        f"{SMALLEST}wandb_api_key: anything\n",
        f"{SMALLEST}data2: {{password: anything}}\n",
    ],
)
def test_secrets_are_refused_and_never_repeated(tmp_path: Path, text: str) -> None:
    lines = problems(tmp_path, text)
    assert any("looks like a token or password" in line for line in lines)
    assert TOKEN not in "\n".join(lines) and "anything" not in "\n".join(lines)


def test_a_secret_on_the_command_line_is_not_repeated(tmp_path: Path) -> None:
    for override in (f"model.token={TOKEN}", f"lora.r={TOKEN}", f"training.extra={{hub_token: {TOKEN}}}"):
        lines = problems(tmp_path, SMALLEST, overrides=(override,))
        assert lines and TOKEN not in "\n".join(lines)


def test_words_that_only_sound_like_secrets_are_fine(tmp_path: Path) -> None:
    text = SMALLEST.replace("rows.jsonl}", "rows.jsonl, format: text, columns: {text: token}}")
    assert problems(tmp_path, text + "lora: {trainable_token_indices: [1, 2]}\n") == []


def test_the_run_directory_is_named_for_the_recipe(tmp_path: Path) -> None:
    assert loaded(tmp_path).output_dir() == Path("runs/x")
    assert loaded(tmp_path, f"output_dir: out\n{SMALLEST}").output_dir() == Path("out")


def test_the_home_directory_is_found_in_an_output_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert loaded(tmp_path, f"output_dir: ~/runs/x\n{SMALLEST}").output_dir() == Path("/home/somebody/runs/x")
    assert loaded(tmp_path, overrides=["output_dir=~/x"]).output_dir() == Path("/home/somebody/x")
    assert "output_dir: /home/somebody/x" in loaded(tmp_path, overrides=["output_dir=~/x"]).yaml(relative_to=tmp_path)


def test_a_path_that_shares_only_the_root_stays_absolute_when_written(tmp_path: Path) -> None:
    text = "model: {model_name_or_path: /models/base}\ndata: {train: [{path: rows.jsonl}]}\n"
    written_again = loaded(tmp_path, text).yaml(relative_to=tmp_path / "run")
    assert "model_name_or_path: /models/base" in written_again and "path: ../rows.jsonl" in written_again


def test_every_key_of_the_schema_has_a_docstring() -> None:
    from lorafit.recipe.schema import field_docstrings
    from lorafit.recipe.schema_walk import places, section_at, section_in

    values = [
        (place, str(place[-1]))
        for place in places()
        if section_in(section_at(place[:-1]).model_fields[str(place[-1])].annotation) is None
    ]
    assert len(values) > 80
    bare = [place for place, key in values if len(field_docstrings(section_at(place[:-1])).get(key, "")) < 10]
    assert bare == []


def test_a_recipe_made_in_python_is_as_strict() -> None:
    with pytest.raises(ValidationError):
        CausalLmRecipe.model_validate(
            {"model": {"model_name_or_path": "gpt2"}, "data": {"train": [{"path": "a", "weight": "1"}]}}
        )
    with pytest.raises(RecipeError):
        load(Path("/dev/null"))
