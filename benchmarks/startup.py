"""How long `lorafit --help` and `lorafit validate` take, beside `trl --help`.

    python benchmarks/startup.py

Prints the medians of several starts in fresh processes: seconds on the clock, and seconds of CPU, which do not grow
when the machine is busy. Wanted on 2 cores: `--help` at most 0.2 s, `validate` of a recipe with 1,000 rows at most
0.5 s. A start of Python alone is shown for scale.
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STARTS = 11
ROWS = 1_000


def median_seconds(command: list[str], directory: Path, *, starts: int = STARTS) -> tuple[float, float]:
    """Median wall-clock and CPU time of `command`, after one start that fills the file cache."""
    wall, cpu = [], []
    for _ in range(starts + 1):
        started, used = time.perf_counter(), _cpu_seconds_of_children()
        subprocess.run(command, cwd=directory, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wall.append(time.perf_counter() - started)
        cpu.append(_cpu_seconds_of_children() - used)
    return statistics.median(wall[1:]), statistics.median(cpu[1:])


def _cpu_seconds_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def write_recipe(directory: Path) -> None:
    """A recipe with 1,000 chat rows of about 400 characters."""
    question, answer = "How does it work? " * 6, "It works like this, step by step. " * 9
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    with (directory / "rows.jsonl").open("w", encoding="utf-8") as file:
        for number in range(ROWS):
            file.write(
                json.dumps({"messages": [*messages[:1], {**messages[1], "content": f"{number} {answer}"}]}) + "\n"
            )
    (directory / "recipe.yaml").write_text(
        "model: {model_name_or_path: gpt2}\ndata: {train: [{path: rows.jsonl}], eval_fraction: 0.1}\n", encoding="utf-8"
    )


def main() -> None:
    """Print one line per command."""
    lorafit = [sys.executable, "-m", "lorafit"]
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_recipe(directory)
        measured = {
            "python -c pass": median_seconds([sys.executable, "-c", "pass"], directory),
            "lorafit --help": median_seconds([*lorafit, "--help"], directory),
            f"lorafit validate ({ROWS:,} rows)": median_seconds([*lorafit, "validate", "recipe.yaml"], directory),
            "trl --help": median_seconds([str(Path(sys.executable).parent / "trl"), "--help"], directory, starts=3),
        }
    for command, (wall, cpu) in measured.items():
        print(f"{command:<32} {wall:6.3f} s   {cpu:6.3f} s of CPU")


if __name__ == "__main__":
    main()
