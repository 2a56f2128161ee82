"""The sections of a recipe: one frozen model each, keys spelt as the library spells them."""

from lorafit.recipe.sections.base import Section
from lorafit.recipe.sections.data import DataSection, Source
from lorafit.recipe.sections.evaluation import EvalSection, GenerateSection
from lorafit.recipe.sections.health import HealthSection
from lorafit.recipe.sections.lora import AdaLoraSection, LoraSection
from lorafit.recipe.sections.model import ModelSection
from lorafit.recipe.sections.quantization import QuantizationSection
from lorafit.recipe.sections.rank_sweep import RankSweepSection
from lorafit.recipe.sections.run import (
    CheckpointsSection,
    EarlyStoppingSection,
    LaunchSection,
    MergeSection,
    OptimizerSection,
)
from lorafit.recipe.sections.speed import SpeedSection
from lorafit.recipe.sections.training import SFTSection, TrainingSection

__all__ = [
    "AdaLoraSection",
    "CheckpointsSection",
    "DataSection",
    "EarlyStoppingSection",
    "EvalSection",
    "GenerateSection",
    "HealthSection",
    "LaunchSection",
    "LoraSection",
    "MergeSection",
    "ModelSection",
    "OptimizerSection",
    "QuantizationSection",
    "RankSweepSection",
    "SFTSection",
    "Section",
    "Source",
    "SpeedSection",
    "TrainingSection",
]
