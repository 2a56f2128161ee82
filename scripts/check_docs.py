"""Whether the commands, recipes and links of README.md, CONTRIBUTING.md and docs/*.md are right.

    python scripts/check_docs.py          # read them: seconds, no torch
    python scripts/check_docs.py --run    # and run what a CPU offline can, in a temporary copy: minutes

Reading holds every command line to the command line itself: the command, each option and each value are parsed by the
application, and each file that is named is there. A YAML block is loaded as a recipe, over a smallest one for what it
leaves out. A relative link leads to a file, and to a heading in it.

A run takes tiny things in place of what a page names. `INSTEAD` holds what stands for names that a reader fills in; a
recipe of a large model is trained with --smoke, the quickstart for `FEW` steps. `NOT_HERE` says why others are not run.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import typer

from lorafit.cli import app
from lorafit.errors import LorafitError
from lorafit.recipe import load

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/start.md", "docs/data.md", "docs/training.md", "docs/evaluation.md", "docs/merging.md")
"""Those whose commands build on each other, in the order of a reader; the others come after them."""

INSTEAD = {
    "RECIPE": ("recipes/quickstart.yaml",),
    "RUN": ("runs/quickstart",),
    "someone/adapter": ("runs/quickstart/adapter", "--base", "recipes/quickstart/base"),
    "rows.jsonl": ("recipes/quickstart/eval.jsonl",),
}
TRAINED = ("recipes/quickstart.yaml", "recipes/quickstart-qlora.yaml", "mine.yaml")
"""Recipes that a CPU trains; all others are large."""
FEW = ("--set", "training.max_steps=20")
FEW_RANKS = (*FEW, "--set", "rank_sweep.ranks=[2, 4]")
NOT_HERE = {
    "pip": "needs the network",
    "pytest": "is the test suite",
    "scripts/check": "is the test suite",
    "accelerate": "needs several GPUs; tests/training/test_two_processes.py launches so on a CPU",
    "srun": "needs SLURM; tests/launching/test_two_machines.py gives its variables",
    "bash": "needs a GPU",
    "python": "takes minutes, or a test does the same",
    "git": "changes the repository",
}
SEVERAL_MACHINES = "needs several machines; tests/launching/test_two_machines.py runs two on one"
SMALLEST = "model: {model_name_or_path: openai-community/gpt2}\ndata: {train: [{path: train.jsonl}]}\n"
WRONG_ON_PURPOSE = "# bad.yaml\n"
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)")
_LINK = re.compile(r"\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str


@dataclass(frozen=True)
class Command:
    """One command, where a page types it."""

    where: str
    words: tuple[str, ...]
    is_whole: bool = True
    """Whether it could be typed as it stands; a name within a sentence leaves its arguments out."""

    def __str__(self) -> str:
        return shlex.join(self.words)


def pages() -> list[Path]:
    """Every page, those that build on each other first."""
    others = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
    names = dict.fromkeys((*PAGES, *others, "CONTRIBUTING.md"))
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    text = page.read_text(encoding="utf-8")
    return [Block(page, text.count("\n", 0, found.start()) + 2, found[1], found[2]) for found in _FENCE.finditer(text)]


def typed(page: Path) -> Iterator[Command]:
    """The commands of the shell blocks of a page, in their order."""
    for block in blocks(page):
        if block.language in ("sh", "bash"):
            yield from _commands(block)


def shown(page: Path) -> Iterator[Command]:
    """Commands within a sentence or above their output."""
    text = page.read_text(encoding="utf-8")
    for block in blocks(page):
        lines = enumerate(block.text.splitlines(), block.line)
        for number, line in lines if block.language == "text" else ():
            if line.startswith("$ "):
                yield Command(f"{page.name}:{number}", tuple(shlex.split(line[2:])))
    prose = _FENCE.sub(lambda found: "\n" * found[0].count("\n"), text)
    for found in _SPAN.finditer(prose):
        words = found[1].replace("\\|", " ").replace("'", " ").split()
        if words[0] in ("lorafit", "python", "bash", "accelerate") and len(words) > 1:
            yield Command(f"{page.name}:{prose.count(chr(10), 0, found.start()) + 1}", tuple(words), is_whole=False)


def _commands(block: Block) -> Iterator[Command]:
    number = block.line
    for line in block.text.replace("\\\n", " ").splitlines():
        rest: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word not in ("&&", "|", ";"):
                rest.append(word)
            elif rest:
                yield Command(f"{block.page.name}:{number}", tuple(rest))
                rest = []
        number += 1


def command_problems(command: Command) -> Iterator[str]:
    """What is wrong with a command: a file, a command, an option or a value that does not exist."""
    words = [word for word in command.words if not re.match(r"[A-Z_]+=", word)]
    for word in words:
        path = word.partition("=")[2] if word.startswith("--") else word
        top = path.partition("/")[0]
        if "/" in path and top != "runs" and (ROOT / top).is_dir() and not (ROOT / path).exists():
            yield f"there is no {path}"
    if "lorafit" in words:  # `python -m lorafit`, `accelerate launch ... -m lorafit`, `srun ... lorafit`
        yield from _lorafit_problems(words[words.index("lorafit") + 1 :], is_whole=command.is_whole)
    elif words[0] == "python":
        yield from _script_problems(words[1:])
    elif words[0] == "pip":
        yield from _pip_problems(words[1:])
    elif words[0] == "pytest":
        markers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
        marker = words[words.index("-m") + 1] if "-m" in words else "slow"
        if marker not in [line.split(":")[0] for line in markers]:
            yield f"there is no marker {marker}"
    elif not words[0].startswith("scripts/") and words[0] not in (*NOT_HERE, "cd"):
        yield f"{words[0]} is no program that this script knows"


def _lorafit_problems(words: list[str], *, is_whole: bool) -> Iterator[str]:
    group = typer.main.get_command(app)
    name = next((word for word in words if not word.startswith("-")), None)
    if name is None:  # `lorafit --version`
        command = group
    elif (command := group.commands.get(name)) is None or command.hidden:  # type: ignore[attr-defined]
        yield f"there is no command {name}"
        return
    elif is_whole:
        try:
            command.make_context(name, words[words.index(name) + 1 :])
        except typer.TyperException as error:
            yield error.format_message()
        return
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    for word in words:
        option = word.partition("=")[0]
        if re.fullmatch(r"--[a-z-]+", option) and option not in known | {"--help"}:
            yield f"{name or 'lorafit'} has no {option}"


def _script_problems(words: list[str]) -> Iterator[str]:
    script = ROOT / words[0]
    if not script.is_file():
        yield f"there is no {words[0]}"
        return
    source = script.read_text(encoding="utf-8")
    for word in words[1:]:
        if word.startswith("--") and f'"{word.partition("=")[0]}"' not in source:
            yield f"{words[0]} has no {word}"


def _pip_problems(words: list[str]) -> Iterator[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    if "-c" in words and not (ROOT / words[words.index("-c") + 1]).is_file():
        yield f"there is no {words[words.index('-c') + 1]}"
    for extra in re.findall(r"(?:\.|lorafit)\[(\w+)\]", " ".join(words)):
        if extra not in project["optional-dependencies"]:
            yield f"there is no extra {extra}"


def command_names() -> set[str]:
    """The commands that `lorafit --help` lists."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return {name for name, command in commands.items() if not command.hidden}


def option_problems(page: Path) -> Iterator[str]:
    """Options that stand alone in a sentence or a table: one of the commands has each."""
    group = typer.main.get_command(app)
    commands = [group, *group.commands.values()]  # type: ignore[attr-defined]
    known = {
        option
        for command in commands
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    own = " ".join(path.read_text(encoding="utf-8") for path in (ROOT / "scripts").iterdir() if path.is_file())
    for span in _SPAN.findall(_FENCE.sub("", page.read_text(encoding="utf-8"))):
        for option in re.findall(r"(?<!\S)--[a-z-]+", span) if span.startswith("--") else ():
            if option not in known and option not in own:
                yield f"{page.name}: no command has {option}"


def recipe_problems(block: Block) -> Iterator[str]:
    """What is wrong with a YAML block as a recipe, each with the line of the page."""
    if block.text.startswith(WRONG_ON_PURPOSE):
        return
    with tempfile.TemporaryDirectory(prefix="lorafit-docs-") as directory:
        Path(directory, "smallest.yaml").write_text(SMALLEST, encoding="utf-8")
        path = Path(directory, "block.yaml")
        path.write_text(f"extends: smallest.yaml\n{block.text}", encoding="utf-8")
        try:
            load(path)
        except LorafitError as error:
            for problem in error.problems:
                line, _, rest = str(problem).partition("block.yaml:")[2].partition(": ")
                yield f"{block.page.name}:{block.line + int(line or 2) - 2}: {rest or problem}"


def link_problems(page: Path) -> Iterator[str]:
    """Relative links that lead nowhere: to no file, or to no heading of it."""
    for link in _LINK.findall(_FENCE.sub("", page.read_text(encoding="utf-8"))):
        if "://" in link or link.startswith("mailto:"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists():
            yield f"{page.name}: there is no {link}"
        elif anchor and anchor not in anchors(target):
            yield f"{page.name}: {target.name} has no heading #{anchor}"


def path_problems(page: Path) -> Iterator[str]:
    """Files and rooms of the repository that a sentence names and that are not there."""
    for span in _SPAN.findall(_FENCE.sub("", page.read_text(encoding="utf-8"))):
        is_path = re.fullmatch(r"(?:lorafit|tests|scripts|benchmarks|configs|docs|\.ci|\.github)/[\w./-]+", span)
        if is_path and not (ROOT / span).exists():
            yield f"{page.name}: there is no {span}"


def anchors(page: Path) -> set[str]:
    """Of the headings of a page, as GitHub makes them."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def problems() -> list[str]:
    """Everything that is wrong with the pages, read alone."""
    found: list[str] = []
    for page in pages():
        for command in (*typed(page), *shown(page)):
            found += [f"{command.where}: {command}: {problem}" for problem in command_problems(command)]
        for block in blocks(page):
            found += recipe_problems(block) if block.language == "yaml" else ()
        found += [*option_problems(page), *path_problems(page), *link_problems(page)]
    return found


def as_run_here(command: Command) -> tuple[str, ...] | str:
    """The words of a command with tiny things in place of large ones; or why it is not run."""
    words = [instead for word in command.words for instead in INSTEAD.get(word, (word,))]
    if words[0] in NOT_HERE:
        return NOT_HERE[words[0]]
    if "--machine-rank" in words:
        return SEVERAL_MACHINES
    if words[:2] == ["lorafit", "train"] and "--smoke" not in words:
        words += FEW if words[2] in TRAINED else ("--smoke",)
    if words[:2] == ["lorafit", "rank-sweep"]:
        words += FEW_RANKS
    return tuple(words)


def run_all() -> int:
    """Run what can be run, each command once, in a copy of the files that git knows; how many failed."""
    failed, done = 0, set()
    with tempfile.TemporaryDirectory(prefix="lorafit-docs-") as directory:
        copy = Path(directory, "lorafit")
        copy_repository(copy)
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "LORAFIT_CACHE": str(Path(directory, "cache")),
            "PYTHONPATH": str(copy),
        }
        for command in (command for page in pages() for command in typed(page)):
            words = as_run_here(command)
            if isinstance(words, str):
                print(f"not run {command.where}: {command}: {words}", flush=True)
                continue
            if words in done:
                continue
            done.add(words)
            program = [sys.executable, "-m", *words] if words[0] == "lorafit" else list(words)
            ran = subprocess.run(program, cwd=copy, env=environment, capture_output=True, text=True, check=False)
            print(f"{'ok     ' if ran.returncode == 0 else 'FAILED '} {command.where}: {shlex.join(words)}", flush=True)
            if ran.returncode:
                failed += 1
                print(f"exit {ran.returncode}\n{ran.stderr[-2000:]}", flush=True)
    return failed


def copy_repository(copy: Path) -> None:
    """The files that git knows, links as links."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.split("\0")[:-1]:
        if (ROOT / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)


def main() -> None:
    """Read, and run where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="run what can be run in a temporary copy, too")
    chosen = parser.parse_args()
    found = problems()
    print("\n".join(found or [f"{len(pages())} pages, nothing wrong"]), flush=True)
    sys.exit(1 if found or (chosen.run and run_all()) else 0)


if __name__ == "__main__":
    main()
