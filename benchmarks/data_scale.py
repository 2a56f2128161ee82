"""Memory and speed of preparing a million rows (about 200 M tokens) that this script makes, and of starting again.

    python benchmarks/data_scale.py [--rows 1000000] [--sample 50000] [--keep DIRECTORY]

Prints what lorafit promises and what it takes here: memory over that of the imports, rows per second against
SFTTrainer's own preparation of the first rows with identical labels, the seconds of a second start, and what `validate`
takes. Memory is the resident set of the process at its largest, as the kernel counts it: with the pages of files that
are mapped or the process has read through maps; how much of it is the process's own is said beside it.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from itertools import islice
from pathlib import Path
from typing import Any

QUICKSTART = Path(__file__).parents[1] / "recipes/quickstart"
PROMISED = {"prepare_mb": 900, "validate_mb": 400, "second_start_s": 1.0, "times_trl": 4.0}
MAX_LENGTH = 4096


def make_rows(path: Path, rows: int) -> None:
    """Questions and answers of random words, no two the same."""
    drawn = random.Random(0)
    text = (QUICKSTART / "train.jsonl").read_text(encoding="utf-8")
    words = sorted({word for line in text.splitlines()[:500] for word in str(json.loads(line)).split()})
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            prompt = " ".join(drawn.choices(words, k=drawn.randrange(2, 16)))
            answer = " ".join(drawn.choices(words, k=drawn.randrange(2, 42)))
            file.write(json.dumps({"prompt": f"{number}: {prompt}?", "completion": answer}) + "\n")


class Memory:
    """The largest resident set from now on, in megabytes above what it is now."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # forget the largest so far
        self._before = self._now()
        self.own = 0.0
        threading.Thread(target=self._watch, daemon=True).start()

    @staticmethod
    def _now() -> dict[str, float]:
        lines = Path("/proc/self/status").read_text().splitlines()
        return {name: int(rest.split()[0]) / 1000 for name, rest in (line.split(":") for line in lines) if "kB" in rest}

    def _watch(self) -> None:
        while True:
            self.own = max(self.own, self._now()["RssAnon"] - self._before["RssAnon"])
            time.sleep(0.02)

    def peak(self) -> dict[str, float]:
        return {"peak_mb": self._now()["VmHWM"] - self._before["VmRSS"], "own_mb": self.own}


def validated(recipe: Path) -> dict[str, Any]:
    """What `lorafit validate` takes, in a process of its own: without the imports, which it lives on as well."""
    from lorafit.validation import validate

    memory, start = Memory(), time.perf_counter()
    found = validate(recipe)
    assert "torch" not in sys.modules
    return memory.peak() | {"seconds": time.perf_counter() - start, "rows": found.data.train_rows}


def prepared(data: Path, cache: Path) -> dict[str, Any]:
    """What `prepare` takes."""
    from data_preparation import own_arguments
    from transformers import AutoTokenizer

    from lorafit.data.prepare import prepare

    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART / "base")
    memory, start = Memory(), time.perf_counter()
    made = prepare(**own_arguments(tokenizer, data), cache_dir=cache)
    seconds = time.perf_counter() - start
    return memory.peak() | {"seconds": seconds, "rows": len(made.train), "tokens": made.audit.train.tokens}


def compared(data: Path, rows: int) -> dict[str, Any]:
    """Rows per second of SFTTrainer's own preparation and of ours on the first rows."""
    import datasets
    from data_preparation import own_preparation, trl_preparation, trl_rows
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART / "base")
    with tempfile.TemporaryDirectory() as folder:
        sample = Path(folder) / "sample.jsonl"
        with data.open(encoding="utf-8") as lines:
            sample.write_text("".join(islice(lines, rows)), encoding="utf-8")
        own_seconds, own = own_preparation(tokenizer, sample)
        trl_seconds, theirs = trl_preparation(tokenizer, trl_rows(sample), QUICKSTART / "base", folder)
        columns = ("input_ids", "labels")
        parts = [(column, slice(start, start + 1000)) for column in columns for start in range(0, rows, 1000)]
        same = all(own[column][part] == theirs[column][part] for column, part in parts)
    return {"own_rows_s": rows / own_seconds, "trl_rows_s": rows / trl_seconds, "are_identical": same}


def in_own_process(name: str, *arguments: Any) -> dict[str, Any]:
    """One of the measurements above."""
    command = [sys.executable, __file__, "--measure", name, *map(str, arguments)]
    return dict(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1]))


def report(folder: Path, rows: int, sample: int) -> bool:
    """Measure and print all of it; whether what is promised holds."""
    data, recipe, cache = folder / "rows.jsonl", folder / "recipe.yaml", folder / "cache"
    make_rows(data, rows)
    recipe.write_text(
        f"model: {{model_name_or_path: {QUICKSTART / 'base'}}}\ndata: {{train: [{{path: rows.jsonl}}]}}\n"
        f"training: {{max_length: {MAX_LENGTH}}}\n"
    )
    time.sleep(4)  # written just now, a file is hashed again each time
    print(f"{rows:,} rows, {data.stat().st_size / 1e6:,.0f} MB")
    check = in_own_process("validated", recipe)
    print(f"validate      {check['seconds']:8.1f} s   {rows / check['seconds']:8,.0f} rows/s {_memory(check)}")
    first = in_own_process("prepared", data, cache)
    print(f"prepare       {first['seconds']:8.1f} s   {rows / first['seconds']:8,.0f} rows/s   {_memory(first)}")
    print(f"              {first['tokens'] / 1e6:,.0f} M tokens, {first['tokens'] / first['seconds'] / 1e6:.2f} M/s")
    again = in_own_process("prepared", data, cache)
    print(f"second start  {again['seconds']:8.2f} s   {_memory(again)}")
    both = in_own_process("compared", data, min(sample, rows))
    times = both["own_rows_s"] / both["trl_rows_s"]
    print(f"{min(sample, rows):,} of the rows in one process:")
    print(f"SFTTrainer    {both['trl_rows_s']:8,.0f} rows/s")
    print(f"lorafit       {both['own_rows_s']:8,.0f} rows/s   {times:.2f} times")
    print(f"tokens and labels {'identical' if both['are_identical'] else 'DIFFER'}")
    held = {
        f"prepare within {PROMISED['prepare_mb']} MB": first["peak_mb"] <= PROMISED["prepare_mb"],
        f"validate within {PROMISED['validate_mb']} MB": check["peak_mb"] <= PROMISED["validate_mb"],
        f"second start within {PROMISED['second_start_s']:g} s": again["seconds"] <= PROMISED["second_start_s"],
        f"{PROMISED['times_trl']:g} times SFTTrainer": times >= PROMISED["times_trl"],
        "identical labels": both["are_identical"],
    }
    print("promised: " + ", ".join(f"{what}: {'yes' if is_so else 'NO'}" for what, is_so in held.items()))
    return all(held.values())


def _memory(taken: dict[str, Any]) -> str:
    return f"{taken['peak_mb']:6,.0f} MB over the imports, {taken['own_mb']:,.0f} of them its own"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--sample", type=int, default=50_000, help="rows that SFTTrainer prepares as well")
    parser.add_argument("--keep", type=Path, help="where the rows and the cache stay, instead of going")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        name, *values = arguments.measure
        measures = {"validated": validated, "prepared": prepared, "compared": compared}
        print(json.dumps(measures[name](*(int(value) if value.isdigit() else Path(value) for value in values))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        sys.exit(0 if report(folder, arguments.rows, arguments.sample) else 1)


if __name__ == "__main__":
    main()
