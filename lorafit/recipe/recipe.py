"""The whole recipe: what one YAML file may say."""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from lorafit.recipe.sections import (
    AdaLoraSection,
    CheckpointsSection,
    DataSection,
    EarlyStoppingSection,
    EvalSection,
    HealthSection,
    LaunchSection,
    LoraSection,
    MergeSection,
    ModelSection,
    OptimizerSection,
    QuantizationSection,
    RankSweepSection,
    Section,
    SFTSection,
    SpeedSection,
    TrainingSection,
)
from lorafit.recipe.sections.base import Names
from lorafit.tasks import DEFAULT_TASK, TASKS, Task, TaskName


class Recipe(Section):
    """One training run. Frozen: nothing changes a recipe after it is loaded.

    Paths are absolute here: `load` resolves them against the file they were written in.
    """

    TASK: ClassVar[Task]
    """That whose keys `training` takes."""

    output_dir: str | None = Field(default=None, min_length=1)
    """Run directory, relative to where the command is run. null means `runs/<name of the recipe>`."""

    task: TaskName = DEFAULT_TASK.name
    """What is trained, and whose keys `training` has: `causal_lm`, next-token prediction, those of `trl.SFTConfig`."""

    model: ModelSection
    quantization: QuantizationSection | None = None
    lora: LoraSection = LoraSection()
    adalora: AdaLoraSection | None = None
    data: DataSection
    training: TrainingSection = TrainingSection()
    optimizer: OptimizerSection = OptimizerSection()
    early_stopping: EarlyStoppingSection | None = None
    checkpoints: CheckpointsSection = CheckpointsSection()
    speed: SpeedSection = SpeedSection()
    health: HealthSection = HealthSection()
    launch: LaunchSection = LaunchSection()
    eval: EvalSection = EvalSection()
    merge: MergeSection = MergeSection()
    rank_sweep: RankSweepSection = RankSweepSection()

    silence: Names = ()
    """Advice not to print again, by the name each piece of advice ends with."""


class CausalLmRecipe(Recipe):
    """A run of supervised fine-tuning."""

    TASK = TASKS["causal_lm"]

    training: SFTSection = SFTSection()


RECIPES: Mapping[TaskName, type[Recipe]] = {one.TASK.name: one for one in (CausalLmRecipe,)}
"""By what `task` says: it chooses the class of `training`, whose keys are the library's own."""

DEFAULT_RECIPE = RECIPES[DEFAULT_TASK.name]


def recipe_class(tree: Mapping[str, Any]) -> type[Recipe]:
    """That of the task which a recipe names; of the default one where it names none that there is."""
    return next((RECIPES[name] for name in RECIPES if name == tree.get("task")), DEFAULT_RECIPE)
