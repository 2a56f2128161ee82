"""What lorafit overrides, sets and reads in its libraries is there, with the parameters that we use.

The tables say on what lorafit leans; the code is read for what it really does. A hook that a library drops, and one
that is added here without a word in the tables, fail with the place.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from typing import Any

import datasets
import optuna
import pytest
import torch
import transformers
from peft.tuners.lora.layer import ParamWrapper
from transformers import PreTrainedConfig, PreTrainedModel, Trainer, TrainingArguments

from support import seams

OVERRIDDEN = {
    "optuna.BaseJournalFileLock": "acquire",
    "jinja2.CodeGenerator": "blockvisit buffer macro_body visit_Assign visit_For visit_With",
    "jinja2.Extension": "parse",
    "torch.Module": "forward",
    "torch.TorchDispatchMode": "__torch_dispatch__",
    "torch.TorchFunctionMode": "__torch_function__",
    "torch._SingleLevelFunction": "backward forward",
    "transformers.ExportableState": "state",
    "transformers.Trainer": "_determine_best_metric _get_grad_norm _get_output_dir _init_training_state "
    "_load_best_model _load_callback_state _load_from_checkpoint _load_rng_state _maybe_log_save_evaluate "
    "_move_model_to_device _run_epoch _save _save_checkpoint _save_rng_state compute_loss create_model_card "
    "create_optimizer evaluate evaluation_loop floating_point_ops prediction_step training_step",
    "transformers.TrainerCallback": "on_epoch_end on_evaluate on_log on_optimizer_step on_pre_optimizer_step "
    "on_prediction_step on_save on_step_begin on_step_end on_substep_end on_train_begin on_train_end",
    "trl._BaseTrainer": "_send_telemetry",
    "typer.TyperGroup": "resolve_command",
    "yaml.BaseRepresenter": "ignore_aliases",
}
"""By the class in which the library begins the method."""

SET = {
    "jinja2.Extension": "tags",
    "pydantic.BaseModel": "model_config",
    "transformers.Trainer": "_globalstep_last_logged _tr_loss control optimizer",
    "trl.SFTTrainer": "_total_train_tokens",
}
"""Values of a library's class that ours set."""

PRIVATE: dict[str, type] = {
    "_attn_implementation": PreTrainedConfig,
    "_buffers": torch.nn.Module,
    "_cdata": torch.UntypedStorage,
    "_clip_grad_norm": Trainer,
    "_did_swap_in_out_features": ParamWrapper,
    "_fingerprint": datasets.Dataset,
    "_from_config": PreTrainedModel,
    "_get_dtype_plan": PreTrainedModel,
    "_model_mapping": transformers.AutoModelForCausalLM,
    "_n_gpu": TrainingArguments,
    "_parameters": torch.nn.Module,
    "_prepare_inputs": Trainer,
    "_schema": torch._ops.OpOverload,
    "_study_id": optuna.Study,
    "_trial_id": optuna.trial.FrozenTrial,
}
"""Private names of objects of theirs that we read or set."""

NOT_INSTALLED = {"_zero3_consolidated_16bit_state_dict"}
"""Of DeepSpeed's engine, which no test runs."""


def changes(table: Mapping[str, str], found: Mapping[str, list[str]], *, done: str) -> Iterator[str]:
    """One line for each seam that is in the table or in the code alone."""
    known = {f"{owner}.{name}" for owner, names in table.items() for name in names.split()}
    for seam in sorted(known - found.keys()):
        places = ", ".join(seams.written_as(seam.rpartition(".")[2]))
        yield f"{seam} is gone: {done} at {places}" if places else f"{seam} is not {done} any more: out of the table"
    for seam in sorted(found.keys() - known):
        yield f"{seam} is {done} at {', '.join(found[seam])}: into the table, or another name"


def private_names_gone() -> list[str]:
    """Private names that their owners do not have, with where we rely on them."""
    places = seams.private_names()
    return [
        f"{owner.__name__}.{name} is gone: {', '.join(places[name])}"
        for name, owner in PRIVATE.items()
        if not seams.has(owner, name)
    ]


def test_every_method_that_we_override_is_a_librarys() -> None:
    assert len(seams.own_classes()) > 40
    assert list(changes(OVERRIDDEN, seams.overrides(), done="overridden")) == []


def test_every_override_can_be_called_as_the_librarys_own() -> None:
    assert list(seams.odd_parameters()) == []


def test_every_value_that_we_set_is_a_librarys() -> None:
    assert list(changes(SET, seams.values_set(), done="set")) == []


def test_every_attribute_that_our_classes_read_on_themselves_is_there() -> None:
    assert list(seams.names_read_on_self()) == []


def test_every_private_name_that_we_read_on_their_objects_is_there() -> None:
    assert seams.private_names().keys() == PRIVATE.keys() | NOT_INSTALLED
    assert private_names_gone() == []


def test_every_name_that_we_import_or_replace_is_there() -> None:
    assert len(seams.sources()) > 200
    assert list(seams.names_gone()) == []


def test_every_call_of_a_library_fits_its_signature() -> None:
    assert list(seams.refused_calls()) == []


def test_a_hook_that_is_gone_is_named_with_where_we_rely_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Trainer, "_get_grad_norm")
    (line,) = changes(OVERRIDDEN, seams.overrides(), done="overridden")
    assert line.startswith("transformers.Trainer._get_grad_norm is gone: overridden at lorafit/training/")
    monkeypatch.setattr(seams, "has", lambda owner, name: name != "_n_gpu")
    (line,) = private_names_gone()
    assert line.startswith("TrainingArguments._n_gpu is gone: lorafit/training/arguments.py:")


def test_an_override_that_no_table_knows_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(OVERRIDDEN, "yaml.BaseRepresenter")
    (line,) = changes(OVERRIDDEN, seams.overrides(), done="overridden")
    assert line.startswith("yaml.BaseRepresenter.ignore_aliases is overridden at lorafit/recipe/recipe_yaml.py:")


def test_a_hook_whose_parameters_change_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "_save", lambda self, directory: None)
    (line,) = seams.odd_parameters()
    assert line.startswith("lorafit/training/") and line.endswith(": transformers.Trainer._save: directory")
    monkeypatch.setattr(Trainer, "_get_output_dir", lambda self: "")
    (line,) = seams.refused_calls()
    assert line.startswith("lorafit/training/") and line.endswith(
        ": super()._get_output_dir: too many positional arguments"
    )


@pytest.mark.parametrize(
    ("ours", "theirs", "odd"),
    [
        (lambda self, model: 0, lambda self, model: 0, []),
        (lambda self, *rest: 0, lambda self, model, trial: 0, []),
        (lambda self, model, extra=None: 0, lambda self, model: 0, []),
        (lambda self, model: 0, lambda self, model, trial: 0, ["trial"]),
        (lambda self, model, own: 0, lambda self, model: 0, ["own"]),
        (lambda self, net: 0, lambda self, model: 0, ["model", "net"]),
        (lambda self, net: 0, lambda self, **named: 0, []),
        (property(lambda self: 0), property(lambda self: 1), []),
        (lambda self: 0, 3, []),
    ],
)
def test_parameters_that_do_not_fit(ours: Any, theirs: Any, odd: list[str]) -> None:
    assert seams.misfits(ours, theirs) == odd


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ("f(1, two=2)", ""),
        ("f(*all)", ""),
        ("f(1, **named)", ""),
        ("f()", "missing a required argument: 'one'"),
        ("f(1, three=3)", "got an unexpected keyword argument 'three'"),
        ("f(1, three=3, **named)", "got an unexpected keyword argument 'three'"),
    ],
)
def test_arguments_that_do_not_fit(call: str, reason: str) -> None:
    def called(one: int, two: int = 2) -> None: ...

    node = ast.parse(call, mode="eval").body
    assert isinstance(node, ast.Call)
    assert seams.refusal(called, node) == reason
