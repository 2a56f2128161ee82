"""A second task, to see that one can be added: what its models are measured by."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedConfig

from lorafit.tasks.score import Score, ratio
from lorafit.tasks.sequences import SequenceLosses, sequence_losses

held_out = sequence_losses


def scores(losses: SequenceLosses, text_bytes: npt.NDArray[np.int64]) -> dict[str, Score]:
    """The loss alone."""
    return {"loss": Score(np.stack([losses.nll, losses.tokens], axis=1), ratio, False)}


def guessing(config: PreTrainedConfig) -> float:
    """Of every token equally likely."""
    return math.log(config.get_text_config().vocab_size)
