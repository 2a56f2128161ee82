"""Which base an adapter of a quantised model is merged into: the 16-bit original, or what its 4 bits stand for.

The adapter was trained against the dequantised weights, and made up for their error; into the original it brings that
back. Neither is always better on unseen rows, so both are measured against the quantised model as it runs.
"""

from __future__ import annotations

import gc
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from lorafit.builders.base_model import load_base_model
from lorafit.builders.model_files import BaseModelFiles, read_config
from lorafit.builders.weight_files import tensor_table
from lorafit.errors import AdapterError, MachineError
from lorafit.launching.child import Child
from lorafit.merging.adapter_files import Adapter
from lorafit.merging.child_answer import child_answer
from lorafit.merging.verification_prompts import Prompts
from lorafit.merging.verify import verification_job
from lorafit.merging.verify_job import TYPES
from lorafit.recipe.sections import MergeSection, QuantizationSection

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BaseDifference:
    """Of the merge into one base, from the quantised model with the adapter as it runs."""

    onto: str
    mean_kl: float
    """KL(quantised ‖ merged) in nats, mean over positions: what `auto` decides by."""
    max_abs_logit_difference: float
    top1_agreement: float

    def __str__(self) -> str:
        return (
            f"onto the {self.onto} base: mean KL {self.mean_kl:.3g} from the quantised model, largest logit difference "
            f"{self.max_abs_logit_difference:.3g}, same next token {self.top1_agreement:.1%}"
        )


def wanted_base(adapter: Adapter, section: MergeSection) -> str:
    """What the run's recipe says of the base to merge into; `auto` is a choice only after a quantised run."""
    is_quantized = adapter.recipe is not None and adapter.recipe.recipe.quantization is not None
    return "original" if section.base == "auto" and not is_quantized else section.base


def quantization_of(adapter: Adapter, onto: str) -> QuantizationSection | None:
    """What the base was quantised with in training; None where it was not.

    Raises AdapterError when another base than the original is asked for and there is none.
    """
    quantization = None if adapter.recipe is None else adapter.recipe.recipe.quantization
    if quantization is None and onto != "original":
        why = "carries no recipe" if adapter.recipe is None else "was trained on a base that was not quantised"
        message = f"{why}, so there is nothing to dequantise: merge it with --onto original"
        raise AdapterError(message, where=str(adapter.directory))
    return quantization


def write_dequantized(adapter: Adapter, base_files: BaseModelFiles, directory: Path) -> BaseModelFiles:
    """The base with the values its quantised weights stand for, in the type the others have, in `directory`.

    By the libraries themselves, so that it is what training saw: the model is in memory for that, once.
    """
    quantization = quantization_of(adapter, "dequantized")
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it says of each model in which type it is dequantised
    try:
        _dequantize(adapter, quantization, directory, dtype=_stored_type(adapter, base_files))
    finally:
        transformers_logging.set_verbosity(verbosity)
        gc.collect()
        torch.cuda.empty_cache()  # the processes that verify need the GPU to themselves
    return replace(base_files, directory=directory, config=read_config(directory), tensors=tensor_table(directory))


def _dequantize(adapter: Adapter, quantization: QuantizationSection | None, directory: Path, *, dtype: str) -> None:
    """On the GPU where there is room for both kinds of weights, else on the CPU, where bitsandbytes works, too."""
    for device in ("cuda", None) if torch.cuda.is_available() else (None,):
        try:
            model = load_base_model(adapter.base, quantization, dtype=dtype, device_map=device).dequantize()
        except (torch.OutOfMemoryError, MachineError):
            if device is None:
                raise
            continue
        model.save_pretrained(directory)
        return


def _stored_type(adapter: Adapter, base_files: BaseModelFiles) -> str:
    """What `auto` is on disk, whatever this machine would compute in."""
    kinds = Counter(TYPES[tensor.dtype] for tensor in base_files.tensors.values() if tensor.dtype in TYPES)
    return kinds.most_common(1)[0][0] if _type(adapter) == "auto" else _type(adapter)


def _type(adapter: Adapter) -> str:
    return "auto" if adapter.recipe is None else adapter.recipe.recipe.model.dtype


def compare_bases(
    adapter: Adapter,
    bases: Mapping[str, BaseModelFiles],
    *,
    dtype: str | None,
    prompts: Prompts,
    work: Path,
) -> tuple[BaseDifference, ...]:
    """Merge into each base in memory, in a process of its own, and hold it against the quantised model as it runs."""
    quantization = quantization_of(adapter, "auto")
    jobs = {
        onto: verification_job(work, adapter=adapter, base_files=files, dtype=dtype, prompts=prompts, work=work)
        for onto, files in bases.items()
    }
    child = Child("lorafit.merging.compare_bases:compare", adapter.base, quantization, _type(adapter), jobs)
    found = child_answer(child, what="the two bases cannot be compared", where=adapter.directory)
    return tuple(BaseDifference(onto, one.kl, one.largest, one.top1) for onto, one in found.items())


def settle_base(
    adapter: Adapter,
    original: BaseModelFiles,
    *,
    onto: str,
    dtype: str | None,
    prompts: Prompts | None,
    directory: Path,
) -> tuple[tuple[BaseDifference, ...], str, BaseModelFiles]:
    """What was measured, which base was settled on, and its files; the dequantised ones lie in `directory`.

    Without `prompts` nothing is measured, and `onto` is taken as it is.
    """
    logger.info("merge: dequantises the base, as training saw it")
    files = {"original": original, "dequantized": write_dequantized(adapter, original, directory)}
    if prompts is None:
        return (), onto, files[onto]
    bases = compare_bases(adapter, files, dtype=dtype, prompts=prompts, work=directory)
    for base in bases:
        logger.info(f"merge: {base}")
    nearer = min(bases, key=lambda base: base.mean_kl).onto
    if onto == "auto":
        logger.info(f"merge: onto the {nearer} base, which is nearer")
        onto = nearer
    elif nearer != onto:
        logger.info(f"advice: the {nearer} base is nearer to the model that was trained: --onto {nearer}, or auto")
    return bases, onto, files[onto]
