"""The trained adapter on disk: staged, compared with memory, then put under its name."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from lorafit.builders.adapter import CHANGES_BASE_WEIGHTS
from lorafit.builders.model_files import GENERATION, BaseModelFiles, read_json
from lorafit.data.templates import saved_chat_template
from lorafit.errors import VerificationError
from lorafit.recipe import Recipe
from lorafit.storage.stage import scratch, staged
from lorafit.training.checkpoints import QUARANTINE, quarantine
from lorafit.training.disk import full_disk_is_said

WEIGHTS = "adapter_model.safetensors"


@contextmanager
def initial_adapter(model: PeftModel, *, init_method: bool | str) -> Iterator[Path | None]:
    """The adapter as it was initialised, on disk for as long as the block runs; None where nothing needs it.

    PiSSA, OLoRA and CorDA move part of the base weight into the adapter. With this copy peft saves the difference to
    the original base instead: an ordinary adapter of twice the rank that every program loads.
    """
    if init_method not in CHANGES_BASE_WEIGHTS:
        yield None
        return
    with scratch() as directory:
        config = model.peft_config["default"]
        assert isinstance(config, LoraConfig)
        recorded = config.init_lora_weights, config.corda_config
        config.init_lora_weights, config.corda_config = True, None
        model.save_pretrained(str(directory))
        config.init_lora_weights, config.corda_config = recorded
        yield directory


def save_adapter(
    model: PeftModel,
    recipe: Recipe,
    *,
    tokenizer: PreTrainedTokenizerBase,
    base_files: BaseModelFiles,
    target: Path,
    state_dict: dict[str, torch.Tensor] | None,
    initial: Path | None,
    card: str,
    needed: int,
) -> None:
    """Write the adapter of a run, by the first process: `needed` bytes at most. Raises VerificationError and DiskError.

    See `write_adapter` for the others.
    """
    if not PartialState().is_main_process:
        return
    tokenizer.chat_template = saved_chat_template(recipe.data, tokenizer)
    generation = generation_settings(base_files, tokenizer, stop_token=recipe.data.stop_token)
    with full_disk_is_said(target.parent, writing="the adapter", needed=needed):
        write_adapter(
            model,
            tokenizer,
            target=target,
            base_name=base_name(recipe),
            state_dict=state_dict,
            initial=initial,
            card=card,
            generation=generation,
        )


def base_name(recipe: Recipe) -> str | None:
    """What an adapter may say of its base: a Hub id, but no path of this machine."""
    name = recipe.model.model_name_or_path
    return None if Path(name).is_absolute() else name


def write_adapter(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    target: Path,
    base_name: str | None,
    state_dict: dict[str, torch.Tensor] | None,
    initial: Path | None,
    card: str,
    generation: Mapping[str, Any] | None = None,
) -> None:
    """Write a plain PEFT adapter with its tokenizer to `target`.

    `base_name` is a Hub id, or None for a base in a directory (no path of this machine is recorded). `state_dict` is
    the gathered one of a sharded model, `card` the text of README.md, `generation` what generation_config.json holds
    where answers end otherwise than the base's. Raises VerificationError when the file is not what is in memory.
    """
    with _in_place_of(target) as stage:
        # Embeddings under an adapter stay frozen, so the base's own are the right ones to load.
        with warnings.catch_warnings():
            # To take the difference peft loads the initial adapter beside the trained one, and warns of itself.
            warnings.filterwarnings("ignore", message=".*changes the base weights of the model.*")
            warnings.filterwarnings("ignore", message="`corda_config` specified but will be ignored.*")
            model.save_pretrained(
                str(stage),
                state_dict=state_dict,
                save_embedding_layers=False,
                path_initial_model_for_weight_conversion=None if initial is None else str(initial),
            )
        tokenizer.save_pretrained(str(stage))
        settle_files(stage, base_name=base_name)
        (stage / "README.md").write_text(card, encoding="utf-8")
        if generation is not None:
            (stage / GENERATION).write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
        if initial is None:
            _refuse_difference(model, stage / WEIGHTS, state_dict)
        _refuse_broken(stage)


@contextmanager
def _in_place_of(target: Path) -> Iterator[Path]:
    """A new directory that becomes `target` when the block has ended well, and is gone when it has not."""
    with staged(target) as stage:
        yield stage
        if target.exists():  # of a run that was killed between writing it and saying so, most likely
            quarantine(target, target.parent / QUARANTINE)


def generation_settings(
    base_files: BaseModelFiles, tokenizer: PreTrainedTokenizerBase, *, stop_token: str | None
) -> dict[str, Any] | None:
    """generation_config.json of a base with the stop token that a recipe names before its own; None where it names
    none, and the base's holds."""
    if stop_token is None:
        return None
    path = base_files.directory / GENERATION
    settings = read_json(path) if path.is_file() else {}
    named = cast(int, tokenizer.convert_tokens_to_ids(stop_token))
    return settings | {"eos_token_id": [named, *sorted(base_files.stop_token_ids - {named})]}


def _refuse_difference(model: PeftModel, file: Path, state_dict: dict[str, torch.Tensor] | None) -> None:
    """The file holds every trained tensor, bit for bit."""
    expected = get_peft_model_state_dict(model, state_dict=state_dict, save_embedding_layers=False)
    saved = load_file(file)
    if saved.keys() != expected.keys():
        odd = sorted(saved.keys() ^ expected.keys())
        raise VerificationError(f"saved tensors differ from the trained ones: {', '.join(odd[:3])}", where=str(file))
    for name, tensor in expected.items():
        if not torch.equal(saved[name], tensor.detach().cpu().contiguous()):
            raise VerificationError(f"{name} was not saved as it was trained", where=str(file))


def _refuse_broken(stage: Path) -> None:
    """What is loaded later is whole: tensors there, none empty, all finite, no Python code or pickles beside them."""
    tensors = load_file(stage / WEIGHTS)
    # AdaLoRA may prune a module to rank 0; then its factors are rightly empty.
    may_be_empty = json.loads((stage / "adapter_config.json").read_text(encoding="utf-8"))["peft_type"] == "ADALORA"
    empty = [name for name, tensor in tensors.items() if tensor.numel() == 0]
    wrong = [] if may_be_empty and len(empty) < len(tensors) else empty
    wrong += [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if not tensors or wrong:
        raise VerificationError(f"empty or not finite: {', '.join(wrong[:3]) or 'no tensors at all'}", where=str(stage))


def settle_files(directory: Path, *, base_name: str | None) -> None:
    """Files of a saved adapter that name no path of this machine and can be read by whom the umask lets."""
    _settle_config(directory / "adapter_config.json", base_name)
    (directory / "README.md").unlink(missing_ok=True)  # peft's card names the base's path
    give_usual_permissions(directory)


def _settle_config(file: Path, base_name: str | None) -> None:
    """peft records the base's path on this machine, and its sets of names in an order that changes from run to run."""
    config = json.loads(file.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base_name
    if config["init_lora_weights"] is True:
        config["corda_config"] = None
    for key in ("target_modules", "exclude_modules"):
        if isinstance(config[key], list):
            config[key] = sorted(config[key])
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def give_usual_permissions(directory: Path) -> None:
    """Files readable as the umask says; safetensors writes its own for the owner only."""
    umask = os.umask(0)
    os.umask(umask)
    for path in directory.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
