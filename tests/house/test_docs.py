"""The pages that explain lorafit: their commands, recipes, links and messages are those of the code."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import check_docs
import pytest
import recipe_reference

from lorafit import errors
from lorafit.data.findings import KINDS
from lorafit.recipe import load
from lorafit.recipe.advice import ADVICE_NAMES
from lorafit.recipe.recipe import Recipe
from lorafit.recipe.schema_walk import places
from lorafit.recipe.sections import HealthSection
from support import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
START = (ROOT / "docs/start.md").read_text(encoding="utf-8")
TROUBLE = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")

NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")


def written(directory: Path, text: str) -> Path:
    page = directory / "page.md"
    page.write_text(text, encoding="utf-8")
    return page


def test_the_reference_is_made_from_the_sections() -> None:
    shown = recipe_reference.PAGE.read_text(encoding="utf-8")
    assert shown == recipe_reference.page(), "write it anew: python scripts/recipe_reference.py"


def test_the_reference_has_every_key() -> None:
    """Those of sections as headings of two marks, all others of three."""
    lines = recipe_reference.PAGE.read_text(encoding="utf-8").splitlines()
    headings = {line.lstrip("#").strip().replace("[]", "") for line in lines if line.startswith("##")}
    keys = {".".join(map(str, place)) for place in places()}
    assert len(keys) > 120 and {*Recipe.model_fields} < keys
    assert keys - headings == set()


def test_commands_options_recipes_and_links_of_all_pages_exist() -> None:
    pages = check_docs.pages()
    assert len(pages) >= 11 and {page.name for page in pages} >= {"README.md", "CONTRIBUTING.md", "recipe.md"}
    assert sum(len([*check_docs.typed(page)]) for page in pages) > 30
    assert sum(len([*check_docs.shown(page)]) for page in pages) > 60
    assert check_docs.problems() == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("```sh\nlorafit trian recipes/quickstart.yaml\n```\n", "there is no command trian"),
        ("```sh\nlorafit train recipes/quickstart.yaml --resmue\n```\n", "No such option: --resmue"),
        ("```sh\nlorafit combine runs/a\n```\n", "Missing option '--out'"),
        ("```sh\nlorafit merge runs/a --dtype float8\n```\n", "'float8' is not one of"),
        ("```sh\nlorafit train recipes/gone.yaml\n```\n", "there is no recipes/gone.yaml"),
        ("```sh\npip install -e '.[gone]' && lorafit doctor\n```\n", "there is no extra gone"),
        ("```sh\npytest -m quick\n```\n", "there is no marker quick"),
        ("```sh\npython benchmarks/merge.py --weight 1GB\n```\n", "benchmarks/merge.py has no --weight"),
        ("```sh\ncurl x\n```\n", "curl is no program that this script knows"),
        ("Type `lorafit eval RUN --baes x`.\n", "eval has no --baes"),
        ("Type `python scripts/gone.py`.\n", "there is no scripts/gone.py"),
        ("```text\n$ lorafit doctor --fix\n```\n", "No such option: --fix"),
    ],
)
def test_a_wrong_command_is_found(tmp_path: Path, text: str, said: str) -> None:
    page = written(tmp_path, text)
    commands = [*check_docs.typed(page), *check_docs.shown(page)]
    found = [problem for command in commands for problem in check_docs.command_problems(command)]
    assert len(commands) in (1, 2) and any(said in problem for problem in found), found


def test_a_wrong_option_recipe_or_link_is_found_with_its_line(tmp_path: Path) -> None:
    page = written(
        tmp_path, "# A b\n\n`--gone`, `lorafit/gone.py`, [a](#a-c), [b](gone.md)\n\n```yaml\nlora:\n  alfa: 3\n```\n"
    )
    assert [*check_docs.option_problems(page)] == ["page.md: no command has --gone"]
    assert [*check_docs.path_problems(page)] == ["page.md: there is no lorafit/gone.py"]
    assert [*check_docs.link_problems(page)] == ["page.md: page.md has no heading #a-c", "page.md: there is no gone.md"]
    (block,) = check_docs.blocks(page)
    (said,) = check_docs.recipe_problems(block)
    assert said.startswith("page.md:7: lora.alfa: not a key of lora")


def test_what_is_run_is_small_and_the_rest_has_its_reason() -> None:
    commands = [command for page in check_docs.pages() for command in check_docs.typed(page)]
    here = [check_docs.as_run_here(command) for command in commands]
    trained = [words for words in here if words[:2] == ("lorafit", "train")]
    assert len(trained) >= 8
    assert all("--smoke" in words or "training.max_steps=20" in words for words in trained)
    reasons = {reason for reason in here if isinstance(reason, str)}
    assert reasons and reasons <= {*check_docs.NOT_HERE.values(), check_docs.SEVERAL_MACHINES}


@pytest.mark.slow
def test_what_the_pages_type_can_be_run() -> None:
    assert check_docs.run_all() == 0


def test_the_readme_is_short_and_names_every_page() -> None:
    assert len(README.splitlines()) <= 170
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in README


def test_the_readme_lists_every_command() -> None:
    listed = set(re.findall(r"^\| `lorafit ([a-z-]+)", README, re.MULTILINE))
    assert listed == check_docs.command_names()


def test_what_the_readme_shows_of_the_quickstart_is_its_end() -> None:
    ended = re.search(r"```text\n(outcome .*?)```", README, re.DOTALL).group(1)  # type: ignore[union-attr]
    assert ended in START


def test_every_recipe_is_listed_with_the_memory_its_header_says() -> None:
    for path in (ROOT / "recipes").glob("*.yaml"):
        (row,) = [line for line in START.splitlines() if line.startswith(f"| [{path.name}]")]
        needs = re.search(r"# Needs   ([\d.]+ [MG]B) for the weights", path.read_text(encoding="utf-8"))
        if needs:
            assert row.endswith(f"| {needs.group(1)} |")
        assert ("QLoRA" in row) == (load(path).recipe.quantization is not None)


def test_the_mistakes_of_the_readme_are_named_as_it_shows(tmp_path: Path) -> None:
    recipe = re.search(r"```yaml\n(# bad\.yaml\n.*?)```", README, re.DOTALL).group(1)  # type: ignore[union-attr]
    shown = re.search(r"\$ lorafit train bad\.yaml\n(.*?)```", README, re.DOTALL).group(1)  # type: ignore[union-attr]
    (tmp_path / "bad.yaml").write_text(recipe, encoding="utf-8")
    command = [sys.executable, "-m", "lorafit", "train", "bad.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (2, shown)


def test_the_exit_codes_are_listed() -> None:
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", TROUBLE, re.MULTILINE)}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.LorafitError)]
    assert listed == {0} | {kind.exit_code for kind in kinds}


def test_every_finding_piece_of_advice_and_rule_of_health_is_explained() -> None:
    rows = [row for heading in ("finding", "name", "rule") for row in tables_of(heading)]
    first = {row[0].strip("`"): row[1] for row in rows}
    assert {name for kind in KINDS.values() if first.get(name := kind.name) != kind.level} == set()
    assert {*ADVICE_NAMES, *HealthSection.model_fields} <= first.keys()


def test_every_message_that_is_explained_is_one() -> None:
    """Its pieces between `…` stand, in one file, in the texts of the code; and every room that refuses has some."""
    texts = {path: texts_of(path) for path in sorted((ROOT / "lorafit").rglob("*.py"))}
    quoted = [quote for table in tables_of("message") for quote in re.findall(r"`([^`]+)`", table[0])]
    found = {quote: [path for path, text in texts.items() if stands_in(quote, text)] for quote in quoted}
    assert len(quoted) > 200 and len(texts) > 200
    assert [quote for quote, places in found.items() if not places] == []
    explained = {path.relative_to(ROOT / "lorafit").parts[0] for places in found.values() for path in places}
    refusing = {path.parent.name for path in (ROOT / "lorafit").glob("*/*.py") if "Error(" in path.read_text()}
    assert len(refusing) >= 10 and refusing <= explained


def tables_of(heading: str) -> list[list[str]]:
    """The cells of each row of the tables whose first column has that name."""
    tables = re.findall(rf"^\| {heading} \|.*?\n\n", f"{TROUBLE}\n\n", re.MULTILINE | re.DOTALL)
    return [row.strip("| ").split(" | ") for table in tables for row in table.splitlines()[2:] if row]


def stands_in(quote: str, text: str) -> bool:
    return all(piece.strip() in text for piece in quote.split("…"))


def texts_of(path: Path) -> str:
    """Every string of a file, the pieces of those that are put together each alone."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return "\n".join(node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))


def test_figures_that_were_measured_stand_in_the_records() -> None:
    """To the digits that are shown; but for the answers at once, whose figures are of today and not of the record."""
    lines = (ROOT / "docs/planning.md").read_text(encoding="utf-8").partition("What they printed")[2].splitlines()
    rows = [line for line in lines if line.startswith("| ") and not line.startswith(("| |", "| `--help`"))]
    records = " ".join(path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks/results").glob("*.json"))
    recorded = {float(number.replace(",", "")) for number in NUMBER.findall(records)}
    figures = [number for row in rows for number in NUMBER.findall(row)]
    assert len(rows) >= 9 and len(figures) > 30
    assert [number for number in figures if not any(is_rounded_to(number, value) for value in recorded)] == []


def is_rounded_to(shown: str, value: float) -> bool:
    half = 0.5 * 10.0 ** -len(shown.partition(".")[2])
    return abs(float(shown.replace(",", "")) - value) <= half * (1 + 1e-9)


def test_every_room_has_its_row() -> None:
    rows = re.findall(r"^\| `lorafit/([\w]+)` \|", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE)
    rooms = {path.parent.name for path in (ROOT / "lorafit").glob("*/__init__.py")}
    assert len(rooms) >= 13 and {*rows} == rooms


def test_a_copy_to_run_in_is_whole(tmp_path: Path) -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    check_docs.copy_repository(tmp_path / "copy")
    assert (tmp_path / "copy/lorafit/configs").is_symlink()
    assert (tmp_path / "copy/recipes/quickstart/base/model.safetensors").is_file()
