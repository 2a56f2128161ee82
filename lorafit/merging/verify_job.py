"""What the two processes of a verification share: what they are told, how they load a model and ask it for logits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorafit.builders.auto_class import auto_class
from lorafit.merging.disk_names import float32_names
from lorafit.tasks import MODEL_KINDS, ModelKind

TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Floating types as a safetensors header spells them."""

BATCH = 8
LOGITS_KEPT = 2**26
"""256 MiB in float32; as many positions of a prompt are compared as fit."""
MOST_POSITIONS = 16


@dataclass(frozen=True)
class Job:
    """What is verified."""

    base: str
    adapter: str
    written: str
    work: str
    """Directory of what the first process leaves for the second."""
    task_type: str
    device: str
    """`cuda` or `cpu`: where there is room."""
    labels: int | None
    """Classes of a classification head."""
    rows: int
    """Of the embedding that the tokens need which the adapter trains by themselves."""
    trust_remote_code: bool
    dtype: str | None
    """Type that was asked for; None for each tensor's own."""
    types: dict[str, str]
    """Name of every floating tensor of the base on disk to its type there."""
    prompts: list[list[int]]

    @property
    def kind(self) -> ModelKind:
        """Of the models compared."""
        return MODEL_KINDS[self.task_type]

    @property
    def main_type(self) -> str:
        """Type of most of the written tensors."""
        return self.dtype or max(set(self.types.values()), key=list(self.types.values()).count)

    @property
    def weights(self) -> Path:
        """Tensors that the first process leaves."""
        return Path(self.work) / "reference.safetensors"


@dataclass(frozen=True)
class Difference:
    """Of two models' logits at the same positions."""

    largest: float
    usual: float
    """The largest but of one position in 100: a mixture of experts sends a token elsewhere over a last bit."""
    rms: float
    kl: float
    """Mean over positions of KL(other ‖ one), in nats."""
    top1: float
    """Share of positions where both prefer the same token."""

    @classmethod
    def of(cls, one: Tensor, other: Tensor) -> Difference:
        """`one` seen from `other`; both [positions, vocabulary]."""
        if one.shape != other.shape:
            return cls(largest=float("nan"), usual=float("nan"), rms=float("nan"), kl=float("nan"), top1=0.0)
        difference = one - other
        log_one, log_other = one.double().log_softmax(-1), other.double().log_softmax(-1)
        return cls(
            largest=float(difference.abs().max()),
            usual=float(difference.abs().amax(-1).quantile(0.99)),
            rms=float(difference.square().mean().sqrt()),
            kl=max(0.0, float((log_other.exp() * (log_other - log_one)).sum(-1).mean())),
            top1=float((one.argmax(-1) == other.argmax(-1)).double().mean()),
        )


def stored_types(model: PreTrainedModel, job: Job, names: Iterable[str]) -> dict[str, str]:
    """Name to the type it is stored in. Parameters that transformers keeps in float32 stay in it."""
    if job.dtype is None:
        return {name: job.types.get(name, job.main_type) for name in names}
    wide = float32_names(model, names, dtype=getattr(torch, job.dtype))
    return {name: "float32" if name in wide else job.dtype for name in names}


def load_model(
    job: Job, directory: str, *, labels: int | None = None
) -> tuple[PreTrainedModel, dict[str, Iterable[str]]]:
    """The model in float32 and transformers' account of loading it. What is stored in 16 bits is held as it is."""
    keys = {} if labels is None else {"num_labels": labels}
    model, loaded = auto_class(job.kind).from_pretrained(
        directory,
        dtype=torch.float32,
        device_map="cuda" if job.device == "cuda" else None,
        trust_remote_code=job.trust_remote_code,
        use_safetensors=True,
        output_loading_info=True,
        **keys,
    )
    return model.eval(), loaded


@torch.no_grad()
def logits(model: nn.Module, job: Job) -> Tensor:
    """[positions, vocabulary] in float32: some positions of every prompt, evenly spread, the last among them."""
    kept = []
    device = next(model.parameters()).device
    size = 1 if job.kind.reads_one_text else BATCH
    for start in range(0, len(job.prompts), size):
        prompts = job.prompts[start : start + size]
        ids = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)], mask[row, : len(prompt)] = torch.tensor(prompt), 1
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        if job.kind.is_encoder_decoder:
            inputs["decoder_input_ids"] = inputs["input_ids"]
        out = model(**inputs).logits.float().cpu()
        for row, prompt in zip(out, prompts, strict=True):
            kept.append(row[None] if row.dim() == 1 else row[_positions(len(prompt), row.shape[-1], len(job.prompts))])
    return torch.cat(kept)


def _positions(length: int, vocabulary: int, prompts: int) -> Tensor:
    count = min(length, MOST_POSITIONS, max(1, LOGITS_KEPT // (vocabulary * prompts)))
    return torch.linspace(length - 1, 0, count).round().long()
