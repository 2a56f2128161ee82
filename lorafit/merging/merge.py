"""One merge, top to bottom: check, plan, write beside the target, verify, put in place."""

from __future__ import annotations

import logging
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.builders.architectures import model_type_problems
from lorafit.builders.base_model import commit_of, whole_tensors
from lorafit.builders.library_config import load_config
from lorafit.builders.model_files import (
    BaseModelFiles,
    config_problems,
    model_directory,
    read_config,
    stop_token_ids,
)
from lorafit.errors import ModelError, Problem, RecipeError
from lorafit.merging.adapter_files import Adapter, read_adapter, refuse_moved_base
from lorafit.merging.identity import refuse_wrong_base
from lorafit.merging.merge_plan import plan_merge
from lorafit.merging.out_directory import out_directory, refuse_existing
from lorafit.merging.peft_merge import merge_with_peft
from lorafit.merging.processes import Processes
from lorafit.merging.quantized_base import (
    BaseDifference,
    quantization_of,
    settle_base,
    wanted_base,
)
from lorafit.merging.settings_files import write_settings
from lorafit.merging.verification_prompts import prompts_meanwhile
from lorafit.merging.verify import verification_device
from lorafit.merging.verify import verify as verify_merged
from lorafit.merging.write_weights import Progress, write_merged
from lorafit.recipe.sections import MergeSection

logger = logging.getLogger(__name__)

DEQUANTIZED = "dequantized"
"""Where a dequantised base lies in the stage for as long as it is needed."""
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class MergeResult:
    """What one merge came to; the JSON of `lorafit merge`."""

    out: str
    max_abs_logit_difference: float | None
    """Between the merged model, read back from disk, and base + adapter; None when it was not verified."""
    top1_agreement: float | None
    """Share of positions at which both predict the same next token."""
    delta_retained: float | None
    """Share of the update that is left after rounding to the type of the file."""
    streamed: bool
    """False when peft had to merge it in memory."""
    onto: str
    """`original`, or `dequantized`: the weights that training on a quantised base saw."""
    bases: tuple[BaseDifference, ...]
    """How far the merge into each is from the quantised model as it runs; empty where that was not measured."""
    seconds: float


def merge(
    run_or_adapter: Path,
    *,
    out: Path | None,
    dtype: str | None,
    max_shard_size: str | None,
    base: str | None,
    onto: str | None,
    verify: bool | None,
    progress: Callable[[int], Progress],
    cache_dir: Path | None,
    processes: Processes | None = None,
) -> MergeResult:
    """Merge the adapter of a run, or a plain PEFT adapter, into its base: a model that plain transformers loads.

    None for `dtype`, `onto` and `verify` is what the run's recipe says. `progress` is given the number of bytes to
    come, and takes the bytes that were written. `processes` were begun before this module was imported, and
    have ended when this returns. Raises AdapterError, ModelError and RunDirError before anything is
    written; VerificationError and DiskError leave nothing behind.
    """
    started = time.monotonic()
    target = (run_or_adapter / "merged") if out is None else out
    refuse_existing(target)
    shard_bytes = None if max_shard_size is None else bytes_of(max_shard_size)
    adapter = read_adapter(run_or_adapter, base=base)
    base_files = original = read_base(adapter)
    wanted = MergeSection() if adapter.recipe is None else adapter.recipe.recipe.merge
    dtype, onto = dtype or wanted.dtype, onto or wanted_base(adapter, wanted)
    verify = wanted.verify if verify is None else verify
    quantization = quantization_of(adapter, onto)
    refuse_wrong_base(adapter, base_files)
    if verify:
        verification_device(base_files)  # refused before anything is written
    compares = quantization is not None and (verify or onto == "auto")
    if verify or compares:
        process = None if processes is None else processes.prompts
        with prompts_meanwhile(adapter, original, cache_dir=cache_dir, process=process) as chosen:
            plan = plan_merge(adapter, base_files, dtype=dtype, max_shard_size=shard_bytes)
            prompts = chosen()
    else:
        plan, prompts = plan_merge(adapter, base_files, dtype=dtype, max_shard_size=shard_bytes), None
    makes_base = compares or onto == "dequantized"
    with out_directory(target, needed=plan.total_bytes + makes_base * base_files.total_bytes) as stage:
        bases: tuple[BaseDifference, ...] = ()
        if makes_base:
            bases, onto, base_files = settle_base(
                adapter,
                original,
                onto=onto,
                dtype=dtype,
                prompts=prompts if compares else None,
                directory=stage / DEQUANTIZED,
            )
            plan = plan_merge(adapter, base_files, dtype=dtype, max_shard_size=shard_bytes)
        if plan.peft_reason is None:
            logger.info(f"merge: {plan.changed} weights change, {plan.total_bytes:,} bytes in {len(plan.shards)} files")
            write_merged(plan, stage, progress=progress(plan.total_bytes))
        else:
            logger.info(f"merge: by peft, with the whole model in memory: {plan.peft_reason}")
            merge_with_peft(adapter, base_files, stage, dtype=dtype, max_shard_size=shard_bytes)
        write_settings(
            stage, adapter=adapter, base_files=original, config=plan.config, dtype=dtype or "the base's type"
        )
        report = None
        if prompts is not None and verify:
            logger.info(f"verify: reads the merged model back and compares it with base + adapter on {prompts.source}")
            report = verify_merged(
                stage,
                adapter=adapter,
                base_files=base_files,
                onto=onto,
                dtype=dtype,
                prompts=prompts,
                processes=processes,
            )
            if report.advice is not None:
                logger.info(f"advice: {report.advice}")
        shutil.rmtree(stage / DEQUANTIZED, ignore_errors=True)
    return MergeResult(
        out=str(target),
        max_abs_logit_difference=None if report is None else report.max_abs_logit_difference,
        top1_agreement=None if report is None else report.top1_agreement,
        delta_retained=None if report is None else report.delta_retained,
        streamed=plan.peft_reason is None,
        onto=onto,
        bases=bases,
        seconds=round(time.monotonic() - started, 2),
    )


def read_base(adapter: Adapter) -> BaseModelFiles:
    """The files of the adapter's base, looked at before a weight is read: any task, unlike for training.

    Raises ModelError with every problem found.
    """
    refuse_moved_base(adapter)
    section = adapter.base
    directory = model_directory(section)
    config = read_config(directory)
    problems = [
        *model_type_problems(directory, config=config, section=section),
        *config_problems(directory, config=config, section=section),
        *_quantized(directory, config),
    ]
    if problems:
        raise ModelError(problems)
    tensors = whole_tensors(section, directory=directory, config=config)
    rows = load_config(section, directory=directory).get_text_config().vocab_size
    return BaseModelFiles(
        name=section.model_name_or_path,
        directory=directory,
        revision=commit_of(section, directory=directory),
        config=config,
        tensors=tensors,
        stop_token_ids=stop_token_ids(directory, config=config),
        vocab_size=max(rows, adapter.rows_needed),
    )


def _quantized(directory: Path, config: Mapping[str, Any]) -> Iterator[Problem]:
    if "quantization_config" in config:
        yield Problem(
            str(directory / "config.json"),
            "is a quantised checkpoint; a merge goes onto 16-bit weights: name the model it was made from with --base",
        )


def bytes_of(size: str) -> int:
    """`5GB` -> 5,000,000,000. Raises RecipeError for what is no size."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?B?|[KMG]iB)\s*", size, flags=re.IGNORECASE)
    unit = found[2].upper() if found else ""
    unit = unit if unit.endswith("B") or not unit else f"{unit}B"
    count = int(float(found[1]) * UNITS["" if unit == "B" else unit]) if found else 0
    if count < 1:
        raise RecipeError(f"{size!r} is no size: write a number and KB, MB or GB, as in 5GB", where="--max-shard-size")
    return count
