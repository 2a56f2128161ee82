"""The next token from those before it: what a model that learned it is measured by."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedConfig

from lorafit.tasks import TASKS
from lorafit.tasks.score import Score, ratio
from lorafit.tasks.sequences import SequenceLosses, sequence_losses

held_out = sequence_losses
"""[S] sums over each sequence, of which loss, accuracy and their intervals are made."""


def guessing(config: PreTrainedConfig) -> float:
    """Nats per token of a model that holds every token for equally likely, ln V."""
    return math.log(config.get_text_config().vocab_size)


def scores(losses: SequenceLosses, text_bytes: npt.NDArray[np.int64]) -> dict[str, Score]:
    """Loss in nats per trained token, its figure, bits per byte of the trained text, and token accuracy."""
    per_token = np.stack([losses.nll, losses.tokens], axis=1)
    per_byte = np.stack([losses.nll / math.log(2), text_bytes], axis=1)
    correct = np.stack([losses.correct, losses.tokens], axis=1).astype(np.float64)
    return {
        "loss": Score(per_token, ratio, False),
        TASKS["causal_lm"].figure.name: Score(per_token, lambda sums: np.exp(np.minimum(ratio(sums), 700)), False),
        "bits_per_byte": Score(per_byte, ratio, False),
        "token_accuracy": Score(correct, ratio, True),
    }
