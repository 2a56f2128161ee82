"""What the largest rank's adapter says of the smaller ones: it is cut to each of them, and evaluated."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel

from lorafit.builders.adapter import adapted_modules
from lorafit.builders.lora_config import lora_config
from lorafit.data.templates import saved_chat_template
from lorafit.recipe import LoadedRecipe
from lorafit.storage.files import write_file
from lorafit.storage.run_dir import RunDir
from lorafit.storage.stage import staged
from lorafit.sweep.trial import Bench, trial_recipe
from lorafit.sweep.truncate import Trained, attached, read_trained, with_rank
from lorafit.tasks import TASKS
from lorafit.tasks.sequences import SequenceLosses
from lorafit.training.model_card import model_card
from lorafit.training.save import generation_settings, write_adapter

SPECTRUM = "singular_values.json"


def cut_to_smaller_ranks(
    loaded: LoadedRecipe, largest: LoadedRecipe, bench: Bench
) -> tuple[dict[str, SequenceLosses], dict[str, Any]]:
    """Losses of the trained adapter of `largest` at each smaller rank (`cut-4`), and the size of each rank's adapter.

    Leaves the singular values of each module in the run directory. Adapters of experts' parameters hold all experts in
    one pair of factors, and are not cut.
    """
    run, lora = RunDir(largest.output_dir()), largest.recipe.lora
    trained = None
    if not lora.target_parameters:
        trained, base = read_trained(bench.take_base(), run.adapter)
        bench.give_back(base)
        values = {name: one.values.tolist() for name, one in trained.modules.items()}
        write_file(run.path / SPECTRUM, json.dumps(values) + "\n")
    losses, sizes = {}, {}
    for rank in loaded.recipe.rank_sweep.ranks:
        model = _at_rank(trained, _of_rank(loaded, largest, rank), bench)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        sizes[str(rank)] = [sum(p.numel() for p in parameters), sum(p.nbytes for p in parameters)]
        if trained is not None and rank < lora.r:
            losses[f"cut-{rank}"] = bench.losses_of(model)
        bench.give_back(model.unload())
    return losses, {"sizes": sizes}


def _of_rank(loaded: LoadedRecipe, largest: LoadedRecipe, rank: int) -> LoadedRecipe:
    training = largest.recipe.training
    return trial_recipe(loaded, rank=rank, seed=training.seed, learning_rate=training.learning_rate, output_dir=None)


def _at_rank(trained: Trained | None, trial: LoadedRecipe, bench: Bench) -> PeftModel:
    """The base with the cut adapter; untrained where there is none to cut."""
    base = bench.take_base()
    # What it starts from is overwritten, and some ways to start change the base.
    lora = trial.recipe.lora.model_copy(update={"init_lora_weights": True, "eva_config": None, "corda_config": None})
    config: LoraConfig = lora_config(
        lora,
        adalora=None,
        model=base,
        where=trial.problem,
        token_ids=bench.inputs.base_files.trained_token_ids,
        task=TASKS[trial.recipe.task],
    )
    seed = trial.recipe.training.seed
    if trained is None:
        return attached(base, config, seed=seed)
    return with_rank(trained, base, config, seed=seed)


def write_cut_run(
    loaded: LoadedRecipe, largest: LoadedRecipe, bench: Bench, *, rank: int, loss: float, target: Path
) -> None:
    """A run directory with the adapter cut to `rank`, as `lorafit merge` and `lorafit eval` take it."""
    source = RunDir(largest.output_dir())
    trial = _of_rank(loaded, largest, rank)
    recipe = trial.recipe.model_copy(update={"output_dir": None})
    trained, base = read_trained(bench.take_base(), source.adapter)
    bench.give_back(base)
    model = _at_rank(trained, trial, bench)
    facts = _facts(source, model, largest=largest.recipe.lora.r, loss=loss)
    history = [json.loads(line) for line in source.metrics.read_text(encoding="utf-8").splitlines()]
    tokenizer, name = bench.inputs.tokenizer, recipe.model.model_name_or_path
    tokenizer.chat_template = saved_chat_template(recipe.data, tokenizer)
    with staged(target) as stage:
        run = RunDir(stage)
        write_file(run.recipe, replace(trial, recipe=recipe).yaml(relative_to=target))
        write_adapter(
            model,
            tokenizer,
            target=run.adapter,
            base_name=None if Path(name).is_absolute() else name,
            state_dict=None,
            initial=None,
            card=model_card(recipe, facts=facts, history=[*history, {"step": facts["steps"], "eval_loss": loss}]),
            generation=generation_settings(bench.inputs.base_files, tokenizer, stop_token=recipe.data.stop_token),
        )
        bench.give_back(model.unload())
        run.write_manifest(facts | {"adapter": run.adapter_hashes()})


def _facts(source: RunDir, model: PeftModel, *, largest: int, loss: float) -> dict[str, Any]:
    """The manifest of the run that the adapter was cut from, as far as it is true of the cut one."""
    facts: dict[str, Any] = json.loads(source.manifest.read_text(encoding="utf-8"))
    modules = [module.__dict__ for module in adapted_modules(model)]
    return facts | {"modules": modules, "eval_loss_after": loss, "outcome": f"cut from rank {largest}"}
