"""What a valid recipe will do, as lines for people."""

from collections.abc import Iterator

from lorafit.recipe.recipe import Recipe
from lorafit.validation import Validation


def validation_text(validation: Validation) -> str:
    """One line per part of the run, numbers with their arithmetic; the last says what was not checked."""
    loaded = validation.loaded
    missing = validation.not_checked
    lines = [f"{loaded.path}: {'right, as far as it was checked' if missing else 'nothing wrong'}"]
    lines += [f"  {label:<12} {text}" for label, text in _parts(validation)]
    lines += [f"not checked: {'; '.join(missing)}"] if missing else []
    return "\n".join(lines)


def _parts(validation: Validation) -> Iterator[tuple[str, str]]:
    recipe, numbers, data = validation.loaded.recipe, validation.numbers, validation.data
    base = recipe.model.model_name_or_path
    yield "base model", f"{base} ({'a directory' if base.startswith('/') else 'Hub'}), dtype {recipe.model.dtype}"
    yield "adapter", _adapter(recipe)
    yield "data", data.summary()
    whose = "" if recipe.launch.num_processes != "auto" else " (auto: one for each GPU)"
    yield "batch", f"{numbers['sequences_per_step']}{whose}"
    if "steps_per_epoch" in numbers:
        yield "epoch", str(numbers["steps_per_epoch"])
    if "steps" in numbers:
        yield "run", str(numbers["steps"])
    else:
        yield "run", f"{recipe.training.num_train_epochs:g} epochs; steps are known once the rows are tokenised"
    if "warmup_steps" in numbers:
        yield "warm-up", str(numbers["warmup_steps"])
    yield "evaluation", _evaluation(validation)
    every = numbers.get("checkpoint_steps", recipe.checkpoints.every)
    yield "checkpoints", f"every {every}, {recipe.checkpoints.keep} kept"
    yield "writes", f"{validation.loaded.output_dir()}"


def _adapter(recipe: Recipe) -> str:
    lora, adalora = recipe.lora, recipe.adalora
    rank = adalora.init_r if adalora else lora.r
    alpha = lora.lora_alpha if lora.lora_alpha is not None else 2 * rank
    base = ""
    if recipe.quantization:
        base = " on 4-bit weights" if recipe.quantization.load_in_4bit else " on 8-bit weights"
    kind = "AdaLoRA" if adalora else "DoRA" if lora.use_dora else "LoRA"
    scale = f"sqrt({rank})" if lora.use_rslora else str(rank)
    where = lora.target_modules if isinstance(lora.target_modules, str) else ", ".join(lora.target_modules)
    if lora.exclude_modules:
        excluded = lora.exclude_modules
        where += f" without {excluded if isinstance(excluded, str) else ', '.join(excluded)}"
    return f"{kind}{base}, rank {rank}, scale {alpha} / {scale}, on {where}"


def _evaluation(validation: Validation) -> str:
    training = validation.loaded.recipe.training
    if not validation.data.eval_rows and not validation.data.skipped_hub:
        return "none: no held-out rows"
    often = {
        "no": "",
        "epoch": ", after every epoch",
        "steps": f", every {validation.numbers.get('eval_steps', 'so many steps')}",
    }
    return f"{validation.data.eval_rows:,} rows, before and after{often[training.eval_strategy]}"
