"""The torch line: what must answer at once imports none of the heavy libraries."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.recipes import SMALLEST, written

TORCH = ("torch", "peft", "trl", "accelerate", "bitsandbytes")
HEAVY = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "bitsandbytes", "numpy", "pyarrow", "rich")
RUN = f"""
import sys
from lorafit.cli import _exit_code
code = _exit_code(sys.argv[1:])
print(sorted({{name.partition(".")[0] for name in sys.modules}} & set({HEAVY})), file=sys.stderr)
sys.exit(code)
"""


def heavy_modules(directory: Path, source: str, *arguments: str) -> str:
    command = [sys.executable, "-c", source, *arguments]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=True, timeout=60)
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["validate", "x.yaml"], ["schema"], ["init", "--output", "new.yaml"]]
)
def test_what_must_answer_at_once_imports_nothing_heavy(tmp_path: Path, arguments: list[str]) -> None:
    written(tmp_path, SMALLEST)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n' * 40, encoding="utf-8")
    assert heavy_modules(tmp_path, RUN, *arguments) == "[]"


def test_a_base_is_read_without_anything_heavy(tmp_path: Path, tiny_base: Path) -> None:
    """Long rows too, which are tokenized."""
    written(tmp_path, SMALLEST.replace("gpt2", str(tiny_base)) + "training: {max_length: 512}\n")
    row = {"messages": [{"role": "user", "content": "a" * 300}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 40, encoding="utf-8")
    assert heavy_modules(tmp_path, RUN, "validate", "x.yaml") == "[]"


def test_the_prompts_of_a_merge_are_chosen_without_torch(tmp_path: Path) -> None:
    source = RUN.replace(
        "from lorafit.cli import _exit_code\ncode = _exit_code(sys.argv[1:])",
        "code = 0\nimport lorafit.merging.prompts_job",
    )
    assert not {*json.loads(heavy_modules(tmp_path, source).replace("'", '"'))} & {*TORCH}


def test_the_targets_of_a_dense_model_are_listed_without_peft(tmp_path: Path, tiny_base: Path) -> None:
    loaded = json.loads(heavy_modules(tmp_path, RUN, "targets", str(tiny_base)).replace("'", '"'))
    assert "torch" in loaded and not {*loaded} & {"peft", "trl", "datasets", "bitsandbytes"}


def test_a_command_imports_no_library_that_it_does_not_need(tmp_path: Path) -> None:
    """One after the other, each with what those before it have imported."""
    compiler = "torch._inductor.compile_fx"
    needless = {
        "lorafit.doctor.examine": ("torch", "transformers", "numpy"),
        "lorafit.planning.targets": ("peft", "bitsandbytes", "tokenizers", "datasets", "pandas", "optuna", compiler),
        "lorafit.merging.verify_written": ("peft", "bitsandbytes", "tokenizers", "datasets", "pandas", compiler),
        "lorafit.merging.merge": ("trl", "datasets", "pandas", "optuna", "sacrebleu", "scipy", compiler),
        "lorafit.evaluation.evaluate": ("trl", "optuna", "sqlalchemy", "scipy", "transformers.trainer", compiler),
        "lorafit.planning.make_plan": ("optuna", "sqlalchemy", "scipy", compiler),
    }
    source = f"""
import os, sys
from importlib import import_module
from lorafit.imports import quick_imports
found = {{}}
for module, needless in {needless}.items():
    with quick_imports():
        import_module(module)
    found[module] = sorted(set(needless) & set(sys.modules))
assert "TORCHDYNAMO_DISABLE" not in os.environ
print({{module: names for module, names in found.items() if names}}, file=sys.stderr)
"""
    assert heavy_modules(tmp_path, source) == "{}"


def test_the_command_line_imports_nothing_heavy(tmp_path: Path) -> None:
    source = RUN.replace("code = _exit_code(sys.argv[1:])", "code = 0")
    assert heavy_modules(tmp_path, source) == "[]"


def test_the_package_loads_and_validates_recipes_without_anything_heavy(tmp_path: Path, tiny_base: Path) -> None:
    written(tmp_path, SMALLEST.replace("gpt2", str(tiny_base)))
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n' * 40, encoding="utf-8")
    called = 'code = 0\nimport lorafit\nassert "pydantic" not in sys.modules\nlorafit.validate(lorafit.load("x.yaml"))'
    source = RUN.replace("from lorafit.cli import _exit_code\ncode = _exit_code(sys.argv[1:])", called)
    assert source != RUN and heavy_modules(tmp_path, source) == "[]"


def test_a_preview_imports_no_torch(tmp_path: Path, tiny_base: Path) -> None:
    written(tmp_path, SMALLEST.replace("gpt2", str(tiny_base)))
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n' * 40, encoding="utf-8")
    loaded = json.loads(heavy_modules(tmp_path, RUN, "preview", "x.yaml", "--quiet").replace("'", '"'))
    assert "datasets" in loaded
    assert not {*loaded} & {*TORCH}
