"""What peft asks of a step: LoRA+'s optimizer, AdaLoRA's penalty, and float32 where 16 bits lose the gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from accelerate import FullyShardedDataParallelPlugin
from peft import AdaLoraConfig
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from transformers import Trainer


class PeftSteps(Trainer):
    """The optimizer and the loss of a step, for training and for planning alike."""

    model: nn.Module

    def __init__(self, *, loraplus_lr_ratio: float | None, **arguments: Any) -> None:
        self._loraplus_lr_ratio = loraplus_lr_ratio
        super().__init__(**arguments)
        if not self.args.bf16:
            train_in_float32(self.model)
        if self.accelerator.is_fsdp2:
            sum_in_float32(self.accelerator.state.fsdp_plugin)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The recipe's optimizer; with LoRA+ through peft's own grouping, B learning faster than A."""
        if self._loraplus_lr_ratio is None:
            return super().create_optimizer(model)
        optimizer_class, settings = self.get_optimizer_cls_and_kwargs(
            self.args,
            model or self.model,  # type: ignore[arg-type]  # the library gives it any module, too
        )
        settings.setdefault("weight_decay", self.args.weight_decay)
        self.optimizer = create_loraplus_optimizer(
            self.accelerator.unwrap_model(model or self.model),
            optimizer_class,
            loraplus_lr_ratio=self._loraplus_lr_ratio,
            **settings,
        )
        return self.optimizer

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
        """The loss, plus AdaLoRA's orthogonality term: peft adds it to `outputs.loss`, and those who compute a loss of
        their own, as TRL does, do not use that."""
        result = super().compute_loss(model, inputs, *rest, **named)
        config = getattr(self.model, "peft_config", {}).get("default")
        if not isinstance(config, AdaLoraConfig) or not self.model.training or config.orth_reg_weight == 0:
            return result
        penalty = config.orth_reg_weight * _orthogonality(self.model) / self.current_gradient_accumulation_steps
        return (result[0] + penalty, *result[1:]) if isinstance(result, tuple) else result + penalty


def train_in_float32(model: nn.Module) -> None:
    """TRL makes the adapter of a quantised base bfloat16, also where nothing else is: a CPU that emulates the type
    multiplies it fifty times slower than float32, and gradients are added up in 8 bits of mantissa. With fp16 no loss
    scale can be taken off such gradients: https://github.com/pytorch/pytorch/issues/127176
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def sum_in_float32(plugin: FullyShardedDataParallelPlugin) -> None:
    """accelerate lets FSDP2 round what the model returns, the loss among it, and the gradients that the GPUs add up to
    the 16 bits that its weights are computed in. Here only the weights are."""
    if (policy := plugin.mixed_precision_policy) is not None:
        plugin.mixed_precision_policy = replace(policy, output_dtype=None, reduce_dtype=torch.float32)


def _orthogonality(model: nn.Module) -> torch.Tensor:
    """Mean of ||A·A^T - I|| and ||B^T·B - I|| (Frobenius) over all factors, as peft's AdaLoraModel computes it."""
    terms = []
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            gram = parameter @ parameter.T if "lora_A" in name else parameter.T @ parameter
            terms.append(
                torch.linalg.matrix_norm(gram - torch.eye(gram.shape[0], device=gram.device, dtype=gram.dtype))
            )
    return torch.stack(terms).mean()
