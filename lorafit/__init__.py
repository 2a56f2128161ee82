"""One validated YAML recipe in, a LoRA or QLoRA adapter out.

    recipe = lorafit.load("recipe.yaml", set={"lora.r": 8})
    lorafit.validate(recipe)
    run = lorafit.train(recipe).run
    lorafit.evaluate(run)
    lorafit.merge(run)

Nothing is imported before it is used: the functions are those of `lorafit/api.py`.
"""

from logging import NullHandler, getLogger
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorafit.api import evaluate, load, merge, plan, rank_sweep, train, validate
    from lorafit.errors import (
        AdapterError,
        DataError,
        DiskError,
        HealthStop,
        LorafitError,
        MachineError,
        ModelError,
        Problem,
        RecipeError,
        RunDirError,
        StopRequested,
        VerificationError,
    )
    from lorafit.evaluation.eval_result import EvalResult
    from lorafit.merging.merge import MergeResult
    from lorafit.planning.plan_result import Plan
    from lorafit.recipe import LoadedRecipe
    from lorafit.sweep.sweep_result import SweepResult
    from lorafit.training.manifest import TrainResult
    from lorafit.validation import Validation
else:
    _FUNCTIONS = ("evaluate", "load", "merge", "plan", "rank_sweep", "train", "validate")
    _ERRORS = ("AdapterError", "DataError", "DiskError", "HealthStop", "LorafitError", "MachineError", "ModelError")
    _ERRORS += ("Problem", "RecipeError", "RunDirError", "StopRequested", "VerificationError")
    _MODULES = {
        **dict.fromkeys(_FUNCTIONS, "lorafit.api"),
        **dict.fromkeys(_ERRORS, "lorafit.errors"),
        "EvalResult": "lorafit.evaluation.eval_result",
        "LoadedRecipe": "lorafit.recipe",
        "MergeResult": "lorafit.merging.merge",
        "Plan": "lorafit.planning.plan_result",
        "SweepResult": "lorafit.sweep.sweep_result",
        "TrainResult": "lorafit.training.manifest",
        "Validation": "lorafit.validation",
    }

    def __getattr__(name: str) -> object:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        return getattr(import_module(_MODULES[name]), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *_MODULES})


getLogger(__name__).addHandler(NullHandler())  # who wants to read the lines says so: logging.basicConfig(level="INFO")

__version__ = "0.1.0"
__all__ = [
    "AdapterError",
    "DataError",
    "DiskError",
    "EvalResult",
    "HealthStop",
    "LoadedRecipe",
    "LorafitError",
    "MachineError",
    "MergeResult",
    "ModelError",
    "Plan",
    "Problem",
    "RecipeError",
    "RunDirError",
    "StopRequested",
    "SweepResult",
    "TrainResult",
    "Validation",
    "VerificationError",
    "evaluate",
    "load",
    "merge",
    "plan",
    "rank_sweep",
    "train",
    "validate",
]
