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
from importlib.metadata import distribution, packages_distributions, version
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from support import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
START = (ROOT / "docs/start.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
RUN_LINE = "pip install -c constraints.txt -e . && lorafit train recipes/quickstart.yaml"
TEST_LINE = "pip install -c constraints.txt -e '.[test]' && pytest"
CHECK_LINE = "pip install -c constraints.txt -e '.[dev]' && scripts/check"
NEWEST, OLDEST = "constraints.txt", "constraints-oldest.txt"
EXTRAS = {NEWEST: ("test", "dev"), OLDEST: ("test",)}
"""What is installed where the tests run with a set."""

OF_CUDA = ("nvidia-", "cuda-", "triton")
"""What torch brings along where it computes on GPUs, in the versions that it wants."""


def requirements(*extras: str) -> list[Requirement]:
    """What lorafit asks for, with the extras."""
    asked = PROJECT["dependencies"] + [line for extra in extras for line in PROJECT["optional-dependencies"][extra]]
    return [one for one in map(Requirement, asked) if one.name != PROJECT["name"]]


def pins(constraints: str) -> dict[str, str]:
    """Distribution -> version, as one of the two sets has them."""
    lines = (ROOT / constraints).read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def set_installed_here() -> str:
    """The set whose transformers these tests run with."""
    return OLDEST if version("transformers") == pins(OLDEST)["transformers"] else NEWEST


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
    return {str(canonicalize_name(of_module[module][0])) for module in modules if module in of_module} - {"lorafit"}


def test_what_is_installed_is_pinned_and_nothing_else() -> None:
    tested = set_installed_here()
    installed = installed_with(requirements(*EXTRAS[tested]))
    assert installed <= pins(tested).keys()
    if sys.version_info[:2] == (3, 11):  # a newer Python brings what some of them are for
        assert pins(tested).keys() <= installed


def test_the_versions_tested_here_are_the_pinned_ones() -> None:
    tested = set_installed_here()
    for name in installed_with(requirements(*EXTRAS[tested])):
        assert Version(version(name)).public == pins(tested)[name], name


def test_each_range_reaches_from_the_oldest_set_to_the_newest() -> None:
    for requirement in requirements("test"):
        name = canonicalize_name(requirement.name)
        oldest, newest = Version(pins(OLDEST)[name]), Version(pins(NEWEST)[name])
        assert newest in requirement.specifier, requirement
        (lowest,) = [Version(one.version) for one in requirement.specifier if one.operator == ">="]
        is_tool = requirement in requirements("test")[len(requirements()) :]
        assert lowest == oldest or (is_tool and lowest <= oldest), requirement


@pytest.mark.parametrize(("directory", "extras"), [("lorafit", ()), ("tests", ("test",))])
def test_what_is_imported_is_asked_for(directory: str, extras: tuple[str, ...]) -> None:
    asked = {canonicalize_name(requirement.name) for requirement in requirements(*extras)}
    assert imported_by(directory) - asked == set()


def test_the_wheel_holds_every_file_that_the_code_reads(tmp_path: Path) -> None:
    """The two links in the package become directories, and the quickstart's weights stay out."""
    for name in ("pyproject.toml", "README.md", "LICENSE", NEWEST, OLDEST):
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
    assert {f"lorafit/{NEWEST}", f"lorafit/{OLDEST}"} <= held
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert {f"lorafit/smoke_tokenizer/{name}" for name in tokenizer} <= held
    assert not [name for name in held if name.endswith(".safetensors")]


def test_the_readme_has_the_three_lines() -> None:
    assert {RUN_LINE, TEST_LINE, CHECK_LINE} <= set(README.splitlines())


def speaking_programs(directory: Path, *, pip_fails: bool = False) -> dict[str, str]:
    """An environment whose Python makes virtual environments of programs that only say how they were called."""
    program = '#!/bin/sh\necho "$(basename $0) in $PWD: $*"\n'
    python = directory / "python"
    making = "".join(
        f"printf '%s' '{program}{'exit 7' if name == 'pip' and pip_fails else ''}' > \"$3/bin/{name}\"\n"
        for name in ("pip", "ruff", "mypy", "pytest")
    )
    python.write_text(f'{program}mkdir -p "$3/bin"\n{making}chmod +x "$3"/bin/*\n')
    python.chmod(0o755)
    return os.environ | {"PYTHON": str(python), "TMPDIR": str(directory), "CI": "true"}


def called(script: Path, *arguments: str, environment: dict[str, str]) -> tuple[int, list[str]]:
    """Exit code and output of a script."""
    command = ["bash", str(script), *arguments]
    done = subprocess.run(
        command,
        cwd="/",
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout.splitlines()


@pytest.mark.parametrize("pip_fails", [False, True])
def test_ci_runs_the_check_line_in_a_fresh_environment(tmp_path: Path, pip_fails: bool) -> None:
    code, (made, _, *calls) = called(ROOT / ".ci/run", environment=speaking_programs(tmp_path, pip_fails=pip_fails))
    fresh = made.removeprefix(f"python in {ROOT}: -m venv ")
    assert calls[0] == f"pip in {ROOT}: install -c constraints.txt -e .[dev]"
    checks = ["ruff in {}: format --check .", "ruff in {}: check .", "mypy in {}: ", "pytest in {}: -n 2"]
    assert calls[1:] == ([] if pip_fails else [check.format(ROOT) for check in checks])
    assert code == (7 if pip_fails else 0)
    assert fresh.startswith(str(tmp_path)) and not Path(fresh).exists()


def test_the_oldest_set_is_tested_in_an_environment_that_is_kept(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    script = Path(shutil.copy(ROOT / "scripts/check", tmp_path / "scripts"))
    environment = speaking_programs(tmp_path)
    install = f"pip in {tmp_path}: install -c constraints-oldest.txt -e .[test]"
    first = called(script, "--oldest", environment=environment)
    assert first == (0, [f"python in {tmp_path}: -m venv .venv-oldest", install, f"pytest in {tmp_path}: -n 2"])
    again = called(script, "--oldest", "-k", "merge", environment=environment)
    assert again == (0, [install, f"pytest in {tmp_path}: -n 2 -k merge"])


def test_the_workflow_checks_every_python_with_both_sets() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    (job,) = workflow["jobs"].values()
    matrix = job["strategy"]["matrix"]
    assert matrix["python"] == [line.rpartition(" ")[2] for line in PROJECT["classifiers"]]
    assert all(python in SpecifierSet(PROJECT["requires-python"]) for python in matrix["python"])
    assert {name for name in matrix["constraints"] if (ROOT / name).is_file()} == {NEWEST, OLDEST}
    commands = {row["constraints"]: row["command"] for row in matrix["include"]}
    assert commands == {NEWEST: "bash .ci/run", OLDEST: "scripts/check --oldest"}
    _, setup, run = job["steps"]
    assert setup["with"]["python-version"] == "${{ matrix.python }}" and run["run"] == "${{ matrix.command }}"
    assert job["env"]["PYTHON"] == "python"


def test_the_scripts_can_be_run() -> None:
    for name in (".ci/run", "scripts/check", "scripts/gpu_check.sh", "scripts/gpu_prepare.sh"):
        assert (ROOT / name).stat().st_mode & stat.S_IXUSR
        subprocess.run(["bash", "-n", str(ROOT / name)], check=True)


@pytest.mark.slow
def test_the_quickstart_prints_what_its_page_shows_and_its_qlora_twin_learns_as_much(tmp_path: Path) -> None:
    """Times, memory and this machine's precision aside; the losses to what another CPU may change in them."""
    done = quickstart("quickstart.yaml", tmp_path / "lora")
    shown = re.search(r"```text\n(data: .*?)```", START, re.DOTALL).group(1).splitlines()  # type: ignore[union-attr]
    of_this_machine = ("step ", "base weights")  # of a slow one, of one without bfloat16
    figures = ("bfloat16", "held-out", "perplexity", "tokens", "time", "peak memory", "adapter  ", "next")
    varying = (*figures, *of_this_machine)
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
