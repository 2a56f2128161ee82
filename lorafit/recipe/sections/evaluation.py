"""`eval`: what `lorafit eval` measures of the run."""

from typing import Annotated, Literal

from pydantic import Field, Strict

from lorafit.recipe.sections.base import Names, Section
from lorafit.recipe.sections.data import Source

Metric = Literal["exact_match", "rouge_l", "bleu", "chrf", "json_valid", "classification"]


class GenerateSection(Section):
    """Answers that the models write themselves to the prompts of the held-out rows, compared with those of the rows."""

    max_new_tokens: int = Field(default=256, ge=1)
    """Longest answer; generation stops earlier on the model's stop tokens. Time and cache memory grow with it."""

    metrics: Annotated[tuple[Metric, ...], Strict(False)] = Field(default=("exact_match", "rouge_l"), min_length=1)
    """`exact_match`: the answer is the row's, up to white space. `rouge_l`: F1 of the longest common subsequence of
    words. `bleu`, `chrf`: sacrebleu's; chrF is the mean over sentences. `json_valid`: the answer is JSON.
    `classification`: accuracy, F1 of each label and confusion; the labels are the answers of the rows."""

    answer: str | None = Field(default=None, min_length=1)
    """Regular expression that finds the answer in a text: its last match counts, of that the first group if it has one
    (`'#### (\\S+)'` for GSM8K). For exact_match, json_valid and classification. null means the whole text."""

    answers_at_once: int | None = Field(default=None, ge=1)
    """Answers written at a time. null: as many as need no more memory than 3 % of the model (32 MiB at least).
    Where memory is free, more are quicker."""

    limit: int | None = Field(default=None, ge=1)
    """Answer only so many rows, spread evenly over the held-out ones. null means all."""


class EvalSection(Section):
    """What `lorafit eval` measures. `train` reads none of it."""

    compare_base: bool = True
    """Measure the base model too: every figure of the adapter then has its difference with an interval. Doubles the
    time."""

    generate: GenerateSection | None = None
    """Generate answers and compare them with those of the held-out rows. null means losses only: far quicker."""

    general: Annotated[tuple[Source, ...], Strict(False)] = ()
    """Sources of general text that the adapter should not have become worse on. Empty: text that the base model writes
    by itself; the adapter's loss on it, less the base's, is how far it has moved away (KL divergence)."""

    tasks: Names = ()
    """Tasks of lm-evaluation-harness (`pip install 'lorafit[eval]'`): names, or paths of task files (`.yaml`), relative
    to the recipe."""
