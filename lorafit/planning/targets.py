"""`lorafit targets`: the modules of a model that an adapter can sit on, from config.json alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast

import torch
import transformers
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

from lorafit.builders.auto_class import auto_class
from lorafit.tasks import DEFAULT_TASK

Part = Literal["attention", "feed-forward", "experts", "router", "embedding", "head", "other"]


@dataclass(frozen=True)
class Target:
    """Modules of one name and shape. `name` is what `lora.target_modules` (experts: `target_parameters`) says."""

    name: str
    kind: Literal["Linear", "Conv1D", "Embedding", "experts", "router"]
    shape: tuple[int, ...]
    """(out, in); experts (experts, out, in); an embedding (rows, width)."""
    count: int
    part: Part
    all_linear: bool
    """Whether `target_modules: all-linear` takes them: of some mixtures peft takes the experts and the router along."""
    all_linear_rank: int
    """The rank they get by that: peft gives experts whose gate and up are one parameter the ranks of both."""
    parameters: int
    """Of the weights, all modules together."""
    lora_parameters: int
    """Of the adapter at the rank asked for, all modules together: r x (in + out) each."""


@dataclass(frozen=True)
class Choice:
    """Some of a model's targets, to paste into a recipe."""

    names: tuple[str, ...]
    lora_parameters: int


@dataclass(frozen=True)
class TargetTable:
    """What `lora.target_modules` may say for one model."""

    architecture: str
    parameters: int
    r: int
    targets: tuple[Target, ...]

    def all_linear(self) -> Choice:
        """What `target_modules: all-linear` takes: every linear layer but the output head (QLoRA, arXiv 2305.14314)."""
        names = (target.name for target in self.targets if target.all_linear)
        taken = (target for target in self.targets if target.all_linear)
        return Choice(tuple(dict.fromkeys(names)), sum(t.lora_parameters * t.all_linear_rank // self.r for t in taken))

    def takes_experts(self) -> bool:
        """Whether `all-linear` adapts experts, which are no linear layers."""
        return any(target.all_linear for target in self.targets if target.part == "experts")

    def attention(self) -> Choice:
        """The attention matrices only (LoRA, arXiv 2106.09685)."""
        return _choice(target for target in self.targets if target.part == "attention")

    def experts(self) -> Choice:
        """The fused experts of a mixture, which are parameters, not modules; empty for other models."""
        return _choice(target for target in self.targets if target.part == "experts")

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        chosen = {"all_linear": self.all_linear(), "attention": self.attention(), "experts": self.experts()}
        choices = {name: asdict(choice) for name, choice in chosen.items()}
        return {**asdict(self), **choices}


def _choice(targets: Iterable[Target]) -> Choice:
    chosen = list(targets)
    names = tuple(dict.fromkeys(target.name for target in chosen))
    return Choice(names, sum(target.lora_parameters for target in chosen))


def target_table(config: PreTrainedConfig, *, r: int = 16) -> TargetTable:
    """The table for an architecture, counted on a model of meta tensors: no memory, whatever the size."""
    model = _meta_model(config)
    along = _taken_along(model, r=r)
    found = list(_found(model, along))
    tails = {tail for tail, *_ in found}
    short = Counter(tail.rpartition(".")[2] for tail in tails)
    groups = Counter((tail, kind, shape, part) for tail, kind, shape, part, _ in found)
    all_linear = {(tail, shape) for tail, _, shape, _, takes in found if takes}
    targets = []
    for (tail, kind, shape, part), count in groups.items():
        name = tail if kind in ("experts", "router") or short[tail.rpartition(".")[2]] > 1 else tail.rpartition(".")[2]
        experts, out_features, in_features = (1, *shape)[-3:]
        targets.append(
            Target(
                name=name,
                kind=kind,
                shape=shape,
                count=count,
                part=part,
                all_linear=(tail, shape) in all_linear,
                all_linear_rank=_rank_of(along, tail, r=r) if (tail, shape) in all_linear else 0,
                parameters=count * experts * out_features * in_features,
                lora_parameters=count * experts * r * (out_features + in_features),
            )
        )
    return TargetTable(type(model).__name__, model.num_parameters(), r, tuple(targets))


def _meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The class config.json names, else the one that would be trained, else the bare model."""
    named = getattr(transformers, (config.architectures or [""])[0], None)
    with torch.device("meta"):
        if isinstance(named, type) and issubclass(named, PreTrainedModel):
            return cast(type[Any], named)._from_config(config)
        is_trained = config.model_type in getattr(modeling_auto, DEFAULT_TASK.bases.table)
        return (auto_class(DEFAULT_TASK.model) if is_trained else AutoModel).from_config(config)


@dataclass(frozen=True)
class TakenAlong:
    """Parameters that `all-linear` takes besides linear layers, and patterns of names with ranks of their own."""

    target_parameters: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)


def _taken_along(model: PreTrainedModel, *, r: int) -> TakenAlong:
    """What peft makes of `all-linear` on this model, before it looks for linear layers: something else only where
    transformers renames or fuses weights."""
    if get_checkpoint_conversion_mapping(model.config.model_type) is None:
        return TakenAlong()
    from peft import LoraConfig  # a second, which most architectures do without
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    chosen = LoraConfig(r=r, target_modules="all-linear")
    convert_peft_config_for_transformers(chosen, model, None)
    return TakenAlong(tuple(chosen.target_parameters or ()), chosen.rank_pattern or {})


def _is_taken(along: TakenAlong, name: str) -> bool:
    return any(name == one or name.endswith(f".{one}") for one in along.target_parameters)


def _rank_of(along: TakenAlong, name: str, *, r: int) -> int:
    """`name` begins within a layer."""
    matching = (rank for pattern, rank in along.rank_pattern.items() if re.fullmatch(pattern, f".{name}"))
    return next(matching, r)


def _found(model: PreTrainedModel, along: TakenAlong) -> Iterator[tuple[str, Any, tuple[int, ...], Part, bool]]:
    """(name within its layer, kind, shape, part, whether all-linear takes it) of every module and expert parameter."""
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        tail, in_layer = _tail(name)
        if isinstance(module, (torch.nn.Linear, Conv1D)):
            kind = "Conv1D" if isinstance(module, Conv1D) else "Linear"
            shape = tuple(module.weight.shape)[:: -1 if kind == "Conv1D" else 1]  # Conv1D stores (in, out)
            yield tail, kind, shape, _part(name, in_layer=in_layer, is_head=module is head), module is not head
        elif isinstance(module, torch.nn.Embedding):
            yield tail, "Embedding", tuple(module.weight.shape), "embedding", False
        else:
            for own, parameter in module.named_parameters(recurse=False):
                full, is_taken = f"{tail}.{own}", _is_taken(along, f"{name}.{own}")
                if parameter.ndim == 3 and "expert" in name:
                    order = (0, 2, 1) if getattr(module, "is_transposed", False) else (0, 1, 2)
                    yield full, "experts", tuple(parameter.shape[axis] for axis in order), "experts", is_taken
                elif parameter.ndim == 2 and is_taken:
                    yield full, "router", tuple(parameter.shape), "router", True


def _tail(name: str) -> tuple[str, bool]:
    """What follows the last layer index in a module's name, and whether there was one."""
    parts = re.split(r"\.\d+\.", name)
    return parts[-1], len(parts) > 1


def _part(name: str, *, in_layer: bool, is_head: bool) -> Part:
    if is_head:
        return "head"
    if not in_layer:
        return "other"
    return "attention" if re.search(r"attn|attention", name) else "feed-forward"
