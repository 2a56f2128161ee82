"""Several adapters of one base into one plain adapter, by peft's `add_weighted_adapter`."""

from __future__ import annotations

import json
import math
import re
import shutil
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, LoraModel, PeftModel
from safetensors import safe_open

from lorafit.builders.library_config import load_config
from lorafit.builders.model_files import BaseModelFiles, is_on_hub
from lorafit.errors import AdapterError, ModelError, Problem, RecipeError
from lorafit.merging.adapted_model import HARMLESS_STARTS, outline, refuse_misfit
from lorafit.merging.adapter_files import CONFIG, WEIGHTS, Adapter, read_adapter
from lorafit.merging.held_out import HeldOutLoss, held_out_losses
from lorafit.merging.identity import refuse_wrong_base
from lorafit.merging.merge import read_base
from lorafit.merging.out_directory import out_directory, refuse_existing
from lorafit.merging.overlap import Overlap, overlaps
from lorafit.merging.settings_files import copy_tokenizer
from lorafit.storage.stage import move
from lorafit.tasks import TASKS

SAME_RANK = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
"""Methods that add A to A and B to B: approximations of the sum of the updates, for adapters of one rank."""
PRUNING = ("ties", "ties_svd", "dare_linear", "dare_ties", "dare_linear_svd", "magnitude_prune")
"""Methods that keep a share (`density`) of the entries."""
SVD = ("svd", "ties_svd", "dare_linear_svd")
"""Methods that work on the whole update and cut it to a rank again."""
METHODS = ("linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_ties", "dare_linear_svd", "magnitude_prune")
REPORT = "combine_report.json"
COMBINED = "combined"


@dataclass(frozen=True)
class CombineResult:
    """What a combination came to; the JSON of `lorafit combine`."""

    out: str
    method: str
    rank: int
    inputs: Mapping[str, float]
    """Adapter to weight."""
    cosine: float | None
    """Mean over modules that several inputs change; see `Overlap`."""
    sign_conflict: float | None
    off_the_sum: float
    """Of the module that is farthest off."""
    modules: tuple[Overlap, ...]
    losses: tuple[HeldOutLoss, ...]
    seconds: float


def weighted(text: str) -> tuple[Path, float]:
    """`RUN:0.7` or `RUN`, which weighs 1. Raises RecipeError."""
    path, colon, weight = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value == 0 or not path:
        raise RecipeError(
            f"{weight!r} is no weight: write a number that is not 0, as in {path or 'RUN'}:0.5", where=text
        )
    return Path(path), value


def combine(
    parts: Sequence[tuple[Path, float]],
    *,
    out: Path,
    method: str,
    density: float | None,
    rank: int | None,
    seed: int,
    base: str | None,
    with_losses: bool,
    cache_dir: Path | None,
) -> CombineResult:
    """Write the adapter Σ wᵢ · Aᵢ, as `method` understands the sum, to `out`.

    The base model's weights are read for the losses only. Raises RecipeError, AdapterError, ModelError, RunDirError.
    """
    started = time.monotonic()
    _refuse_options(parts, method=method, density=density, rank=rank)
    refuse_existing(out)
    inputs = {_short(path, parts): read_adapter(path, base=base) for path, _ in parts}
    weights = dict(zip(inputs, (weight for _, weight in parts), strict=True))
    base_files = _one_base(inputs)
    _refuse_adapters(inputs, base_files, method=method)
    needed = sum(adapter.total_bytes for adapter in inputs.values())
    with out_directory(out, needed=needed) as stage:
        model = _loaded(inputs, base_files)
        _settle_configs(model, inputs)
        new_rank = _add(model, weights, method=method, density=density, rank=rank, seed=seed)
        modules = tuple(overlaps(model, {f"input{i}": w for i, w in enumerate(weights.values())}, combined=COMBINED))
        first = next(iter(inputs.values()))
        _write(model, stage, first)
        del model
        losses: tuple[HeldOutLoss, ...] = ()
        if with_losses:
            losses = held_out_losses(inputs, base_files, combined=stage, cache_dir=cache_dir)
        result = CombineResult(
            out=str(out),
            method=method,
            rank=new_rank,
            inputs=weights,
            cosine=_mean(module.cosine for module in modules),
            sign_conflict=_mean(module.sign_conflict for module in modules),
            off_the_sum=max(module.off_the_sum for module in modules),
            modules=modules,
            losses=losses,
            seconds=round(time.monotonic() - started, 2),
        )
        report = {key: value for key, value in asdict(result).items() if key != "out"}
        (stage / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return result


def _refuse_options(
    parts: Sequence[tuple[Path, float]], *, method: str, density: float | None, rank: int | None
) -> None:
    problems = []
    if len(parts) < 2:
        problems.append(Problem("combine", "takes two adapters or more, as in `lorafit combine A:0.7 B:0.3`"))
    if len({path.resolve() for path, _ in parts}) < len(parts):
        problems.append(Problem("combine", "an adapter is named twice: name it once, with the sum of its weights"))
    if method not in METHODS:
        problems.append(Problem("--method", f"{method!r} is none of {', '.join(METHODS)}"))
    if method in PRUNING and (density is None or not 0 < density <= 1):
        problems.append(Problem("--density", f"{method} keeps a share of the entries: write one in (0, 1], as in 0.5"))
    if method not in PRUNING and density is not None:
        problems.append(Problem("--density", f"{method} keeps all entries: leave it out, or use {', '.join(PRUNING)}"))
    if rank is not None and (method not in SVD or rank < 1):
        problems.append(Problem("--rank", f"only {', '.join(SVD)} choose a rank of 1 or more: leave it out"))
    if problems:
        raise RecipeError(problems)


def _short(path: Path, parts: Sequence[tuple[Path, float]]) -> str:
    """The last part of a path where it tells the inputs apart."""
    names = [other.resolve().name for other, _ in parts]
    return path.resolve().name if names.count(path.resolve().name) == 1 else str(path)


def _one_base(inputs: Mapping[str, Adapter]) -> BaseModelFiles:
    """The base of all; each input is held against its own first. Raises ModelError where they differ."""
    files: dict[str, BaseModelFiles] = {}
    for name, adapter in inputs.items():
        files[name] = read_base(adapter)
        refuse_wrong_base(adapter, files[name])
    first, *others = files
    for other in others:
        if (
            files[other].directory != files[first].directory
            and files[other].fingerprint() != files[first].fingerprint()
        ):
            raise ModelError(
                f"{first} was trained on {files[first].name}, {other} on {files[other].name}: adapters of two bases "
                "have no sum",
                where="combine",
            )
    return files[first]


def _refuse_adapters(inputs: Mapping[str, Adapter], base_files: BaseModelFiles, *, method: str) -> None:
    """What `add_weighted_adapter` refuses, or it or peft's loading would leave out without a word."""
    problems = [
        Problem(str(adapter.directory), f"{what}, which cannot be combined with another adapter's: train it without")
        for adapter in inputs.values()
        for what in [*_beyond_factors(adapter.config)] or _whole_weights(adapter, base_files)
    ]
    ranks = {name: _ranks(adapter) for name, adapter in inputs.items()}
    if method in SAME_RANK and len(set().union(*ranks.values())) > 1:
        told = ", ".join(f"{name} has {' and '.join(map(str, sorted(of)))}" for name, of in ranks.items())
        problems.append(
            Problem("--method", f"{method} needs one rank in all modules ({told}): use cat, {', '.join(SVD)}")
        )
    if problems:
        raise AdapterError(problems)
    for adapter in inputs.values():
        refuse_misfit(adapter, base_files)


def _whole_weights(adapter: Adapter, base_files: BaseModelFiles) -> Iterable[str]:
    """Weights of the base in the adapter's file, as of a vocabulary that grew; what peft saved unchanged is none."""
    for name, tensor in adapter.tensors.items():
        own = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        there = base_files.tensors.get(own)
        if "lora_" in name or (there is not None and _is_same(adapter.weights, name, base_files, own)):
            continue
        shape = " x ".join(map(str, tensor.shape))
        grown = f" where the base has {there.shape[0]} rows" if there and there.shape != tensor.shape else ""
        yield f"has a whole weight of the base, {own} ({shape}{grown})"


def _is_same(weights: Path, name: str, base_files: BaseModelFiles, own: str) -> bool:
    path = base_files.directory / base_files.tensors[own].file
    with safe_open(weights, framework="pt") as one, safe_open(path, framework="pt") as other:
        ours, theirs = one.get_tensor(name), other.get_tensor(own)
    return ours.shape == theirs.shape and torch.equal(ours, theirs.to(ours.dtype))


def _beyond_factors(config: Mapping[str, Any]) -> Iterable[str]:
    named = {
        "use_dora": "has DoRA's magnitudes",
        "lora_bias": "has bias vectors (lora_bias)",
        "modules_to_save": "has whole trained modules (modules_to_save)",
        "trainable_token_indices": "has trained tokens",
        "layer_replication": "repeats layers of the base (layer_replication)",
        "target_parameters": "adapts parameters of experts (target_parameters)",
    }
    yield from (what for key, what in named.items() if config.get(key))
    if config.get("bias", "none") != "none":
        yield "has trained biases of the base"
    if config["peft_type"] != "LORA":
        yield f"is of peft_type {config['peft_type']}"
    if config.get("init_lora_weights", True) not in HARMLESS_STARTS:
        yield f"changes its base when it is loaded (init_lora_weights {config['init_lora_weights']})"
    if config.get("task_type") not in (None, *(task.model.peft_type for task in TASKS.values())):
        yield f"is for the task {config['task_type']}"


_FACTOR_A = re.compile(r"\.lora_(A|embedding_A)(\.weight)?$")


def _ranks(adapter: Adapter) -> set[int]:
    return {tensor.shape[0] for name, tensor in adapter.tensors.items() if _FACTOR_A.search(name)}


def _loaded(inputs: Mapping[str, Adapter], base_files: BaseModelFiles) -> PeftModel:
    """All adapters on the base in outline, whose weights take no memory: nothing reads them."""
    adapters = list(inputs.values())
    model = outline(adapters[0], load_config(adapters[0].base, directory=base_files.directory))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")  # nothing is merged here
        peft_model = PeftModel.from_pretrained(
            model, str(adapters[0].directory), adapter_name="input0", torch_device="cpu", low_cpu_mem_usage=True
        )
        for index, adapter in enumerate(adapters[1:], start=1):
            peft_model.load_adapter(
                str(adapter.directory), adapter_name=f"input{index}", torch_device="cpu", low_cpu_mem_usage=True
            )
    return peft_model


def _settle_configs(model: PeftModel, inputs: Mapping[str, Adapter]) -> None:
    """What the new adapter takes over from the first must hold for it.

    It is given alpha = rank, a scale of 1, which with use_rslora would be sqrt(rank); and layers or modules that the
    first leaves out would be left out of it.
    """
    configs = [cast(LoraConfig, model.peft_config[f"input{index}"]) for index in range(len(inputs))]
    keys = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    alike = all(getattr(config, key) == getattr(configs[0], key) for config in configs for key in keys)
    for config, adapter in zip(configs, inputs.values(), strict=True):
        config.use_rslora = False
        config.init_lora_weights = True
        if not alike:
            config.target_modules = {  # type: ignore[assignment]  # peft itself keeps a set
                _FACTOR_A.sub("", name).removeprefix("base_model.model.")
                for name in adapter.tensors
                if _FACTOR_A.search(name)
            }
            config.exclude_modules = config.layers_to_transform = config.layers_pattern = None


def _add(
    model: PeftModel,
    weights: Mapping[str, float],
    *,
    method: str,
    density: float | None,
    rank: int | None,
    seed: int,
) -> int:
    """The rank of the new adapter."""
    torch.manual_seed(seed)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
            cast(LoraModel, model.base_model).add_weighted_adapter(
                [f"input{index}" for index in range(len(weights))],
                list(weights.values()),
                COMBINED,
                combination_type=cast(Any, method),  # one of METHODS
                svd_rank=rank,
                svd_full_matrices=False,  # the columns past the rank are thrown away
                density=density,
            )
    except ValueError as error:
        raise AdapterError(f"peft cannot combine these: {error}", where="combine") from error
    new = int(cast(LoraConfig, model.peft_config[COMBINED]).r)
    factors = {name: p for name, p in model.named_parameters() if ".lora_" in name and COMBINED in name}
    broken = [name for name, factor in factors.items() if not torch.isfinite(factor).all()]
    narrow = [name for name, factor in factors.items() if new not in factor.shape]
    if broken:
        raise AdapterError(f"{method} gives numbers that are not finite ({broken[0]})", where="combine")
    if narrow:
        smallest = min(min(factors[name].shape) for name in narrow)
        raise AdapterError(f"rank {new} is more than {narrow[0]} can have: write --rank {smallest}", where="combine")
    return new


def _write(model: PeftModel, stage: Path, first: Adapter) -> None:
    """The new adapter alone, with the tokenizer of the first input, which training saw the text through."""
    model.save_pretrained(str(stage), selected_adapters=[COMBINED], save_embedding_layers=False)
    for name in (CONFIG, WEIGHTS):
        move(stage / COMBINED / name, stage / name)
    shutil.rmtree(stage / COMBINED)
    (stage / "README.md").unlink(missing_ok=True)
    config = json.loads((stage / CONFIG).read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = first.base.model_name_or_path if is_on_hub(first.base) else None
    config["revision"] = first.base.revision if is_on_hub(first.base) else None
    if isinstance(config["target_modules"], list):
        config["target_modules"] = sorted(config["target_modules"])
    (stage / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    shutil.copyfile(stage / WEIGHTS, stage / "copy")  # safetensors lets nobody but the owner read its files
    move(stage / "copy", stage / WEIGHTS)
    copy_tokenizer(first.directory, stage)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
