"""`model` section in, base model out."""

from __future__ import annotations

import difflib
import inspect
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from lorafit.builders.added_tokens import added_tokens
from lorafit.builders.architectures import model_type_problems, task_problems
from lorafit.builders.auto_class import auto_class
from lorafit.builders.bnb_config import bnb_config
from lorafit.builders.library_config import CONFIG_ERRORS, load_config, one_line
from lorafit.builders.model_files import (
    AddedTokens,
    BaseModelFiles,
    config_problems,
    fetch_weights,
    is_on_hub,
    model_directory,
    quantization_problems,
    read_config,
    stop_problems,
    stop_token_ids,
    weight_problems,
)
from lorafit.builders.model_modules import modules_of, weight_of
from lorafit.builders.new_rows import begin_rows
from lorafit.builders.tokenizer_files import read_tokenizer
from lorafit.builders.weight_files import FLOATS, TensorInfo, tensor_table
from lorafit.errors import MachineError, ModelError, Problem
from lorafit.precision import base_dtype, compute_dtype
from lorafit.recipe.sections import ModelSection, QuantizationSection
from lorafit.tasks import DEFAULT_TASK, Task

logger = logging.getLogger(__name__)

OUT_OF_MEMORY = (
    "set quantization.load_in_4bit: true, train on more GPUs (launch.strategy: fsdp2), or name a smaller model"
)

OUT_OF_MEMORY_WORDS = re.compile(
    r"out of memory|OutOfMemoryError|can(no|')t allocate memory|not enough memory|CUBLAS_STATUS_ALLOC_FAILED", re.I
)
"""As the allocators of torch, the CUDA driver, cuBLAS and the system call put it, inside a plain RuntimeError."""

WHERE_FILES_LIE = frozenset({"cache_dir", "local_files_only", "subfolder"})
"""Arguments used up in finding the model's directory."""
EXTRA_KEYS = WHERE_FILES_LIE | {
    *("code_revision", "disable_mmap", "experts_implementation", "key_mapping", "max_memory"),
    *("offload_buffers", "offload_folder"),
}
"""Arguments of `from_pretrained` that `model.extra` may hold, besides keys of the architecture's config. Left out:
what the recipe sets elsewhere, secrets (`token`), what loads other or random weights (`ignore_mismatched_sizes`)."""


def check_base_model(
    section: ModelSection, *, quantization: QuantizationSection | None = None, task: Task = DEFAULT_TASK
) -> BaseModelFiles:
    """The files of the base model, looked at before a weight is read. Raises ModelError with every problem found."""
    directory = model_directory(section)
    config = read_config(directory)
    problems = [
        *model_type_problems(directory, config=config, section=section),
        *task_problems(config, where=str(directory / "config.json"), task=task),
        *config_problems(directory, config=config, section=section),
        *quantization_problems(directory, config=config, quantization=quantization),
    ]
    if problems:
        raise ModelError(problems)
    stops = stop_token_ids(directory, config=config)
    known = load_config(section, directory=directory)
    if problems := list(_extra_problems(section, config=known)):
        raise ModelError(problems)
    where = str(directory / "config.json")
    outline = _outline(section, config=known, where=where, task=task)
    vocab_size = int(weight_of(outline.get_input_embeddings()).shape[0])
    added = tokens_added(section, directory=directory, rows=vocab_size)
    if added is not None:
        _refuse_head(outline, where=where)
        vocab_size = added.rows_needed
    if problems := list(stop_problems(directory, stops=stops, rows=vocab_size, data=None)):
        raise ModelError(problems)
    tensors = whole_tensors(section, directory=directory, config=config)
    return BaseModelFiles(
        name=section.model_name_or_path,
        directory=directory,
        revision=commit_of(section, directory=directory),
        config=config,
        tensors=tensors,
        stop_token_ids=stops,
        vocab_size=vocab_size,
        modules=replace(modules_of(outline), rows=vocab_size),
        added=added,
        vocabulary=dict(_vocabulary(outline, tensors)),
    )


def _vocabulary(outline: PreTrainedModel, tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[str, str]]:
    embedding, head = outline.get_input_embeddings(), outline.get_output_embeddings()
    own = [embedding] if head is None or head.weight is embedding.weight else [embedding, head]
    names = {module: name for name, module in outline.named_modules() if module in own}
    for module in own:
        tensor = tensors.get(f"{names[module]}.weight")
        shape = tuple(weight_of(module).shape)
        if tensor is not None and tensor.shape == shape and tensor.dtype in FLOATS:
            yield names[module], f"{names[module]}.weight"


def tokens_added(section: ModelSection, *, directory: Path, rows: int) -> AddedTokens | None:
    """What `model.add_tokens` adds to a base whose embedding has so many rows; None where it adds nothing."""
    if not section.add_tokens:
        return None
    tokenizer = read_tokenizer(directory, trust_remote_code=section.trust_remote_code)
    return added_tokens(tokenizer, section.add_tokens, rows=rows)


def _refuse_head(outline: PreTrainedModel, *, where: str) -> None:
    """Heads whose rows peft cannot train."""
    head = outline.get_output_embeddings()
    if head is None or head.bias is not None:
        what = "no output head" if head is None else "a bias in its output head, which peft would leave out"
        message = f"has {what}: model.add_tokens cannot train rows of it; use tokens that the base knows"
        raise ModelError(message, where=where)


def whole_tensors(section: ModelSection, *, directory: Path, config: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """The tensors of a base model, its weights fetched and found whole. Raises ModelError with every problem."""
    fetch_weights(section, directory=directory)
    tensors = tensor_table(directory)
    if problems := list(weight_problems(directory, tensors=tensors, config=config)):
        raise ModelError(problems)
    return tensors


def _outline(section: ModelSection, *, config: PreTrainedConfig, where: str, task: Task) -> PreTrainedModel:
    """The model that config.json describes, built without memory: what keeps it from being built shows here."""
    try:
        with torch.device("meta"):
            return auto_class(task.model).from_config(
                config, trust_remote_code=section.trust_remote_code, **_attention(section)
            )
    except (*CONFIG_ERRORS, ImportError, RuntimeError) as error:
        raise ModelError(f"transformers cannot build it: {one_line(error)}{_mend(section)}", where=where) from error


def _attention(section: ModelSection) -> dict[str, str]:
    name = section.attn_implementation
    return {} if name == "auto" else {"attn_implementation": name}


def _mend(section: ModelSection) -> str:
    """What to try when a model cannot be built with an attention that the recipe names."""
    named = section.attn_implementation
    return "" if named == "auto" else f"; model.attn_implementation is {named}: write sdpa, or install what it needs"


def commit_of(section: ModelSection, *, directory: Path) -> str | None:
    """A snapshot is called after its commit; `directory` is it, or the subfolder in it."""
    snapshot = [directory, *directory.parents][len(Path(section.extra.get("subfolder", "")).parts)]
    return snapshot.name if is_on_hub(section) else None


def _extra_problems(section: ModelSection, *, config: PreTrainedConfig) -> Iterator[Problem]:
    taken = set(inspect.signature(type(config).__init__).parameters) | set(config.to_dict())
    for key in section.extra:
        if key in ModelSection.model_fields or key == "quantization_config":
            yield Problem("model.extra", f"{key} has its own key in the recipe; write it there")
        elif key not in EXTRA_KEYS and key not in taken:
            near = difflib.get_close_matches(key, [*EXTRA_KEYS, *taken], n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; lorafit passes on {', '.join(sorted(EXTRA_KEYS))}"
            yield Problem("model.extra", f"{key} is not an argument of from_pretrained that may be set{hint}")


def load_base_model(
    model: ModelSection,
    quantization: QuantizationSection | None,
    *,
    dtype: torch.dtype | str,
    device_map: Any,
    task: Task = DEFAULT_TASK,
) -> PreTrainedModel:
    """The base model with every weight from its files. Raises ModelError where the files lack one or another shape.

    `auto` is the type the weights were saved in, on a CPU without bfloat16 float32.
    transformers starts missing tensors at random and only logs it. Tensors that the architecture has no place for are
    logged: the model is whole without them. Tokens of `model.add_tokens` have their rows, as they begin.
    """
    directory = model_directory(model)
    fetch_weights(model, directory=directory)
    keys = {key: value for key, value in model.extra.items() if key not in WHERE_FILES_LIE} | _attention(model)
    if quantization is not None and "quantization_config" not in read_config(directory):
        keys["quantization_config"] = bnb_config(_for_this_machine(quantization))
    with _kept_load_report() as report:
        try:
            base, loaded = auto_class(task.model).from_pretrained(
                directory,
                dtype=base_dtype(dtype) if isinstance(dtype, str) else dtype,
                device_map=device_map,
                trust_remote_code=model.trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that mismatches are listed below, with their names, and refused
                **keys,
            )
        except (OSError, ImportError, ValueError) as error:
            message = f"transformers cannot load it: {one_line(error)}{_mend(model)}"
            raise ModelError(message, where=str(directory)) from error
        except torch.OutOfMemoryError as error:
            raise MachineError(f"the base model does not fit: {OUT_OF_MEMORY}", where=str(directory)) from error
        except RuntimeError as error:
            if "conversion of the weights" not in str(error):
                raise
            details = re.sub(r"\x1b\[[0-9;]*m", "", report[-1] if report else str(error))
            # transformers catches what fails while a weight is quantised, a lack of memory too, and puts it in a table.
            if OUT_OF_MEMORY_WORDS.search(details):
                raise MachineError(f"the base model does not fit: {OUT_OF_MEMORY}", where=str(directory)) from error
            raise ModelError(
                f"its weights do not fit config.json: {one_line(details)}", where=str(directory)
            ) from error
    _stop_repacking(base)
    _refuse_incomplete(loaded, depth=base.config.get_text_config().num_hidden_layers, where=str(directory))
    added = tokens_added(model, directory=directory, rows=int(base.get_input_embeddings().weight.shape[0]))
    if added is not None:
        begin_rows(base, added)
    if is_on_hub(model):  # an adapter records the name of its base, not a path of this machine's cache
        base.name_or_path = base.config.name_or_path = model.model_name_or_path
    return base


def _stop_repacking(model: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights anew for AVX512-BF16 in the first evaluation.

    The product of what is repacked has no backward: no gradient passes a 4-bit layer any more, and training goes on
    without a word. It is rounded to bfloat16 whatever the recipe computes in, peft's DoRA unpacks such weights wrongly,
    and the processor is asked, not what torch will use of it (bitsandbytes 0.50, `Linear4bit.forward`). On a GPU the
    switch is never read.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _for_this_machine(section: QuantizationSection) -> QuantizationSection:
    return section.model_copy(update={"bnb_4bit_compute_dtype": compute_dtype(section.bnb_4bit_compute_dtype)})


def _refuse_incomplete(loaded: Mapping[str, Any], *, depth: int, where: str) -> None:
    problems = []
    unexpected = sorted(loaded["unexpected_keys"])
    indices = {name: re.search(r"\.(\d+)\.", name) for name in unexpected}
    if deeper := [name for name, index in indices.items() if index and int(index[1]) >= depth]:
        problems.append(
            f"holds {_some(deeper)}, config.json makes {depth} layers (num_hidden_layers): the weights and config.json "
            "are not of one model"
        )
    if missing := sorted(loaded["missing_keys"]):
        problems.append(f"lacks {_some(missing)}: copy the whole model again, or correct config.json")
    if mismatched := sorted(loaded["mismatched_keys"]):
        name, stored, wanted = mismatched[0]
        others = f" and {len(mismatched) - 1} more tensors" if len(mismatched) > 1 else ""
        problems.append(
            f"holds {name} as {list(stored)}, config.json makes it {list(wanted)}{others}: the weights and config.json "
            "are not of one model"
        )
    if problems:
        raise ModelError(Problem(where, problem) for problem in problems)
    if unexpected:
        logger.warning("%s: not used, the architecture has no place for them: %s", where, _some(unexpected))


def _some(names: list[str]) -> str:
    listed = ", ".join(names[:3])
    return f"{len(names)} tensors ({listed}, ...)" if len(names) > 3 else f"{listed}"


@contextmanager
def _kept_load_report() -> Iterator[list[str]]:
    """The table of missing and unexpected tensors that transformers logs, kept from the log: it is said in one line."""
    reports: list[str] = []

    library = logging.getLogger("transformers.modeling_utils")
    level, shown_from = library.level, library.getEffectiveLevel()

    def is_other(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if "LOAD REPORT" in text:
            reports.append(text)
        return "LOAD REPORT" not in text and record.levelno >= shown_from

    library.addFilter(is_other)
    if shown_from > logging.WARNING:  # of a library that is kept quiet the table is wanted, too
        library.setLevel(logging.INFO)
    try:
        yield reports
    finally:
        library.setLevel(level)
        library.removeFilter(is_other)
