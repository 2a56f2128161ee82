"""The next token from those before it: what a model that learned it is measured by."""

from __future__ import annotations

import math

from transformers import PreTrainedConfig

from lorafit.tasks.sequences import sequence_losses

held_out = sequence_losses
"""[S] sums over each sequence, of which loss, accuracy and their intervals are made."""


def guessing(config: PreTrainedConfig) -> float:
    """Nats per token of a model that holds every token for equally likely, ln V."""
    return math.log(config.get_text_config().vocab_size)
