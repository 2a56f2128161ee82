"""What a plan does not model: refused, or said to make the figures an upper bound."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PreTrainedConfig

from lorafit.errors import MachineError
from lorafit.planning.gpus import Gpu
from lorafit.recipe import LoadedRecipe, Recipe

MODELLED = ("ddp", "fsdp2")


def refuse_unmodelled(loaded: LoadedRecipe) -> None:
    """Raises MachineError for what would be planned wrongly."""
    recipe = loaded.recipe
    problems = []
    if recipe.launch.strategy not in MODELLED:
        message = "a plan models ddp and fsdp2, not DeepSpeed, FSDP 1 or a file; plan with --set launch.strategy=fsdp2"
        problems.append(loaded.problem("launch.strategy", message))
    if recipe.quantization is not None and recipe.quantization.load_in_8bit:
        message = "8-bit layers split columns by their values, which a plan does not have; plan with load_in_4bit"
        problems.append(loaded.problem("quantization.load_in_8bit", message))
    if problems:
        raise MachineError(problems)


def notes(recipe: Recipe, config: PreTrainedConfig, *, gpu: Gpu, count: int) -> Iterator[str]:
    """One line each."""
    training = recipe.training
    yield "not in the step: loading the model, saving, and what an initialisation computes (pissa, eva, ...)"
    if gpu.is_cpu:
        yield "there is no GPU here, or none was asked for: name one to plan for it (--gpu rtx4090, --gpu 24GiB)"
        yield "on a CPU the loss is taken of the trained positions alone, which a plan does not know: an upper bound"
    elif count > 1:
        yield "several GPUs: what they wait for each other is not counted in the time"
    if training.torch_compile:
        yield "training.torch_compile: planned without it, an upper bound of memory and of time"
    if recipe.model.attn_implementation in ("flash_attention_2", "flash_attention_3", "flex_attention"):
        yield f"model.attn_implementation: {recipe.model.attn_implementation} is planned as torch's own attention"
    if training.fp16:
        yield "training.fp16: planned as bfloat16, which is as large"
    if training.optim.startswith("paged_"):
        yield f"training.optim: {training.optim} can move its states to the host when memory runs out: an upper bound"
    if recipe.lora.init_lora_weights == "eva":
        yield "lora.init_lora_weights: eva shares the ranks out by the data; planned with lora.r everywhere"
    if recipe.quantization is not None and getattr(config.get_text_config(), "num_experts", None):
        yield "quantization: bitsandbytes leaves fused experts in 16 bits; they are counted so"
    if unknown := sorted({"activation_offloading", "use_liger_kernel"} & set(training.extra)):
        yield f"training.extra: {', '.join(unknown)} saves more than is planned: an upper bound"
