"""An adapter on its base model in outline: which weight it changes and how, without a weight of the base in memory.

peft itself attaches the adapter, to a model whose weights take no memory, and loads its file into it. What it takes for
the rank, the scale, the orientation of a weight and the place of a tensor is read off its modules, not worked out anew.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel
from peft.tuners.adalora.layer import SVDLinear
from peft.tuners.lora.layer import Embedding, Linear, LoraLayer, ParamWrapper
from peft.tuners.lora.variants import DoraEmbeddingVariant, DoraLinearVariant
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from lorafit.builders.auto_class import auto_class
from lorafit.builders.library_config import CONFIG_ERRORS, load_config
from lorafit.builders.model_files import BaseModelFiles
from lorafit.errors import AdapterError, ModelError
from lorafit.merging.adapter_files import Adapter
from lorafit.merging.deltas import (
    AddBias,
    AddLowRank,
    Change,
    LowRank,
    ReplaceRows,
    ScaleColumns,
    ScaleRows,
    experts_of,
)
from lorafit.merging.disk_names import DiskNames, disk_names, float32_names
from lorafit.tasks import model_kind

HARMLESS_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base as it is; after the others peft changes it at every loading."""
LABEL_HEADS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")


@dataclass(frozen=True)
class AdaptedModel:
    """What an adapter makes of its base."""

    config: PreTrainedConfig
    """The base's, with the vocabulary and the labels of the adapter."""
    class_name: str
    """Of the model in transformers."""
    shapes: Mapping[str, torch.Size]
    """Every parameter and buffer that is saved, by its name in memory; tied ones by each of their names."""
    tied: Sequence[tuple[str, ...]]
    """Groups of names of one parameter."""
    on_disk: DiskNames
    float32: frozenset[str]
    """Names of parameters that stay float32 whatever the type of the model."""
    changes: Mapping[str, Change]
    """By parameter name."""
    values: Mapping[str, Tensor]
    """Parameters that the adapter file holds whole."""
    obstacles: Sequence[str]
    """Why this cannot be merged weight by weight; none when it can."""


def adapted_model(adapter: Adapter, base_files: BaseModelFiles, *, dtype: torch.dtype) -> AdaptedModel:
    """The outline of `adapter` on its base. Raises AdapterError when its tensors are not those peft expects."""
    if adapter.config.get("layer_replication"):
        message = "repeats layers of the base that share their weights (layer_replication): each would get the sum of"
        raise AdapterError(
            f"{message} their updates in a merged model; use it with peft, unmerged", where=str(adapter.directory)
        )
    config = load_config(adapter.base, directory=base_files.directory)
    model = _fitted_outline(adapter, config)
    names = {module: name for name, module in model.named_modules()}
    hollow = set(model.parameters())
    on_disk = disk_names(model, base_files.tensors)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    tied = _tied(model)
    obstacles = list(_settings_that_change_the_base(adapter))
    changes: dict[str, Change] = {}
    values: dict[str, Tensor] = {}
    attached = _attach(adapter, model)
    if not obstacles:
        obstacles = list(_read_changes(attached, names, changes))
        values = _values(attached, names, tied, hollow=hollow)
    return AdaptedModel(
        config=config,
        class_name=type(model).__name__,
        shapes=shapes,
        tied=tied,
        on_disk=on_disk,
        float32=float32_names(model, shapes, dtype=dtype),
        changes=changes,
        values=values,
        obstacles=obstacles,
    )


def refuse_misfit(adapter: Adapter, base_files: BaseModelFiles) -> None:
    """Refuse an adapter of which peft would leave something out, or leave something as it starts, on this base.

    Raises AdapterError, ModelError.
    """
    model = _fitted_outline(adapter, load_config(adapter.base, directory=base_files.directory))
    whole = _vocabulary(adapter, model)
    matrices = {module.weight for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module}
    there = base_files.tensors.get(next(iter(whole), ""))
    if there and max(whole.values()) != there.shape[0] and len(whole) < len(matrices):
        message = f"has {max(whole.values())} rows of {next(iter(whole))} alone, where the base has {there.shape[0]}"
        raise AdapterError(f"{message}: the rows of its counterpart are missing", where=str(adapter.weights))
    _attach(adapter, model)


def _fitted_outline(adapter: Adapter, config: PreTrainedConfig) -> PreTrainedModel:
    """The base in outline, with the vocabulary and the labels of the adapter, which `config` is given. Raises
    ModelError."""
    model = outline(adapter, config)
    return outline(adapter, config) if _fit_to_adapter(config, adapter, model) else model


def outline(adapter: Adapter, config: PreTrainedConfig) -> PreTrainedModel:
    """The model with zeros that take no memory for its weights, of the class that the adapter was trained on."""
    of_task = auto_class(model_kind(adapter.config.get("task_type")))
    if type(config) not in of_task._model_mapping and not adapter.base.trust_remote_code:
        # Some models of text and images are known by their own class alone.
        of_task = getattr(transformers, (config.architectures or [""])[0], of_task)
    build = of_task.from_config if hasattr(of_task, "from_config") else of_task._from_config
    keys = {"trust_remote_code": True} if adapter.base.trust_remote_code else {}
    try:
        with torch.device("meta"):
            model = build(config, dtype=torch.float32, **keys)
    except (*CONFIG_ERRORS, ImportError, RuntimeError) as error:
        raise ModelError(
            f"transformers cannot build it: {_one_line(error)}", where=adapter.base.model_name_or_path
        ) from error
    # peft puts an adapter on the device of its base; on the meta device it would lose its values.
    hollow: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in hollow:
                hollow[parameter] = nn.Parameter(torch.zeros(()).expand(parameter.shape), requires_grad=False)
            setattr(module, name, hollow[parameter])
    return model


def _fit_to_adapter(config: PreTrainedConfig, adapter: Adapter, model: PreTrainedModel) -> bool:
    """Give `config` the rows of the embedding and the labels that the adapter holds; whether they are others."""
    rows = _vocabulary(adapter, model).values()
    text_config = config.get_text_config()
    changed = False
    wanted = max(rows or [text_config.vocab_size, adapter.rows_needed])
    if wanted != text_config.vocab_size:
        text_config.vocab_size, changed = wanted, True
    labels = [tensor.shape[0] for name, tensor in adapter.tensors.items() if name.endswith(LABEL_HEADS)]
    if model_kind(adapter.config.get("task_type")).has_labels and labels and labels[0] != config.num_labels:
        config.num_labels, changed = labels[0], True
    return changed


def _vocabulary(adapter: Adapter, model: PreTrainedModel) -> dict[str, int]:
    """Embedding and output head to their rows, where the adapter's file holds them whole."""
    names = {module: name for name, module in model.named_modules()}
    embeddings = (names[model.get_input_embeddings()], names.get(model.get_output_embeddings()))
    return {
        f"{module}.weight": tensor.shape[0]
        for name, tensor in adapter.tensors.items()
        for module in embeddings
        if name.removeprefix("base_model.model.") in (f"{module}.weight", f"{module}.base_layer.weight")
    }


def _tied(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    groups: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(parameter, []).append(name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def _settings_that_change_the_base(adapter: Adapter) -> Iterator[str]:
    start = adapter.config.get("init_lora_weights", True)
    if start not in HARMLESS_STARTS:
        yield f"init_lora_weights {start!r} changes the base's own weights when it is loaded"


def _attach(adapter: Adapter, model: PreTrainedModel) -> PeftModel:
    """`model` with the adapter, whose weights alone are in memory.

    Raises AdapterError when there are tensors missing, or too many: peft takes both without a word.
    """
    where = str(adapter.directory)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's advice on tied weights and unused patterns is checked for here
            settings = PeftConfig.from_pretrained(where)
            settings.inference_mode, settings.init_lora_weights = True, False
            # AdaLoRA cuts its matrices to their ranks before they are loaded, and for that they must be there.
            is_empty = adapter.config["peft_type"] != "ADALORA"
            attached = PeftModel(model, settings, autocast_adapter_dtype=False, low_cpu_mem_usage=is_empty)
            result = attached.load_adapter(
                where, "default", torch_device="cpu", autocast_adapter_dtype=False, low_cpu_mem_usage=True
            )
    except KeyError as error:
        raise AdapterError(f"lacks {error.args[0]}: copy the whole adapter again", where=str(adapter.weights)) from None
    except (ValueError, TypeError, RuntimeError, NotImplementedError, ImportError, AttributeError) as error:
        raise AdapterError(f"peft cannot attach it to this base: {_one_line(error)}", where=where) from error
    if unused := sorted(name for name in result.unexpected_keys if not _is_second_copy(name, adapter)):
        raise AdapterError(
            f"nothing in this base takes {_some(unused)}: the weights, adapter_config.json and the base do not belong "
            "together",
            where=str(adapter.weights),
        )
    if missing := sorted(name.replace(".default", "") for name in result.missing_keys):
        message = (
            f"lacks {_some(missing)}: it was trained on another base, or is not whole: copy the whole adapter again"
        )
        raise AdapterError(message, where=str(adapter.weights))
    return attached


def _is_second_copy(name: str, adapter: Adapter) -> bool:
    """Of a larger vocabulary peft saves a module that was trained whole twice, under two names."""
    first = name.replace(".modules_to_save.", ".")
    if first == name or not {name, first} <= adapter.tensors.keys():
        return False
    with safe_open(adapter.weights, framework="pt") as file:
        return torch.equal(file.get_tensor(name), file.get_tensor(first))


def _values(
    attached: PeftModel, names: Mapping[nn.Module, str], tied: Sequence[Sequence[str]], *, hollow: set[nn.Parameter]
) -> dict[str, Tensor]:
    """Parameters of the base that the adapter's file held whole: trained biases and embeddings saved along."""
    values = {}
    for module, name in names.items():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter not in hollow:
                full = f"{name}.{key}" if name else key
                # Into a tied weight peft loads in place: all its names change.
                values.update(dict.fromkeys(next((group for group in tied if full in group), (full,)), parameter.data))
    for module in attached.modules():
        if isinstance(module, ModulesToSaveWrapper):
            prefix = names[module.original_module]
            values |= {
                f"{prefix}.{key}": value for key, value in module.modules_to_save["default"].state_dict().items()
            }
    return values


def _read_changes(attached: PeftModel, names: Mapping[nn.Module, str], changes: dict[str, Change]) -> Iterator[str]:
    """Put every module's change into `changes`; yields what cannot be told weight by weight."""
    for module in attached.modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        base = names[module.get_base_layer()]
        kind = type(module)
        variant = (
            type(module.lora_variant["default"]) if isinstance(module, LoraLayer) and module.lora_variant else None
        )
        found: list[tuple[str, Change]]
        if type(module) is Linear and variant in (None, DoraLinearVariant):
            found = _linear(module)
        elif type(module) is Embedding and variant in (None, DoraEmbeddingVariant):
            found = _embedding(module)
        elif type(module) is ParamWrapper and variant is None:
            found = _parameter(module)
        elif type(module) is SVDLinear:
            found = _adalora(module)
        elif type(module) is TrainableTokensLayer:
            found = _tokens(module)
        else:
            yield f"{base} is adapted by peft's {kind.__name__}{f' with {variant.__name__}' if variant else ''}"
            continue
        for parameter, change in found:
            full = f"{base}.{parameter}" if base else parameter
            if full in changes:
                yield f"{full} is changed twice"
            changes[full] = change


def _tensor(layers: nn.ModuleDict, name: str = "weight") -> Tensor:
    """What the adapter trained in one of a module's layers."""
    return layers["default"].get_parameter(name).data.float()


def _linear(module: Linear) -> list[tuple[str, Change]]:
    a, b = _tensor(module.lora_A), _tensor(module.lora_B)
    scale, transposed = float(module.scaling["default"]), module.fan_in_fan_out
    found = [("weight", _plain_or_dora(module, LowRank(a.T, b.T, scale) if transposed else LowRank(b, a, scale)))]
    if module.lora_bias["default"]:
        found.append(("bias", AddBias(_tensor(module.lora_B, "bias"), scale)))
    return found


def _plain_or_dora(module: Linear | Embedding, low_rank: LowRank) -> Change:
    if not module.lora_variant:
        return AddLowRank((low_rank,))
    magnitude = _tensor(module.lora_magnitude_vector)
    if isinstance(module, Embedding) or module.fan_in_fan_out:
        return ScaleColumns(low_rank, magnitude, torch.zeros(len(magnitude), dtype=torch.float64))
    return ScaleRows(low_rank, magnitude)


def _embedding(module: Embedding) -> list[tuple[str, Change]]:
    a, b = module.lora_embedding_A["default"].data.float(), module.lora_embedding_B["default"].data.float()
    return [("weight", _plain_or_dora(module, LowRank(a.T, b.T, float(module.scaling["default"]))))]


def _parameter(module: ParamWrapper) -> list[tuple[str, Change]]:
    a, b = _tensor(module.lora_A), _tensor(module.lora_B)
    scale = float(module.scaling["default"])
    if module.get_param().dim() == 2:
        return [(module.parameter_name, AddLowRank((LowRank(b, a, scale),)))]
    transposed = not module._did_swap_in_out_features
    factors = tuple(experts_of(a, b, count=module.num_experts, scale=scale, is_transposed=transposed))
    return [(module.parameter_name, AddLowRank(factors))]


def _adalora(module: SVDLinear) -> list[tuple[str, Change]]:
    factors: tuple[Any, Any] = module.lora_A, module.lora_B  # of parameters, which LoRA's own class has of layers
    a = (factors[0]["default"] * module.lora_E["default"]).data.float()
    b, scale = factors[1]["default"].data.float(), float(module.scaling["default"])
    divisor = float(module.ranknum["default"] + 1e-5)  # as in peft's SVDLinear
    if module.fan_in_fan_out:
        return [("weight", AddLowRank((LowRank(a.T, b.T, scale, divisor),)))]
    return [("weight", AddLowRank((LowRank(b, a, scale, divisor),)))]


def _tokens(module: TrainableTokensLayer) -> list[tuple[str, Change]]:
    rows = torch.tensor(module.token_indices["default"])
    return [("weight", ReplaceRows(rows, module.trainable_tokens_delta["default"].data))]


def _some(names: Sequence[str]) -> str:
    listed = ", ".join(names[:3])
    return f"{len(names)} tensors ({listed}, ...)" if len(names) > 3 else listed


def _one_line(text: Exception | str) -> str:
    return " ".join(str(text).split())[:300]
