"""The trainer of a recipe that is planned, without rows and without a directory of its own."""

from __future__ import annotations

from datasets import Dataset
from tokenizers import Tokenizer, models
from torch import nn
from transformers import PreTrainedTokenizerFast

from lorafit.recipe import Recipe
from lorafit.storage.stage import scratch
from lorafit.tasks.pages import trainer_page
from lorafit.training.arguments import training_arguments
from lorafit.training.trainer.peft_steps import train_in_float32
from lorafit.training.trainer.planned import Planned


def planned_trainer(recipe: Recipe, model: nn.Module, *, bf16: bool, checkpointing: bool, device: str) -> Planned:
    """The trainer of a recipe, for rows that are not read. What only watches or saves a run is left out."""
    alone = recipe.model_copy(
        update={
            "early_stopping": None,
            "training": recipe.training.model_copy(
                update={
                    "report_to": (),
                    "fp16": False,  # planned as bfloat16, which is as large
                    "torch_compile": False,
                    "load_best_model_at_end": False,
                    "max_steps": 1,
                    "dataloader_num_workers": 0,
                }
            ),
        }
    )
    with scratch() as directory:
        arguments = training_arguments(
            alone,
            output_dir=directory,
            run_name="plan",
            bf16=bf16,
            gradient_checkpointing=checkpointing,
            use_cpu=device == "cpu",
            has_eval_rows=False,
            evaluates_first=False,
        )
        rows = {"input_ids": [[1, 1]], "labels": [[1, 1]]}
        trainer = trainer_page(recipe.task).PLANNED(
            loraplus_lr_ratio=recipe.optimizer.loraplus_lr_ratio,
            model=model,
            args=arguments,
            train_dataset=Dataset.from_dict(rows),
            processing_class=_tokenizer(),
        )
    if recipe.training.fp16:
        train_in_float32(model)
    return trainer


def _tokenizer() -> PreTrainedTokenizerFast:
    """Two tokens: the trainer wants one, no row of a plan comes from text."""
    inner = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="a", eos_token="b")
