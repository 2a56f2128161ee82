"""What `import lorafit` gives to a notebook or another program: the commands as functions, in the same words.

Each takes a recipe or a run, returns the result whose fields are the command's `--json`, and raises a LorafitError for
what its user can mend. None prints, ends the process, listens to signals or starts processes that train together; what
a command says on stderr goes to the loggers below `lorafit`. What a function needs is imported inside it:
`lorafit.load` and `lorafit.validate` answer without torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorafit.errors import RecipeError
from lorafit.launching.alone import refuse_several_processes
from lorafit.pulse import counting_in_lines
from lorafit.recipe import LoadedRecipe
from lorafit.recipe import load as loaded_from
from lorafit.storage.no_room import no_room_is_said

if TYPE_CHECKING:
    from lorafit.evaluation.eval_result import EvalResult
    from lorafit.merging.merge import MergeResult
    from lorafit.planning.plan_result import Plan
    from lorafit.sweep.sweep_result import SweepResult
    from lorafit.training.manifest import TrainResult
    from lorafit.validation import Validation

StrPath = str | os.PathLike[str]


def load(recipe: StrPath, *, set: Mapping[str, Any] | None = None) -> LoadedRecipe:
    """The recipe in a YAML file, checked; what takes a recipe takes this or the path. Imports no torch.

    `set` changes keys by their dotted names, as `--set` does: `{"lora.r": 8, "output_dir": "runs/a"}`; its paths are
    relative to the current directory. Raises RecipeError with every problem and its line.
    """
    return loaded_from(_path(recipe), overrides=_overrides(set))


def validate(recipe: StrPath | LoadedRecipe) -> Validation:
    """What the run will do: rows, steps, advice, and what was not checked. Imports no torch, downloads nothing.

    Raises every problem of the recipe, its packages, its base as far as that lies here, and its rows at once: a
    RecipeError, MachineError, ModelError or DataError by the first of them.
    """
    from lorafit.validation import validate as validated
    from lorafit.validation import validate_loaded

    with no_room_is_said():
        return validate_loaded(recipe) if isinstance(recipe, LoadedRecipe) else validated(_path(recipe))


def train(recipe: StrPath | LoadedRecipe, *, resume: bool = False, restart: bool = False) -> TrainResult:
    """Train an adapter in this process and leave a run directory; losses are in nats per trained token.

    `resume` goes on after the newest whole checkpoint, from the first step where there is none, and gives the result
    again where the run is finished. With it `restart` begins anew where all checkpoints are damaged. An interrupt that
    comes while it trains raises StopRequested; the last checkpoint is what it was.

    Raises every LorafitError; MachineError where the recipe takes several processes or machines, which the command
    starts. Nothing is created before all that can be checked without training has passed.
    """
    from lorafit.data.cache import cache_directory
    from lorafit.storage.run_dir import RunDir
    from lorafit.storage.run_lock import held
    from lorafit.training.progress import ProgressLines
    from lorafit.training.train import train as train_adapter

    if restart and not resume:
        raise RecipeError("goes with resume=True; a new run needs an output_dir that is not used yet", where="restart")
    loaded = _recipe_for_this_process(recipe, command="train")
    with no_room_is_said(), held(RunDir(loaded.output_dir())):
        return train_adapter(
            loaded,
            begin="restart" if restart else "resume" if resume else "new",
            progress=ProgressLines,
            cache_dir=cache_directory(),
        )


def evaluate(
    run: StrPath,
    *,
    data: StrPath | None = None,
    merged: StrPath | None = None,
    base: str | None = None,
    tasks: Sequence[str] = (),
    samples: int | None = None,
    set: Mapping[str, Any] | None = None,
) -> EvalResult:
    """Base, adapter and merged model compared on the same held-out rows, in nats per token with 99 % intervals.

    `run` is a run directory, or a plain PEFT adapter: a directory or a Hub id. `data` is a file of rows instead of the
    run's; `merged` a model directory, by default RUN/merged where there is one; `base` another place of the base;
    `tasks` are those of lm-evaluation-harness; `samples` is the number of answers kept. Leaves eval.json in a run.

    Raises RecipeError, DataError, ModelError, AdapterError and RunDirError before a model is loaded; HealthStop where a
    loss is not finite. `result.is_worse()` names what is worse than the base with confidence.
    """
    from lorafit.data.cache import cache_directory
    from lorafit.evaluation.evaluate import evaluate as evaluated

    with no_room_is_said():
        return evaluated(
            os.path.expanduser(run),  # noqa: PTH111  # a Hub id is no path
            data=_path(data),
            merged=_path(merged),
            base=base,
            tasks=tasks,
            samples=samples,
            overrides=_overrides(set),
            counting=counting_in_lines,
            cache_dir=cache_directory(),
        )


def merge(
    run: StrPath,
    *,
    out: StrPath | None = None,
    dtype: Literal["bfloat16", "float16", "float32"] | None = None,
    max_shard_size: str | None = None,
    base: str | None = None,
    onto: Literal["original", "dequantized", "auto"] | None = None,
    verify: bool | None = None,
) -> MergeResult:
    """A standalone model of base + adapter in `out`, by default RUN/merged, that plain transformers loads.

    `run` is a run directory or a plain PEFT adapter directory. None for `dtype`, `onto` and `verify` is what the run's
    recipe says (`merge`); `max_shard_size` is as in `"5GB"`, by default the base's files.

    Raises AdapterError, ModelError and RunDirError before anything is written; VerificationError and DiskError leave
    nothing behind.
    """
    from lorafit.data.cache import cache_directory
    from lorafit.merging.merge import merge as merge_adapter

    with no_room_is_said():
        return merge_adapter(
            _path(run),
            out=_path(out),
            dtype=dtype,
            max_shard_size=max_shard_size,
            base=base,
            onto=onto,
            verify=verify,
            progress=partial(counting_in_lines, "merge: bytes written"),
            cache_dir=cache_directory(),
        )


def plan(
    recipe: StrPath | LoadedRecipe,
    *,
    gpu: str | None = None,
    count: int | None = None,
    model_shape: str | None = None,
    largest: bool = False,
    fix: bool = False,
    measure: bool = False,
) -> Plan:
    """Whether the recipe fits, in bytes, how fast it is, and what to change; nothing is downloaded or loaded.

    `gpu` is a name (`"a100-80"`), a size (`"24GiB"`) or `"cpu"`, by default what is here; `count` GPUs train together.
    `model_shape` is a shipped shape (`"llama3-8b"`) instead of the model. `largest` and `fix` look for the largest
    batch, length and rank that fit, and for the changes that make it fit (`result.fixed.change`); `measure` runs one
    step for real. It is reckoned in a process of its own.

    Raises RecipeError, ModelError and MachineError.
    """
    from lorafit.planning.ask_planner import Question, ask
    from lorafit.planning.ask_planner import measure as measured_too
    from lorafit.planning.gpus import asked_for

    loaded = _loaded(recipe)
    with no_room_is_said():
        one, number = asked_for(loaded.recipe.launch, gpu=gpu, count=count)
        question = Question(loaded, one, number, model_shape, with_largest=largest, with_fix=fix)
        found = ask(question)
        return measured_too(question, found) if measure else found


def rank_sweep(recipe: StrPath | LoadedRecipe, *, storage: str | None = None) -> SweepResult:
    """The smallest rank that is as good as the largest; a sweep that was begun in the output directory goes on.

    `storage` is an Optuna storage that several machines share: a database URL or a journal file. How many ranks, seeds
    and steps, the recipe says (`rank_sweep`); losses are in nats per token.

    Raises every LorafitError of training, and MachineError where it takes several processes, between which the command
    divides the trials.
    """
    from lorafit.data.cache import cache_directory
    from lorafit.sweep.sweep import rank_sweep as sweep

    loaded = _recipe_for_this_process(recipe, command="rank-sweep")
    with no_room_is_said():
        return sweep(loaded, storage=storage, cache_dir=cache_directory())


def _recipe_for_this_process(recipe: StrPath | LoadedRecipe, *, command: str) -> LoadedRecipe:
    """Raises MachineError where it takes several processes."""
    from lorafit.preflight import this_machine

    loaded = _loaded(recipe)
    refuse_several_processes(loaded, gpus=this_machine().gpus, command=command)
    return loaded


def _loaded(recipe: StrPath | LoadedRecipe) -> LoadedRecipe:
    return recipe if isinstance(recipe, LoadedRecipe) else load(recipe)


def _path(path: Any) -> Any:
    """A path of any kind, `~` with the home directory in it; None stays."""
    return None if path is None else Path(path).expanduser()


def _overrides(keys: Mapping[str, Any] | None) -> list[str]:
    """What `--set` would be given: JSON is YAML, and keeps a text that looks like a number one."""
    return [f"{key}={json.dumps(value, default=os.fspath)}" for key, value in (keys or {}).items()]
