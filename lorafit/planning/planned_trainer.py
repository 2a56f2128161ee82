"""The trainer of a run that is only planned: its optimizer and its loss, without what watches and saves a run."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import AdaLoraConfig, PeftModel
from peft.optimizers import create_loraplus_optimizer
from tokenizers import Tokenizer, models
from torch import nn
from transformers import PreTrainedTokenizerFast
from trl import SFTTrainer

from lorafit.builders.sft_config import sft_config
from lorafit.recipe import Recipe
from lorafit.speed import varlen_attention
from lorafit.speed.fused_lora import fuse


class PlannedTrainer(SFTTrainer):
    """What a step of the run's own trainer computes, around a model that is nowhere yet."""

    def __init__(self, *, loraplus_lr_ratio: float | None, **sft_arguments: Any) -> None:
        self._loraplus_lr_ratio = loraplus_lr_ratio
        super().__init__(**sft_arguments)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Left on meta."""

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The recipe's optimizer, anew; with LoRA+ in peft's own groups."""
        self.optimizer = None
        if self._loraplus_lr_ratio is None:
            return super().create_optimizer(model)
        kind, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        settings.setdefault("weight_decay", self.args.weight_decay)
        self.optimizer = create_loraplus_optimizer(
            self.model, kind, loraplus_lr_ratio=self._loraplus_lr_ratio, **settings
        )
        return self.optimizer

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
        """TRL's, and AdaLoRA's orthogonality term."""
        loss = super().compute_loss(model, inputs, *rest, **named)
        config = self.model.peft_config["default"]
        if isinstance(config, AdaLoraConfig) and config.orth_reg_weight:
            loss = loss + config.orth_reg_weight * _orthogonality(self.model) / self.current_gradient_accumulation_steps
        return loss


def _orthogonality(model: nn.Module) -> torch.Tensor:
    """Mean of ||A·A^T - I|| and ||B^T·B - I|| (Frobenius) over all factors."""
    factors = dict(model.named_parameters())
    grams = [factor @ factor.T for name, factor in factors.items() if "lora_A" in name]
    grams += [factor.T @ factor for name, factor in factors.items() if "lora_B" in name]
    norms = [
        torch.linalg.matrix_norm(gram - torch.eye(gram.shape[0], device=gram.device, dtype=gram.dtype))
        for gram in grams
    ]
    return torch.stack(norms).mean()


def pull_levers(model: PeftModel, recipe: Recipe, *, on_cuda: bool, in_16_bits: bool) -> None:
    """Those of `speed_up` that change what a step takes, without the trial that they stand back after."""
    section, config = recipe.speed, model.config.get_text_config()
    if recipe.training.torch_compile or recipe.launch.strategy != "ddp":
        return
    if section.fused_lora:
        fuse(model)
    is_usual = (
        config._attn_implementation == "sdpa"
        and set(getattr(config, "layer_types", None) or ()) <= varlen_attention.LAYER_TYPES
    )
    if section.varlen_attention and recipe.training.packing and on_cuda and in_16_bits and is_usual:
        model.get_base_model().set_attn_implementation(varlen_attention.NAME)


def planned_trainer(
    recipe: Recipe, model: nn.Module, *, bf16: bool, checkpointing: bool, device: str
) -> PlannedTrainer:
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
    with tempfile.TemporaryDirectory() as directory:
        arguments = sft_config(
            alone,
            output_dir=Path(directory),
            run_name="plan",
            bf16=bf16,
            gradient_checkpointing=checkpointing,
            use_cpu=device == "cpu",
            has_eval_rows=False,
            evaluates_first=False,
        )
        rows = {"input_ids": [[1, 1]], "labels": [[1, 1]]}
        return PlannedTrainer(
            loraplus_lr_ratio=recipe.optimizer.loraplus_lr_ratio,
            model=model,
            args=arguments,
            train_dataset=Dataset.from_dict(rows),
            processing_class=_tokenizer(),
        )


def _tokenizer() -> PreTrainedTokenizerFast:
    """Two tokens: the trainer wants one, no row of a plan comes from text."""
    inner = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="a", eos_token="b")
