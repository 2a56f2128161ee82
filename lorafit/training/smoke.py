"""Does this recipe really run? Its architecture in miniature, its first rows, a few steps, and the adapter reloaded."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from peft import PeftModel
from torch import nn

from lorafit.builders.base_model import load_base_model
from lorafit.builders.experts import used_patterns_are_known
from lorafit.builders.model_files import is_on_hub
from lorafit.builders.smoke_base import HEAD, write_smoke_base
from lorafit.errors import VerificationError
from lorafit.planning.known_shapes import architecture
from lorafit.preflight import Machine, bf16_choice, this_machine
from lorafit.recipe import LoadedRecipe, Recipe
from lorafit.recipe.sections import LoraSection, ModelSection, Source
from lorafit.storage.stage import scratch
from lorafit.tasks import TASKS
from lorafit.training.inputs import read_inputs
from lorafit.training.token_rows import used_tokens
from lorafit.training.train import Trained, run_training

logger = logging.getLogger(__name__)

STEPS, TRAIN_ROWS, EVAL_ROWS = 3, 24, 8
SHIPPED_TOKENIZER = Path(__file__).parent.parent / "smoke_tokenizer"
"""The quickstart's; a link to its base in a checkout, the tokenizer files alone in a wheel."""


@dataclass(frozen=True)
class SmokeResult:
    """What a smoke run came to; the JSON of `lorafit train --smoke`."""

    steps: int
    architecture: str
    changed: tuple[str, ...]
    """What differs from the recipe so that it runs here in seconds, one sentence each."""

    max_abs_logit_difference: float
    seconds: float
    run: str | None
    """The run directory that was asked for; None when it was thrown away."""


def smoke(loaded: LoadedRecipe, *, output_dir: Path | None) -> SmokeResult:
    """Run the recipe in miniature. Leaves nothing but `output_dir`, where one is given.

    Raises every error that the real run could raise before its first step, and VerificationError when the reloaded
    adapter is not the one that was trained.
    """
    started = time.monotonic()
    with scratch() as directory:
        config = architecture(loaded.recipe.model)
        tokenizer_dir = _own_tokenizer(loaded.recipe.model)
        base = write_smoke_base(
            config,
            tokenizer_dir or SHIPPED_TOKENIZER,
            out_dir=directory / "base",
            layers=_layers_named(loaded.recipe.lora),
            trust_remote_code=loaded.recipe.model.trust_remote_code,
            task=TASKS[loaded.recipe.task],
        )
        machine = this_machine()
        changes = _Changes(loaded.recipe, machine)
        small = changes.small_recipe(base, output_dir or directory / "run", has_own_tokenizer=tokenizer_dir is not None)
        if small.model.add_tokens:
            small = _with_tokens_of(small, replace(loaded, recipe=small), changes.said, cache_dir=directory / "tokens")
        for sentence in changes.said:
            logger.info(f"smoke: {sentence}")
        trained = run_training(replace(loaded, recipe=small), cache_dir=directory / "tokens")
        bf16 = bf16_choice(small.training, machine).value
        difference = _reload_and_compare(trained, small, bf16=bf16)
    return SmokeResult(
        steps=trained.result.steps,
        architecture=config.model_type,
        changed=tuple(changes.said),
        max_abs_logit_difference=difference,
        seconds=round(time.monotonic() - started, 2),
        run=str(output_dir) if output_dir else None,
    )


def _with_tokens_of(small: Recipe, loaded: LoadedRecipe, said: list[str], *, cache_dir: Path) -> Recipe:
    """Without those of `model.add_tokens` that the first rows do not have, of which nothing would be learnt."""
    used = used_tokens(small, read_inputs(loaded, cache_dir=cache_dir))
    if left_out := [token for token in small.model.add_tokens if token not in used]:
        said.append(f"no {', '.join(left_out)} of model.add_tokens, which the first rows do not have")
    return small.model_copy(update={"model": small.model.model_copy(update={"add_tokens": used})})


def _own_tokenizer(section: ModelSection) -> Path | None:
    """Where the model's tokenizer lies, if on this machine: its directory, or the Hub's cache."""
    if not is_on_hub(section):
        directory = Path(section.model_name_or_path)
        return directory if (directory / "tokenizer_config.json").is_file() else None
    found = try_to_load_from_cache(section.model_name_or_path, "tokenizer_config.json", revision=section.revision)
    return Path(found).parent if isinstance(found, str) else None


def _layers_named(lora: LoraSection) -> int:
    """Layers the miniature needs: two, or as many as the section's indices and names reach."""
    chosen = lora.layers_to_transform
    indices = [] if chosen is None else [chosen] if isinstance(chosen, int) else list(chosen)
    names = [*lora.rank_pattern, *lora.alpha_pattern]
    for listed in (lora.target_modules, lora.exclude_modules, lora.target_parameters, lora.modules_to_save):
        names += [listed] if isinstance(listed, str) else listed or ()
    indices += [int(number) for name in names for number in re.findall(r"(?:layers|h|blocks?)\\?\.(\d+)", name)]
    return max([2, *(index + 1 for index in indices)])


class _Changes:
    """The recipe in miniature, and a sentence for each thing that is not as the recipe says."""

    def __init__(self, recipe: Recipe, machine: Machine) -> None:
        self._recipe = recipe
        self._on_cpu = machine.device == "cpu"
        self.said: list[str] = ["two small layers of random weights, the first rows, three steps"]

    def small_recipe(self, base: Path, run: Path, *, has_own_tokenizer: bool) -> Recipe:
        recipe = self._recipe
        model: dict[str, Any] = {"model_name_or_path": str(base), "revision": "main", "extra": {}}
        training = dict(self._training())
        data: dict[str, Any] = {
            "train": tuple(_first_rows(source, TRAIN_ROWS) for source in recipe.data.train),
            "eval": tuple(_first_rows(source, EVAL_ROWS) for source in recipe.data.eval),
        }
        lora: dict[str, Any] = dict(self._ranks())
        if not has_own_tokenizer:
            self.said.append("the quickstart's tokenizer, since the model's own is not on this machine")
            data |= {"over_length": "truncate", "max_lost_rows": 1.0}
            if recipe.lora.trainable_token_indices is not None:
                lora["trainable_token_indices"] = None
                self.said.append("no lora.trainable_token_indices: they are ids of the model's own tokenizer")
            if recipe.data.template_kwargs:
                data["template_kwargs"] = {}
                self.said.append("no data.template_kwargs: they are variables of the model's own chat template")
            if recipe.data.stop_token is not None:
                data["stop_token"] = None
                self.said.append("no data.stop_token: it is a token of the model's own tokenizer")
        if self._on_cpu:
            if recipe.model.attn_implementation.startswith(("flash", "flex")):
                model["attn_implementation"] = "sdpa"
                self.said.append(f"sdpa instead of {recipe.model.attn_implementation}, which needs a GPU")
            if recipe.lora.init_lora_weights == "loftq":
                lora["init_lora_weights"] = True
                self.said.append("a plain start instead of loftq, which needs a GPU")
        update: dict[str, Any] = {
            "output_dir": str(run),
            "model": recipe.model.model_copy(update=model),
            "lora": recipe.lora.model_copy(update=lora),
            "data": recipe.data.model_copy(update=data),
            "training": recipe.training.model_copy(update=training),
            "launch": recipe.launch.model_copy(update={"num_processes": 1, "strategy": "ddp"}),
        }
        if recipe.adalora is not None:
            ranks = {"init_r": min(recipe.adalora.init_r, HEAD), "target_r": min(recipe.adalora.target_r, HEAD - 1)}
            update["adalora"] = recipe.adalora.model_copy(update={"tinit": 1, "tfinal": 0, "delta_t": 1} | ranks)
        return recipe.model_copy(update=update)

    def _ranks(self) -> Iterator[tuple[str, Any]]:
        """Those that the miniature's narrowest matrix, one head of keys, can hold."""
        lora = self._recipe.lora
        largest = max([lora.r, *lora.rank_pattern.values()])
        if largest > HEAD:
            yield "r", min(lora.r, HEAD)
            yield "rank_pattern", {name: min(rank, HEAD) for name, rank in lora.rank_pattern.items()}
            self.said.append(f"ranks of at most {HEAD} instead of {largest}: the miniature's matrices hold no more")

    def _training(self) -> Iterator[tuple[str, Any]]:
        training = self._recipe.training
        yield "max_steps", STEPS
        yield "per_device_train_batch_size", min(training.per_device_train_batch_size, 4)
        yield "gradient_accumulation_steps", min(training.gradient_accumulation_steps, 2)
        yield "warmup_steps", min(training.warmup_steps, 0.1)
        yield "logging_steps", 1
        yield "report_to", ()
        if training.eval_steps is not None:
            yield "eval_steps", 1
        if not self._on_cpu:
            return
        if training.optim.startswith("paged_"):
            yield "optim", "adamw_torch_fused"
            self.said.append(f"adamw_torch_fused instead of {training.optim}, which needs a GPU")
        if training.fp16:
            yield "fp16", False
            self.said.append("no fp16, which needs a GPU")
        if training.torch_compile:
            yield "torch_compile", False
            self.said.append("no torch_compile: compiling takes longer than this whole run")


def _first_rows(source: Source, count: int) -> Source:
    return source.model_copy(update={"limit": min(source.limit or count, count)})


def _reload_and_compare(trained: Trained, recipe: Recipe, *, bf16: bool) -> float:
    """Largest difference of a logit between the model in memory and its adapter, read back onto its base."""
    task = TASKS[recipe.task]
    base = load_base_model(recipe.model, recipe.quantization, dtype=recipe.model.dtype, device_map=None, task=task)
    with used_patterns_are_known():
        reloaded = PeftModel.from_pretrained(base, trained.result.adapter).to(trained.model.device).eval()
    in_memory = dict(trained.model.named_parameters())
    for name, tensor in reloaded.named_parameters():  # the adapter of a quantised base is bfloat16, read back float32
        tensor.data = tensor.data.to(in_memory[name].dtype)
    # What the trainer wrapped around the trained model's forward stays there, and has to be around the other's, too.
    dtype = autocast_type(recipe, bf16=bf16)
    with torch.autocast(trained.model.device.type, dtype, enabled=dtype is not None):
        after, before = _logits(reloaded), _logits(trained.model.eval())
    difference = (after - before).abs().max().item()
    if difference != 0:
        raise VerificationError(
            f"the reloaded adapter differs from the trained one by {difference:.3g} in a logit", where="smoke"
        )
    return difference


def autocast_type(recipe: Recipe, *, bf16: bool) -> torch.dtype | None:
    """The type that a run computes in beside that of its weights; None where it is theirs alone."""
    return torch.bfloat16 if bf16 else torch.float16 if recipe.training.fp16 else None


@torch.no_grad()
def _logits(model: nn.Module) -> torch.Tensor:
    """[1, 16, vocabulary] for fixed token ids."""
    ids = torch.arange(3, 19, device=next(model.parameters()).device).unsqueeze(0)
    return model(input_ids=ids).logits.float()
