"""The model of a run: its base, loaded, and the adapter on it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled

from lorafit.builders.adapter import attach_adapter
from lorafit.builders.base_model import load_base_model
from lorafit.builders.lora_config import lora_config
from lorafit.builders.model_files import BaseModelFiles
from lorafit.builders.unread_base import hold_trained, layout_of, unread_base
from lorafit.data.arrow_files import PLACE
from lorafit.launching import launch
from lorafit.recipe import LoadedRecipe, Recipe
from lorafit.tasks import TASKS
from lorafit.tasks.pages import trainer_page
from lorafit.training.invariants import refuse_wrong_trainable_set
from lorafit.training.out_of_memory import out_of_memory_is_said
from lorafit.training.startup_lines import say_adapter


def model_with_adapter(
    loaded: LoadedRecipe,
    base_files: BaseModelFiles,
    *,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    base: PreTrainedModel | None,
) -> PeftModel:
    """The base on its device, quantised as the recipe says, with a new adapter, which is all of it that is trained.

    `base` where it is loaded already. `rows` are what some adapters start from. Raises ModelError, AdapterError,
    VerificationError, and MachineError where memory runs out.
    """
    with out_of_memory_is_said(loaded, doing=lambda: "loading the base model"):
        model = _attached(loaded, base_files, rows=rows, pad_token_id=tokenizer.pad_token_id, base=base)
    refuse_wrong_trainable_set(model, bias=loaded.recipe.lora.bias)
    say_adapter(model)
    return model


def _attached(
    loaded: LoadedRecipe, base_files: BaseModelFiles, *, rows: Dataset, pad_token_id: int, base: PreTrainedModel | None
) -> PeftModel:
    recipe = loaded.recipe
    state = PartialState()
    # A model that is spread over processes is put on the GPUs part by part, after loading.
    is_whole = launch.sharding_asked_for() == "data parallel"
    device_map = {"": state.device} if state.device.type == "cuda" and is_whole else None
    if base is None:
        base = _base(recipe, state=state, device_map=device_map)
    by_fsdp = launch.shards_by_fsdp(recipe.launch)
    config = lora_config(
        recipe.lora,
        adalora=recipe.adalora,
        model=base,
        where=loaded.problem,
        by_fsdp=by_fsdp,
        token_ids=base_files.trained_token_ids,
        task=TASKS[recipe.task],
    )
    collate = trainer_page(recipe.task).collator(pad_token_id)
    size = recipe.training.per_device_train_batch_size
    columns = [name for name in rows.column_names if name not in PLACE]

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        for start in range(0, min(64, len(rows)), size):
            batch = rows.select(range(start, min(start + size, len(rows))))
            yield collate([{name: row[name] for name in columns} for row in batch])

    model = attach_adapter(
        base,
        config,
        init_method=recipe.lora.init_lora_weights,
        seed=recipe.training.seed,
        # ZeRO-3 gathers into buffers of one type: https://github.com/deepspeedai/DeepSpeed/issues/8072
        autocast_adapter_dtype=recipe.quantization is not None or not is_deepspeed_zero3_enabled(),
        batches=batches,
        base_directory=str(base_files.directory),
    )
    hold_trained(model)
    return model


def _base(recipe: Recipe, *, state: PartialState, device_map: Any) -> PreTrainedModel:
    """Loaded, or only built where the first process hands its weights on: the host then holds the base once.

    transformers 5.23 reads the files in every process all the same, and accelerate drops what the others read
    (`fsdp2_prepare_model`). Weights in 4 or 8 bits are not handed on, and code from the Hub is not known to others.
    """
    task, dtype = TASKS[recipe.task], recipe.model.dtype

    def load() -> PreTrainedModel:
        return load_base_model(recipe.model, recipe.quantization, dtype=dtype, device_map=device_map, task=task)

    is_alone = state.num_processes == 1 or recipe.quantization is not None or recipe.model.trust_remote_code
    if is_alone or not launch.first_hands_weights_on():
        return load()
    base = load() if state.is_main_process else None
    (layout,) = broadcast_object_list([None if base is None else layout_of(base)])
    return unread_base(layout, task=task) if base is None else base
