"""What a stranger meets first: the README, what is installed, the wheel, and the script that tries it all."""

from __future__ import annotations

import ast
import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from importlib.metadata import distribution, packages_distributions
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
START = (ROOT / "docs/start.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
RUN_LINE = "pip install -c constraints.txt -e . && lorafit train recipes/quickstart.yaml"
TEST_LINE = "pip install -c constraints.txt -e '.[test]' && pytest"
OF_CUDA = ("nvidia-", "cuda-", "triton")
"""What torch brings along where it computes on GPUs, in the versions that it wants."""


def requirements(*extras: str) -> list[Requirement]:
    """What lorafit asks for, with the extras."""
    asked = PROJECT["dependencies"] + [line for extra in extras for line in PROJECT["optional-dependencies"][extra]]
    return [Requirement(line) for line in asked]


def pins() -> dict[str, str]:
    """Distribution -> version, as constraints.txt has them."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def installed_with(asked: list[Requirement]) -> set[str]:
    """Everything that installing `asked` brings along here."""
    found: dict[str, set[str]] = {}
    waiting = list(asked)
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name.startswith(OF_CUDA) or (name in found and requirement.extras <= found[name]):
            continue
        found[name] = found.get(name, set()) | requirement.extras
        for line in distribution(name).requires or ():
            further = Requirement(line)
            extras = ("", *requirement.extras)
            if further.marker is None or any(further.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(further)
    return set(found)


def imported_by(directory: str) -> set[str]:
    """Distributions that the Python files of a directory import, under their canonical names."""
    modules: set[str] = set()
    for file in (ROOT / directory).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {name.name.partition(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules.add(node.module.partition(".")[0])
    of_module = packages_distributions()
    return {canonicalize_name(of_module[module][0]) for module in modules if module in of_module} - {"lorafit"}


def test_what_is_installed_is_pinned_and_nothing_else() -> None:
    assert installed_with(requirements("test")) == set(pins())


def test_the_versions_tested_here_are_the_pinned_ones() -> None:
    here = {name: Version(distribution(name).version).public for name in pins()}
    assert here == pins()


def test_every_pin_lies_in_its_range() -> None:
    for requirement in requirements("test"):
        assert pins()[canonicalize_name(requirement.name)] in requirement.specifier, requirement


@pytest.mark.parametrize(("directory", "extras"), [("lorafit", ()), ("tests", ("test",))])
def test_what_is_imported_is_asked_for(directory: str, extras: tuple[str, ...]) -> None:
    asked = {canonicalize_name(requirement.name) for requirement in requirements(*extras)}
    assert imported_by(directory) - asked == set()


def test_the_wheel_holds_every_file_that_the_code_reads(tmp_path: Path) -> None:
    """The two links in the package become directories, and the quickstart's weights stay out."""
    for name in ("pyproject.toml", "README.md", "LICENSE", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("lorafit", "configs", "recipes"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=ignore)
    build = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.startswith("lorafit/")}
    for path in (ROOT / "lorafit").rglob("*.py"):
        assert path.relative_to(ROOT).as_posix() in held
    assert {f"lorafit/configs/{file.name}" for file in (ROOT / "configs").glob("*.yaml")} <= held
    shapes = {file.relative_to(ROOT).as_posix() for file in (ROOT / "lorafit/planning/shapes").rglob("*.json")}
    assert len(shapes) >= 9 and shapes <= held
    assert "lorafit/constraints.txt" in held
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert {f"lorafit/smoke_tokenizer/{name}" for name in tokenizer} <= held
    assert not [name for name in held if name.endswith(".safetensors")]


def test_the_readme_has_the_two_lines() -> None:
    lines = README.splitlines()
    assert RUN_LINE in lines and TEST_LINE in lines


@pytest.mark.parametrize("pip_fails", [False, True])
def test_ci_runs_the_second_line_in_a_fresh_environment(tmp_path: Path, pip_fails: bool) -> None:
    """With programs in place of Python, pip and pytest that only say how they were called."""
    program = '#!/bin/sh\necho "$(basename $0) in $PWD: $*"\n'
    python = tmp_path / "python"
    failing = "exit 7\n" if pip_fails else ""
    python.write_text(
        f'{program}mkdir -p "$3/bin"\n'
        f"printf '%s' '{program}{failing}' > \"$3/bin/pip\"\n"
        f"printf '%s' '{program}' > \"$3/bin/pytest\"\n"
        'chmod +x "$3"/bin/*\n'
    )
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python), "TMPDIR": str(tmp_path), "CI": "true"}
    done = subprocess.run(
        ["bash", str(ROOT / ".ci/run")],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    made, _, *called = done.stdout.splitlines()
    fresh = made.removeprefix(f"python in {ROOT}: -m venv ")
    assert called[0] == f"pip in {ROOT}: install -c constraints.txt -e .[test]"
    assert called[1:] == ([] if pip_fails else [f"pytest in {ROOT}: "])
    assert done.returncode == (7 if pip_fails else 0)
    assert fresh.startswith(str(tmp_path)) and not Path(fresh).exists()


def test_the_workflow_runs_the_same_script_on_the_tested_python() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    steps = workflow["jobs"]["test"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == ["bash .ci/run"]
    assert [step["with"]["python-version"] for step in steps if "with" in step] == ["3.11"]


def test_the_scripts_can_be_run() -> None:
    for name in (".ci/run", "scripts/check", "scripts/gpu_check.sh", "scripts/gpu_prepare.sh"):
        assert (ROOT / name).stat().st_mode & stat.S_IXUSR
        subprocess.run(["bash", "-n", str(ROOT / name)], check=True)


@pytest.mark.slow
def test_the_quickstart_prints_what_its_page_shows_and_its_qlora_twin_learns_as_much(tmp_path: Path) -> None:
    """Times, memory and this machine's precision aside; the losses to what another CPU may change in them."""
    done = quickstart("quickstart.yaml", tmp_path / "lora")
    shown = re.search(r"```text\n(data: .*?)```", START, re.DOTALL).group(1).splitlines()  # type: ignore[union-attr]
    varying = ("bfloat16", "held-out", "perplexity", "tokens", "time", "peak memory", "adapter  ", "next")
    printed, expected = (
        [re.sub(r"in [\d.]+ s", "in - s", line) for line in lines if not line.startswith(varying)]
        for lines in ((done.stderr + done.stdout).splitlines(), shown)
    )
    assert printed == expected
    before, after = held_out_losses(done.stdout)
    assert (before, after) == pytest.approx(held_out_losses("\n".join(shown)), abs=0.03)
    assert after <= 0.6 * before
    twin = held_out_losses(quickstart("quickstart-qlora.yaml", tmp_path / "qlora").stdout)[1]
    assert twin == pytest.approx(after, rel=0.05)


def quickstart(recipe: str, directory: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lorafit", "train", f"recipes/{recipe}", "--output-dir", str(directory)]
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_MODE"}  # it says so at the start
    environment["LORAFIT_CACHE"] = str(directory.parent / "cache")  # as for the first time: the self-test runs once
    return subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)


def held_out_losses(table: str) -> tuple[float, float]:
    """Before and after, from the final table."""
    found = re.search(r"^held-out loss +([\d.]+) before +([\d.]+) after", table, re.MULTILINE)
    return float(found.group(1)), float(found.group(2))  # type: ignore[union-attr]
