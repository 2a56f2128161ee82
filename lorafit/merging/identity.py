"""Is this the base model the adapter was trained on, and the adapter that training left?"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from safetensors import safe_open

from lorafit.builders.model_files import BaseModelFiles
from lorafit.errors import AdapterError, ModelError, Problem
from lorafit.merging.adapter_files import CONFIG, WEIGHTS, Adapter
from lorafit.storage.files import read_regular, sha256_of
from lorafit.storage.json_text import parsed

logger = logging.getLogger(__name__)

REPORT = "merge_report.json"
"""What a merge leaves beside the model it made; by it a merged model is known."""

_FACTORS = re.compile(r"\.lora_(A|B|E|embedding_A|embedding_B)(\.|$)")


def refuse_wrong_base(adapter: Adapter, base_files: BaseModelFiles, *, may_be_zero: bool = False) -> None:
    """Refuse a base other than the one of training, and an adapter that is not as training left it.

    A run knows both by hash. A plain PEFT adapter knows neither: what could not be checked is said, and what its own
    files and the base's show is refused all the same, but for an update of zero where it `may_be_zero`. Raises
    AdapterError and ModelError.
    """
    manifest = _manifest(adapter)
    problems: list[Problem] = []
    if "adapter" in manifest:
        problems += _edited_since(adapter, manifest["adapter"])
    if not problems:
        problems += _broken_tensors(adapter, may_be_zero=may_be_zero)
    if problems:
        raise AdapterError(problems)
    if "base" in manifest:
        _refuse_other_base(manifest["base"], base_files, where=str(base_files.directory))
    else:
        _refuse_merged_already(adapter, base_files)
        _refuse_other_depth(adapter, base_files)
    if unchecked := [key for key in ("base", "adapter") if key not in manifest]:
        said = {
            "base": f"whether {base_files.name} is the base it was trained on, in that revision",
            "adapter": "whether it was edited since",
        }
        missing = ", and ".join(said[key] for key in unchecked)
        logger.warning(f"{adapter.directory}: carries no record of its training; not checked: {missing}")


def _manifest(adapter: Adapter) -> Mapping[str, Any]:
    """What the run recorded; empty for a plain adapter."""
    if adapter.run_dir is None:
        return {}
    path = adapter.run_dir.manifest
    try:
        manifest = json.loads(read_regular(path))
        if not isinstance(manifest, dict):
            raise ValueError("it is no object")
    except (OSError, ValueError, RecursionError) as error:
        message = f"cannot be read ({error}): copy the run again, or merge {adapter.directory} as a plain adapter"
        raise AdapterError(message, where=str(path)) from None
    return manifest


def _edited_since(adapter: Adapter, hashes: Mapping[str, str]) -> Iterator[Problem]:
    """By the hashes of training. Only what makes the model: tokenizer and model card may have been improved since."""
    for name in (CONFIG, WEIGHTS):
        path = adapter.directory / name
        if hashes.get(name) != sha256_of(path):
            yield Problem(
                str(path), "was changed after training (its hash is not the one in manifest.json): restore it"
            )


def _broken_tensors(adapter: Adapter, *, may_be_zero: bool) -> Iterator[Problem]:
    """What no adapter can mean: tensors that are empty or not finite, and an update of zero."""
    where = str(adapter.weights)
    if not adapter.tensors:
        yield Problem(where, "holds no tensors: copy the whole adapter again")
        return
    empty, broken = [], []
    is_zero: dict[str, bool] = {}
    """Of each kind of tensor, whether all of them are zero; a product with one zero factor is zero."""
    with safe_open(adapter.weights, framework="pt") as file:
        for name in adapter.tensors:
            tensor = file.get_tensor(name)
            kind = match[1].removeprefix("embedding_") if (match := _FACTORS.search(name)) else "other"
            is_zero[kind] = is_zero.get(kind, True) and not bool(tensor.any())
            if tensor.numel() == 0:
                empty.append(name)
            elif not torch.isfinite(tensor).all():
                broken.append(name)
    if empty:
        yield Problem(where, f"holds empty tensors ({_some(empty)}): it was saved in part; train or copy it again")
    if broken:
        yield Problem(where, f"holds NaN or infinity in {_some(broken)}: training went wrong, train again")
    no_update = any(is_zero.get(factor, False) for factor in "ABE")
    if not may_be_zero and not empty and not broken and no_update and is_zero.get("other", True):
        yield Problem(where, "is all zero: it changes nothing, nothing was learned or saved")


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _refuse_other_base(trained_on: Mapping[str, Any], base_files: BaseModelFiles, *, where: str) -> None:
    """By the fingerprint of training; the rest only says in what the two differ."""
    if base_files.fingerprint() == trained_on["fingerprint"]:
        return
    if (base_files.directory / REPORT).is_file():
        message = "is a model that an adapter was merged into already"
    elif len(base_files.tensors) != trained_on["tensors"]:
        count = trained_on["tensors"]
        message = f"has {len(base_files.tensors)} tensors, the base of training {count}: layers more or fewer"
    elif None not in (trained_on["commit"], base_files.revision) and trained_on["commit"] != base_files.revision:
        message = f"is at commit {base_files.revision}, the adapter was trained on {trained_on['commit']}"
    else:
        message = "is not the base of training: its weights or its config.json differ"
    name = trained_on["name"]
    commit = f" at {trained_on['commit']}" if trained_on["commit"] else ""
    mend = f"{name}{commit}" if name else "the directory that the recipe named, as it was then"
    raise ModelError(f"{message}; use {mend}", where=where)


def _refuse_merged_already(adapter: Adapter, base_files: BaseModelFiles) -> None:
    """Merging twice adds the update twice. Another adapter on a merged model may well have been trained on that."""
    report = base_files.directory / REPORT
    try:
        merged = parsed(report.read_text(encoding="utf-8")).get("adapter_sha256") if report.is_file() else None
    except (ValueError, AttributeError):
        return
    if merged == sha256_of(adapter.weights):
        message = "this adapter is merged into it already; merge into the base it was trained on"
        raise ModelError(message, where=str(base_files.directory))


def _refuse_other_depth(adapter: Adapter, base_files: BaseModelFiles) -> None:
    """An adapter reaches every layer that has its modules, but where its settings choose some.

    Looks at modules that are called on disk what they are called in memory; experts and the like are left out.
    """
    if adapter.config.get("layer_replication"):  # its layers are more than the base's
        return
    reached, there = _layers_by_module(adapter.tensors, _ADAPTED), _layers_by_module(base_files.tensors, _WEIGHT)
    where = str(adapter.directory)
    for module in sorted(reached.keys() & there.keys()):
        if beyond := reached[module] - there[module]:
            message = f"adapts {module} in layer {max(beyond)}, which {base_files.name} does not have"
            raise AdapterError(f"{message}: it was trained on another base", where=where)
    targets = adapter.config.get("target_modules")
    # An expression, exclude_modules or a whole name may leave layers out.
    if not isinstance(targets, list) or any(re.search(r"\.\d+\.", target) for target in targets):
        return
    if adapter.config.get("layers_to_transform") is not None or adapter.config.get("exclude_modules"):
        return
    for module in sorted(reached.keys() & there.keys()):
        if lacking := there[module] - reached[module]:
            message = f"has no tensors for {module} in layer {min(lacking)} of {base_files.name}"
            raise AdapterError(f"{message}: it was trained on another base, or is not whole", where=where)
    modules = {_ADAPTED.sub("", name) for name in adapter.tensors if _ADAPTED.search(name)}
    base_modules = {name.rpartition(".")[0] for name in base_files.tensors}
    for target in targets:
        if any(f".{module}".endswith(f".{target}") for module in modules):
            continue
        if not any(f".{module}".endswith(f".{target}") for module in base_modules):
            # A list for several architectures. What this one calls otherwise in memory is missed when peft attaches it.
            logger.info(
                f"note: {adapter.directory}: names {target!r} in target_modules, which {base_files.name} does not have"
            )
        else:
            message = f"names {target!r} in target_modules and has no tensors for it: copy the whole adapter again"
            raise AdapterError(message, where=str(adapter.directory / CONFIG))


_ADAPTED = re.compile(r"\.lora_(A|embedding_A)(\.weight)?$")
_WEIGHT = re.compile(r"\.weight$")


def _layers_by_module(names: Iterable[str], ending: re.Pattern[str]) -> dict[str, set[int]]:
    """`self_attn.q_proj` to the layers that have it, of the tensors whose names end so."""
    layers: dict[str, set[int]] = {}
    for name in names:
        if ending.search(name) and (match := re.search(r"\.(\d+)\.(.+)$", ending.sub("", name))):
            layers.setdefault(match[2], set()).add(int(match[1]))
    return layers
