"""The README.md of an adapter: what was trained on what, what came of it, how to load it. No path of this machine."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from lorafit.recipe.recipe import Recipe
from lorafit.recipe.recipe_yaml import dump
from lorafit.tasks import TASKS, Figure
from lorafit.training.seen import rows_seen

CURVE_LENGTH = 40
SHOWN_EVALUATIONS = 12
BARS = "▁▂▃▄▅▆▇█"
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` takes: https://docs.vllm.ai/en/latest/api/vllm/config/lora/"""


def model_card(recipe: Recipe, *, facts: dict[str, Any], history: Sequence[dict[str, Any]]) -> str:
    """Markdown with the metadata block of the Hugging Face Hub.

    `facts` is what the manifest says, steps and tokens done included; `history` the lines of metrics.jsonl, the last
    evaluation being that of the adapter.
    """
    parts = (
        f"---\n{dump(_metadata(recipe))}---",
        f"# {_kind(recipe)} adapter of {_base(recipe)}",
        _summary(facts, history),
        "## How to load it",
        *_loading(recipe, facts),
        "## What was trained",
        _modules(facts),
        _base_files(facts["base"]),
        "## Data",
        *_data(recipe, facts),
        "## Result",
        *_result(history, TASKS[recipe.task].figure),
        "## Recipe",
        "Directories are left out of the paths.",
        f"```yaml\n{dump(_published(recipe))}```",
        "## Versions",
        _versions(facts),
    )
    return "\n\n".join(parts) + "\n"


def _metadata(recipe: Recipe) -> dict[str, Any]:
    task = TASKS[recipe.task]
    metadata: dict[str, Any] = {"library_name": "peft", "pipeline_tag": task.pipeline_tag}
    if _is_on_hub(recipe):
        metadata |= {"base_model": recipe.model.model_name_or_path, "base_model_relation": "adapter"}
    data_sets = list(dict.fromkeys(source.hub for source in recipe.data.train if source.hub))
    if data_sets:
        metadata["datasets"] = data_sets
    variants = {
        "qlora": recipe.quantization is not None and recipe.quantization.load_in_4bit,
        "dora": recipe.lora.use_dora,
        "rslora": recipe.lora.use_rslora,
        "adalora": recipe.adalora is not None,
    }
    used = [name for name, is_used in variants.items() if is_used]
    return metadata | {"tags": ["lora", *used, task.tag, "lorafit"]}


def _is_on_hub(recipe: Recipe) -> bool:
    return not Path(recipe.model.model_name_or_path).is_absolute()


def _base(recipe: Recipe) -> str:
    name = recipe.model.model_name_or_path
    return f"[{name}](https://huggingface.co/{name})" if _is_on_hub(recipe) else f"`{Path(name).name}`"


def _kind(recipe: Recipe) -> str:
    method = "AdaLoRA" if recipe.adalora else "DoRA" if recipe.lora.use_dora else "LoRA"
    if recipe.quantization is None:
        return method
    return "QLoRA" if method == "LoRA" and recipe.quantization.load_in_4bit else f"Quantised {method}"


def _summary(facts: dict[str, Any], history: Sequence[dict[str, Any]]) -> str:
    data, steps, planned = facts["data"]["train"], facts["steps"], facts["planned_steps"]
    early = f" of the {planned:,} planned" if steps < planned else ""
    seen = rows_seen(facts.get("epochs"), rows=data["rows"] - data["lost"])
    lines = [
        f"Trained with lorafit {facts['lorafit']} on {seen}:"
        f" {steps:,} steps{early}, {facts['tokens']:,} tokens, seed {facts['seed']}."
    ]
    if facts.get("adapter_step", steps) != steps:
        lines.append(f"This adapter is that of step {facts['adapter_step']:,}, the best on the held-out rows.")
    losses = _held_out(history)
    if losses:
        lines.append(f"Held-out loss: {losses[0][1]:.4f} before, **{losses[-1][1]:.4f}** after.")
    return "\n".join(lines)


def _loading(recipe: Recipe, facts: dict[str, Any]) -> Iterator[str]:
    base = recipe.model.model_name_or_path if _is_on_hub(recipe) else "path/to/the/base/model"
    keys = {"revision": facts["base"]["commit"]} if facts["base"]["commit"] else {}
    keys["dtype"] = recipe.model.dtype
    arguments = [_literal(base), *(f"{name}={_literal(value)}" for name, value in keys.items())]
    auto_class = TASKS[recipe.task].model.auto_class
    names = f"{auto_class}, AutoTokenizer"
    if recipe.model.trust_remote_code:
        arguments.append("trust_remote_code=True")
    if recipe.quantization is not None:
        names += ", BitsAndBytesConfig"
        settings = recipe.quantization.model_dump(mode="json", exclude={"extra"})
        if settings["bnb_4bit_compute_dtype"] == "auto":  # a type of lorafit's: the library wants one by name
            settings["bnb_4bit_compute_dtype"] = facts["compute_dtype"]
        used = ", ".join(f"{name}={_literal(value)}" for name, value in settings.items() if _is_used(name, settings))
        arguments.append(f"quantization_config=BitsAndBytesConfig({used})")
    listed = "".join(f"    {argument},\n" for argument in arguments)
    rows = _grown_rows(facts)
    grown = f"base.resize_token_embeddings({rows}, mean_resizing=False)\n" if rows else ""
    names += ", GenerationConfig" if recipe.data.stop_token else ""
    stops = 'model.generation_config = GenerationConfig.from_pretrained("path/to/this/adapter")\n'
    if added := facts.get("added_tokens"):
        ids = ", ".join(f"`{token}` ({id_})" for token, id_ in added.items())
        there = "The base grows for them before the adapter is loaded." if rows else "The base has rows for them."
        yield f"Tokens with trained rows of embedding and output head: {ids}. {there} For vLLM merge it first."
    if experts := _experts(facts):
        last = " and ".join(dict.fromkeys(f"`{name.rpartition('.')[2]}`" for name in experts))
        yield f"It adapts experts or their router ({last}): for vLLM merge it first."
    if recipe.data.stop_token:
        yield f"Answers end with `{recipe.data.stop_token}`, on which the base's own generation config does not stop."
    yield (
        "```python\n"
        "from peft import PeftModel\n"
        f"from transformers import {names}\n\n"
        f"base = {auto_class}.from_pretrained(\n{listed})\n{grown}"
        'model = PeftModel.from_pretrained(base, "path/to/this/adapter")\n'
        f"{stops if recipe.data.stop_token else ''}"
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/adapter")\n'
        "```"
    )
    if _is_on_hub(recipe) and _runs_in_vllm(recipe, facts):
        rank = next((rank for rank in VLLM_RANKS if rank >= max(module["r"] for module in facts["modules"])), None)
        if rank is not None:
            yield (
                "With vLLM:\n\n```sh\n"
                f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules tuned=path/to/this/adapter\n```"
            )


def _grown_rows(facts: dict[str, Any]) -> int | None:
    """Rows that the embedding needs with the added tokens; None where the base has them."""
    rows = 1 + max(facts.get("added_tokens", {}).values(), default=-1)
    return rows if rows > facts["base"].get("rows", rows) else None


def _is_used(key: str, settings: dict[str, Any]) -> bool:
    """Whether a setting of the quantisation says something about the bit width that is on."""
    other = ("load_in_4bit", "bnb_4bit_") if settings["load_in_8bit"] else ("load_in_8bit", "llm_int8_")
    return settings[key] is not None and not key.startswith(other)


def _literal(value: Any) -> str:
    """Python source of a value, strings in double quotes."""
    return json.dumps(value) if isinstance(value, str) else repr(value)


def _runs_in_vllm(recipe: Recipe, facts: dict[str, Any]) -> bool:
    """Plain LoRA of one rank and scale; the rest vLLM refuses, or serves without looking at it.

    https://docs.vllm.ai/en/latest/api/vllm/lora/peft_helper/; tensors of experts, which peft may take along unasked, it
    drops or misreads (vllm#41384, vllm#52198).
    """
    if len({(module["r"], module["scale"]) for module in facts["modules"]}) > 1 or _experts(facts):
        return False
    lora = recipe.lora
    more = (lora.use_dora, lora.modules_to_save, lora.trainable_token_indices, lora.target_parameters, lora.lora_bias)
    uneven = lora.rank_pattern or lora.alpha_pattern or lora.init_lora_weights in ("pissa", "olora", "corda", "eva")
    is_alone = lora.bias == "none" and recipe.adalora is None and not recipe.model.add_tokens
    return not any(more) and not uneven and is_alone


def _experts(facts: dict[str, Any]) -> list[str]:
    """The adapted parameters that are no module: experts, and the routers that choose among them."""
    return [module["name"] for module in facts["modules"] if module["kind"] in ("experts", "router")]


def _modules(facts: dict[str, Any]) -> str:
    groups: dict[tuple[str, int, float, float], list[int]] = {}
    for module in facts["modules"]:
        key = (module["name"].rpartition(".")[2], module["r"], module["alpha"], module["scale"])
        groups.setdefault(key, []).append(module["parameters"])
    rows = [
        (f"`{name}`", f"{len(sizes)}", f"{rank}", f"{alpha:g}", f"{scale:.3g}", f"{sum(sizes):,}")
        for (name, rank, alpha, scale), sizes in groups.items()
    ]
    total = sum(sum(sizes) for sizes in groups.values())
    rows.append(("all", f"{len(facts['modules'])}", "", "", "", f"{total:,}"))
    return _table(("module", "count", "r", "alpha", "scale", "parameters"), rows)


def _base_files(base: dict[str, Any]) -> str:
    commit = f"commit `{base['commit']}`, " if base["commit"] else ""
    return f"The base as it was trained on: {commit}{base['tensors']:,} tensors, fingerprint `{base['fingerprint']}`."


def _data(recipe: Recipe, facts: dict[str, Any]) -> Iterator[str]:
    counts = ("rows", "sequences", "tokens", "trained_tokens", "longest", "lost")
    sides = [("train", facts["data"]["train"]), ("held out", facts["data"]["eval"])]
    yield _table(
        ("", "rows", "sequences", "tokens", "trained tokens", "longest", "lost rows"),
        [(name, *(f"{side[count]:,}" for count in counts)) for name, side in sides if side],
    )
    section = recipe.data
    lines = [
        f"- {name}: {_source(source)}"
        for name, side in (("train", section.train), ("held out", section.eval))
        for source in side
    ]
    template = _without_directories(section.template)
    lines.append(
        f"- template `{template}`, trained on {section.train_on}; fingerprint `{facts['data']['fingerprint']}`"
    )
    if section.system == "merge":
        lines.append("- system texts stand at the start of the first user's message, a blank line after them")
    yield "\n".join(lines)


def _source(source: Any) -> str:
    if source.hub:
        return f"[{source.hub}](https://huggingface.co/datasets/{source.hub}), split {source.split}"
    return f"`{Path(source.path).name}`"


def _held_out(history: Sequence[dict[str, Any]]) -> list[tuple[int, float]]:
    """Step and held-out loss of every evaluation, in their order."""
    return [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]


def _result(history: Sequence[dict[str, Any]], figure: Figure) -> Iterator[str]:
    held_out = _held_out(history)
    if held_out:
        ends = {"before": held_out[0][1], "after": held_out[-1][1]}
        rows = [(name, f"{loss:.4f}", f"{figure.of_loss(loss):,.2f}") for name, loss in ends.items()]
        yield _table(("", "held-out loss", figure.name), rows)
        between = held_out[1:-1]
        if between:
            every = math.ceil(len(between) / SHOWN_EVALUATIONS)
            yield _table(("step", "held-out loss"), [(f"{step:,}", f"{loss:.4f}") for step, loss in between[::every]])
    losses = [entry["loss"] for entry in history if "loss" in entry and math.isfinite(entry["loss"])]
    yield f"Training loss from {losses[0]:.4f} to {losses[-1]:.4f}:\n\n    {sparkline(losses)}"


def sparkline(values: Sequence[float]) -> str:
    """At most 40 bars from the lowest to the highest value, each the mean of its share of `values`."""
    count = min(CURVE_LENGTH, len(values))
    edges = [round(index * len(values) / count) for index in range(count + 1)]
    means = [sum(values[start:end]) / (end - start) for start, end in pairwise(edges)]
    low, span = min(means), max(means) - min(means)
    return "".join(BARS[round((mean - low) / span * (len(BARS) - 1)) if span else 0] for mean in means)


def _published(recipe: Recipe) -> Any:
    """The recipe as it was written, with file names in place of paths."""
    return _without_directories(recipe.model_dump(mode="json", exclude_unset=True, exclude={"output_dir"}))


def _without_directories(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_directories(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_directories(entry) for entry in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value


def _versions(facts: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    processes = "1 process" if facts["world_size"] == 1 else f"{facts['world_size']} processes"
    precision = "bfloat16 autocast" if facts["bf16"] else "no bfloat16 autocast"
    software = f"lorafit {facts['lorafit']}, Python {facts['python']}, {versions}"
    return f"{software}; {facts['machine']}, {processes}, {precision}."


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, all columns but the first aligned right."""
    lines = [head, ("---", *("---:" for _ in head[1:])), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
