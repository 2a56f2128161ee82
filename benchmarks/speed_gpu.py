"""Training speed on a GPU, at the size that people train: lorafit beside plain TRL, in turn, in one run.

    python benchmarks/speed_gpu.py [--shape llama3-8b] [--sides ...] [--out FILE.json]   # needs a GPU
    python benchmarks/speed_gpu.py --tiny                                        # the same path on the CPU, tiny

Random weights of a shipped shape in bfloat16, written once; LoRA r=16 on all linear layers; rows as long as GSM8K's,
packed. Every side is a process of its own, on the same rows, and is killed when it takes too long. A line is printed
and FILE.json written anew after each, and none is begun once `--budget` is spent: by default four sides in at most five
minutes (for all of them name `--sides`, with `--rounds 2 --budget 1500`). Tokens/s leave out the first six steps. MFU
counts, for each token, 4 N + 4 H + 3.5 a + 6 P operations: N weights of the base's linear layers and H of its output
head (frozen: forward, and backward to the input), a of a forward pass of attention within a document, P weights of the
adapter. What is computed a second time by checkpointing is not counted. Ends with 1 where a side failed.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from made_with import made_with
from own_process import NoAnswer, end_by_exception, output_of

from lorafit.lines import heard
from speed import BASE_TOKENIZER, LORA, train_with_lorafit, train_with_trl, write_rows

FOUR_BITS = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
}


@dataclass(frozen=True)
class Side:
    """What trains, on how much at once."""

    with_trl: bool = False
    size: int = 4
    """Packed rows of `length` tokens in a micro-step."""
    length: int = 2048
    in_4_bits: bool = False
    off: str | None = None
    """A lever of lorafit."""
    rows: str = "rows"


SIDES = {
    "trl-packed": Side(with_trl=True),
    "lorafit": Side(),
    "lorafit-no-varlen": Side(off="varlen_attention"),
    "lorafit-no-fused": Side(off="fused_lora"),
    "trl-qlora": Side(with_trl=True, in_4_bits=True),
    "lorafit-qlora": Side(in_4_bits=True),
    "lorafit-16k": Side(size=1, length=16384, rows="long"),
    "lorafit-16k-no-varlen": Side(size=1, length=16384, rows="long", off="varlen_attention"),
}
MAIN_SIDES = ("lorafit", "trl-packed", "lorafit-qlora", "trl-qlora")
"""What five minutes are enough for."""
BUDGET_SECONDS, SIDE_SECONDS = 280, 100
BESIDE = {
    "trl-qlora": "lorafit-qlora",
    "lorafit-qlora": "lorafit",
    "lorafit-16k-no-varlen": "lorafit-16k",
    "lorafit-16k": "lorafit-16k",
}
"""What a side is compared with; the others with `lorafit`."""
SHORTER = 4
"""How many times as short rows are with `--tiny`."""


def sized(side: Side, *, tiny: bool) -> Side:
    """As it is, or for the CPU."""
    return replace(side, length=side.length // SHORTER, size=1) if tiny else side


def write_base(directory: Path, *, shape: str, tiny: bool) -> None:
    """Random weights, and the quickstart's tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lorafit.planning.known_shapes import architecture
    from lorafit.recipe.sections import ModelSection

    config = architecture(ModelSection(model_name_or_path=shape))
    if tiny:
        config.update({"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16})
        config.update({"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 4096})
    tokenizer = AutoTokenizer.from_pretrained(BASE_TOKENIZER)
    config.update({name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")})
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def prepare(work: Path, *, shape: str, steps: int, tiny: bool) -> dict[str, Any]:
    """Base and rows; the device, and the operations that a token of each side takes."""
    from lorafit.planning.gpus import device_of
    from lorafit.preflight import this_machine

    machine = this_machine()
    if machine.device != "cuda" and not tiny:
        sys.exit("there is no GPU here; --tiny runs the same on the CPU")
    write_base(work / "base", shape=shape, tiny=tiny)
    write_rows(work / "rows.jsonl", count=80 * (steps + 2))
    write_rows(work / "long.jsonl", count=steps + 2, tokens=17_500 // (SHORTER if tiny else 1))
    return {
        "device": machine.name,
        "bf16_tflops": None if tiny else device_of(machine).bf16_tflops,
        "operations": {name: operations_of_a_token(work, sized(side, tiny=tiny)) for name, side in SIDES.items()},
    }


def with_trl(work: Path, side: Side, *, steps: int) -> dict[str, Any]:
    """As TRL's documentation writes it, with packing."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantised = {"quantization_config": BitsAndBytesConfig(**FOUR_BITS)} if side.in_4_bits else {}
    device_map = {"": 0} if torch.cuda.is_available() else None
    return train_with_trl(
        work / f"{side.rows}.jsonl",
        AutoModelForCausalLM.from_pretrained(work / "base", dtype=torch.bfloat16, device_map=device_map, **quantised),
        cache=work / "datasets",
        max_steps=steps,
        bf16=True,
        max_length=side.length,
        packing=True,
        per_device_train_batch_size=side.size,
    )


def with_lorafit(work: Path, side: Side, *, steps: int) -> dict[str, Any]:
    """The same as a recipe; what is not written here is lorafit's default."""
    from lorafit.launching import launch

    launch.use_expandable_segments()  # as every command of lorafit
    said: list[str] = []
    recipe = {
        "model": {"model_name_or_path": str(work / "base"), "dtype": "bfloat16"},
        **({"quantization": FOUR_BITS} if side.in_4_bits else {}),
        "data": {"train": [{"path": str(work / f"{side.rows}.jsonl")}]},
        "training": {
            "max_steps": steps,
            "max_length": side.length,
            "packing": True,
            "per_device_train_batch_size": side.size,
        },
        **({"speed": {side.off: False}} if side.off else {}),
    }
    with heard(said.append):
        found = train_with_lorafit(recipe, cache=work / "cache")
    return found | {"said": [line for line in said if line.startswith(("plan", "gradient", "fused", "varlen"))]}


def operations_of_a_token(work: Path, side: Side) -> float:
    """4 N + 4 H + 3.5 a + 6 P, with the lengths of this side's documents."""
    from transformers import AutoConfig, AutoTokenizer

    from lorafit.planning.targets import target_table

    config, tokenizer = AutoConfig.from_pretrained(work / "base"), AutoTokenizer.from_pretrained(work / "base")
    texts = [" ".join(json.loads(line).values()) for line in (work / f"{side.rows}.jsonl").read_text().splitlines()]
    lengths = [min(len(ids), side.length) for ids in tokenizer(texts)["input_ids"]]
    table = target_table(config, r=LORA["r"])
    frozen = sum(target.parameters for target in table.targets if target.all_linear or target.part == "head")
    # A token at place i of its document meets i others, twice: 4 x width operations for each.
    width = config.num_attention_heads * config.head_dim
    attention = config.num_hidden_layers * 2 * width * sum(n * n for n in lengths) / sum(lengths)
    return 4 * frozen + 3.5 * attention + 6 * table.all_linear().lora_parameters


def in_its_own_process(work: Path, *, side: str, chosen: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """One side (or `prepare`) in a fresh process; its error as text, for the others to go on."""
    out = work / "measured.json"
    out.unlink(missing_ok=True)
    settings = ["--shape", chosen.shape, "--steps", str(chosen.steps), *(["--tiny"] * chosen.tiny)]
    command = [sys.executable, __file__, "--side", side, "--work", str(work), *settings]
    try:
        output_of(command, environment={"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}, seconds=seconds)
    except NoAnswer as reason:
        return {"error": str(reason)}
    measured: dict[str, Any] = json.loads(out.read_text())
    return measured


def main() -> int:
    """The table; 1 where a side failed, 4 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama3-8b", help="a shipped shape of the Llama kind")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(MAIN_SIDES))
    parser.add_argument("--budget", type=float, default=BUDGET_SECONDS, help="seconds after which nothing goes on")
    parser.add_argument("--tiny", action="store_true", help="on the CPU")
    parser.add_argument("--out", type=Path, help="write the results here, as they come")
    parser.add_argument("--side", choices=(*SIDES, "prepare"), help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.side:
        (chosen.work / "measured.json").write_text(json.dumps(one_side(chosen)))
        return 0
    ends = time.monotonic() + chosen.budget
    end_by_exception()
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        about = in_its_own_process(work, side="prepare", chosen=chosen, seconds=chosen.budget)
        if "error" in about:
            print(about["error"], file=sys.stderr)
            return 4
        print(f"{'side':<24} {'tokens/s':>9} {'range':>17} {'MFU':>6} {'peak memory':>13}  beside", flush=True)
        rounds: dict[str, list[dict[str, Any]]] = {side: [] for side in chosen.sides}
        for side in chosen.rounds * list(chosen.sides):
            left = ends - time.monotonic()
            if left <= 0:
                print("the time is over")
                break
            longest = left if chosen.tiny else min(SIDE_SECONDS, left)  # a CPU may have other work
            found = in_its_own_process(work, side=side, chosen=chosen, seconds=longest)
            rounds[side].append(found)
            operations = about["operations"][side]
            print(line(side, row(side, rounds, operations=operations, peak=about["bf16_tflops"])), flush=True)
            if chosen.out:
                write_results(chosen, about, rounds)
    return int(any("error" in found for side in rounds.values() for found in side))


def one_side(chosen: argparse.Namespace) -> dict[str, Any]:
    """This process, as one side."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if chosen.side == "prepare":
        return prepare(chosen.work, shape=chosen.shape, steps=chosen.steps, tiny=chosen.tiny)
    side = sized(SIDES[chosen.side], tiny=chosen.tiny)
    return (with_trl if side.with_trl else with_lorafit)(chosen.work, side, steps=chosen.steps)


def write_results(chosen: argparse.Namespace, about: dict[str, Any], rounds: dict[str, list[dict[str, Any]]]) -> None:
    """What is known so far: a run that is killed keeps it."""
    settings = (
        f"--shape {chosen.shape} --rounds {chosen.rounds} --steps {chosen.steps} --sides {' '.join(chosen.sides)}"
    )
    command = f"python benchmarks/speed_gpu.py {settings}{' --tiny' * chosen.tiny}"
    sides = {
        side: row(side, rounds, operations=about["operations"][side], peak=about["bf16_tflops"])
        for side in chosen.sides
        if rounds[side]
    }
    report = made_with(command, device=about["device"]) | {"sides": sides}
    chosen.out.write_text(json.dumps(report, indent=2) + "\n")


def row(side: str, rounds: dict[str, list[dict[str, Any]]], *, operations: float, peak: float | None) -> dict[str, Any]:
    """Medians of the rounds, or the error."""
    found = rounds[side]
    if errors := [one["error"] for one in found if "error" in one]:
        return {"error": errors[0]}
    speeds = [one["tokens_per_second"] for one in found]
    speed = statistics.median(speeds)
    beside = BESIDE.get(side, "lorafit")
    pairs = [
        (one["tokens_per_second"], other["tokens_per_second"])
        for one, other in zip(found, rounds.get(beside, ()), strict=False)
        if "error" not in other
    ]
    return {
        "tokens_per_second": speed,
        "range": [min(speeds), max(speeds)],
        "mfu": speed * operations / (peak * 1e12) if peak else None,
        "peak_memory_bytes": max(one["peak_memory_bytes"] for one in found),
        "last_loss": found[0]["losses"][-1],
        "beside": beside,
        "share_of_it": statistics.median(one / other for one, other in pairs) if pairs else None,
        "said": "; ".join(found[0].get("said", ())),
    }


def line(side: str, found: dict[str, Any]) -> str:
    """One side."""
    if "error" in found:
        return f"{side:<24} {found['error']}"
    low, high = found["range"]
    mfu = f"{found['mfu']:.1%}" if found["mfu"] is not None else ""
    share = f"{found['share_of_it']:.2f} of {found['beside']}" if found["share_of_it"] is not None else ""
    memory = f"{found['peak_memory_bytes'] / 2**30:.2f} GiB"
    return (
        f"{side:<24} {found['tokens_per_second']:>9,.0f} {f'{low:,.0f}-{high:,.0f}':>17} {mfu:>6} {memory:>13}  {share}"
    )


if __name__ == "__main__":
    sys.exit(main())
