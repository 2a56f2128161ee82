"""Loss of a model on held-out sequences, one by one: what every comparison is paired on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import datasets
import numpy as np
import numpy.typing as npt
import torch
from peft import PeftModel
from torch import Tensor, nn

from lorafit.data.tokens import NOT_TRAINED
from lorafit.pulse import Counted, uncounted

BATCH_TOKENS = 4096
"""Padded tokens of one forward pass, where the caller knows no better."""

LOGITS_AT_ONCE = 2**20
"""Values of the logits that may be held at a time, for a small model: 4 MiB in float32. All of a batch's may be larger
than the model; of a large one they are a hundredth of it, since each time the output head is read anew."""


@dataclass(frozen=True)
class SequenceLosses:
    """What a model makes of each sequence, in the order of the rows."""

    nll: npt.NDArray[np.float64]
    """[S] Negative log-likelihood of the trained tokens, summed, in nats."""
    tokens: npt.NDArray[np.int64]
    """[S] Trained tokens."""
    correct: npt.NDArray[np.int64]
    """[S] Trained tokens that the model would have chosen itself."""

    @property
    def loss(self) -> float:
        """Nats per trained token of all sequences together."""
        return float(self.nll.sum() / max(1, self.tokens.sum()))

    @property
    def token_accuracy(self) -> float:
        """Share of the trained tokens that the model would have chosen itself."""
        return float(self.correct.sum() / max(1, self.tokens.sum()))


@torch.no_grad()
def sequence_losses(
    model: nn.Module,
    rows: datasets.Dataset,
    *,
    pad_token_id: int,
    batch_tokens: int = BATCH_TOKENS,
    counted: Counted = uncounted,
) -> SequenceLosses:
    """Losses of `rows` (columns `input_ids` and `labels`), in batches of sequences of about one length.

    A batch holds at most `batch_tokens` tokens with its padding, or one row. Two models are given the same batches, so
    equal models get equal losses to the last bit. `counted` hears of every batch.
    """
    all_ids, all_labels = rows["input_ids"][:], rows["labels"][:]
    nll, tokens, correct = np.zeros(len(rows)), np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    device = next(inner.parameters()).device
    was_training = model.training
    model.eval()
    try:
        score = _scorer(inner, device=device)
        for batch in batches_by_length([len(ids) for ids in all_ids], batch_tokens=batch_tokens):
            input_ids = _padded([all_ids[row] for row in batch], pad_token_id).to(device)
            labels = _padded([all_labels[row] for row in batch], NOT_TRAINED).to(device)[:, 1:]
            is_trained = labels != NOT_TRAINED
            sequence_of_token = is_trained.nonzero()[:, 0]
            token_nll, is_correct = score(input_ids, is_trained, labels[is_trained])
            sums = torch.zeros(len(batch), 3, dtype=torch.float64, device=device)
            values = torch.stack([token_nll.double(), torch.ones_like(token_nll).double(), is_correct.double()], dim=1)
            sums.index_add_(0, sequence_of_token, values)
            nll[batch], tokens[batch], correct[batch] = sums.T.cpu().numpy()
            counted(len(batch))
    finally:
        model.train(was_training)
    return SequenceLosses(nll, tokens, correct)


def batches_by_length(lengths: Sequence[int], *, batch_tokens: int) -> Iterator[list[int]]:
    """Row numbers in batches, longest first: what does not fit into memory shows at once."""
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _padded(rows: Sequence[Sequence[int]], filler: int) -> Tensor:
    """[B, T] padded on the right: in a causal model no token sees what follows it, so no mask is needed."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[filler] * (longest - len(row))] for row in rows])


class _HeadApart:
    """Runs the layers over a batch, and the output head only where tokens are trained, a few at a time."""

    def __init__(self, model: nn.Module) -> None:
        self._decoder = model.get_decoder()  # type: ignore[operator]
        self._head = model.get_output_embeddings()  # type: ignore[operator]
        weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        self._logits_at_once = max(LOGITS_AT_ONCE, weights // 100 // 12)  # float32, with what its sum of exps takes

    def logits(self, hidden: Tensor) -> Tensor:
        return self._head(hidden.to(self._head.weight.dtype) if hasattr(self._head, "weight") else hidden)

    def hidden(self, input_ids: Tensor) -> Tensor:
        return self._decoder(input_ids=input_ids, use_cache=False).last_hidden_state

    def __call__(self, input_ids: Tensor, is_trained: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.hidden(input_ids)[:, :-1][is_trained]
        vocabulary = self.logits(hidden[:1]).shape[-1]
        size = max(1, self._logits_at_once // vocabulary)
        parts = [
            _judge(self.logits(some), wanted)
            for some, wanted in zip(hidden.split(size), targets.split(size), strict=True)
        ]
        return torch.cat([nll for nll, _ in parts]), torch.cat([right for _, right in parts])


class _WholeLogits:
    """The model's own logits, a sequence at a time: for models that do more to them than their output head."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __call__(self, input_ids: Tensor, is_trained: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        wanted = targets.split(is_trained.sum(dim=1).tolist())
        parts = [
            _judge(self._model(input_ids=ids[None], use_cache=False).logits[0, :-1][trained], some)
            for ids, trained, some in zip(input_ids, is_trained, wanted, strict=True)
        ]
        return torch.cat([nll for nll, _ in parts]), torch.cat([right for _, right in parts])


def _judge(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each target, and whether it is the likeliest token."""
    logits = logits.float()
    nll = torch.logsumexp(logits, dim=-1) - logits.gather(-1, targets[:, None])[:, 0]
    return nll, logits.argmax(dim=-1) == targets


def _scorer(model: nn.Module, *, device: torch.device) -> _HeadApart | _WholeLogits:
    """The way that leaves most memory free; some models scale or cap what comes out of the head (Gemma, Granite)."""
    probe = torch.arange(1, 9, device=device)[None]
    whole = model(input_ids=probe, use_cache=False).logits[0].float()
    try:
        apart = _HeadApart(model)
    except AttributeError:  # a model that does not say which of its modules is what
        return _WholeLogits(model)
    logits = apart.logits(apart.hidden(probe))[0].float()
    same = logits.shape == whole.shape and torch.allclose(logits, whole, rtol=1e-3, atol=1e-3, equal_nan=True)
    return apart if same else _WholeLogits(model)
