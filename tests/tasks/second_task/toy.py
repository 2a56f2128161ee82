"""`training` of a second task."""

from pydantic import Field

from lorafit.recipe.sections.training import TrainingSection


class ToySection(TrainingSection):
    """Keys of `transformers.TrainingArguments`."""

    label_smoothing_factor: float = Field(default=0.0, ge=0, lt=1)
    """Share of the probability that is given to all tokens alike."""
