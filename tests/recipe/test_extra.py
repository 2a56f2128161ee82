"""The frozen lists of what libraries take are those of the installed versions."""

import dataclasses
import inspect
import re
from typing import Any, get_args, get_type_hints

from lorafit.recipe.library_keys import LIBRARY_KEYS, NOT_FOR_RECIPES, library_keys
from lorafit.recipe.rules.data import FORMAT_COLUMNS
from lorafit.recipe.rules.extra import BACKENDS, OPTIM_ARGS, TRAINING_EXTRA
from lorafit.recipe.rules.schedule import SCHEDULE_ARGUMENTS, phases_in_steps
from lorafit.recipe.sections import training
from lorafit.tasks import TASKS

SINCE_TRANSFORMERS_5_23 = {"activation_checkpointing", "activation_checkpointing_kwargs"}


def test_the_lists_are_those_of_the_installed_libraries() -> None:
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, PreTrainedModel, TrainingArguments, modeling_utils
    from trl import SFTConfig

    def init_fields(config: type) -> set[str]:
        return {field.name for field in dataclasses.fields(config) if field.init}

    taken = inspect.signature(PreTrainedModel.from_pretrained).parameters.keys()
    from_pretrained = taken - {"cls", "pretrained_model_name_or_path", "model_args", "kwargs"}
    source = inspect.getsource(PreTrainedModel.from_pretrained)
    popped = set(re.findall(r'kwargs\.pop\("([a-z]\w*)"', source)) | set(re.findall(r'"(attn_\w+)" in kwargs', source))
    assert LIBRARY_KEYS["lora"] == init_fields(LoraConfig)
    assert LIBRARY_KEYS["training"] == init_fields(TrainingArguments) | SINCE_TRANSFORMERS_5_23
    assert TASKS["causal_lm"].arguments.own_keys == init_fields(SFTConfig) - init_fields(TrainingArguments)
    assert LIBRARY_KEYS["quantization"] == inspect.signature(BitsAndBytesConfig).parameters.keys() - {"kwargs"}
    assert LIBRARY_KEYS["model"] >= from_pretrained | popped
    assert len(popped) > 15
    for key in LIBRARY_KEYS["model"] - from_pretrained:
        assert f'"{key}"' in source or f"{key}" in inspect.getsource(modeling_utils), key


def test_what_lorafit_sets_itself_cannot_be_set_by_extra() -> None:
    from lorafit.tasks.causal_lm_trainer import own_settings
    from lorafit.training.arguments import training_arguments

    sources = inspect.getsource(training_arguments) + inspect.getsource(own_settings)
    settings = set(re.findall(r'^ +"(\w+)": ', sources, re.MULTILINE))
    own = set(training.SFTSection.model_fields)
    assert len(settings) > 40
    assert settings - own <= NOT_FOR_RECIPES["training"].keys()


def test_every_schedule_and_its_arguments_are_the_librarys() -> None:
    from torch.optim.lr_scheduler import ReduceLROnPlateau
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
    from transformers.trainer_utils import SchedulerType

    assert set(SCHEDULE_ARGUMENTS) == set(get_args(training.Scheduler))
    ours = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    for name, known in SCHEDULE_ARGUMENTS.items():
        schedule: Any = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]
        if name == "reduce_lr_on_plateau":
            schedule = ReduceLROnPlateau
        assert inspect.signature(schedule).parameters.keys() - ours == known.keys(), name


def test_values_of_further_arguments_are_of_the_librarys_types() -> None:
    from trl import SFTConfig

    def takes(annotation: object) -> set[type]:
        parts = get_args(annotation) or (annotation,)
        return {part for part in parts if part in (bool, int, float, str)}

    types = get_type_hints(SFTConfig)
    taken_by_sft = library_keys(TASKS["causal_lm"])["training"]
    known = taken_by_sft - NOT_FOR_RECIPES["training"].keys() - training.SFTSection.model_fields.keys()
    assert TRAINING_EXTRA.keys() == known
    assert len(known) > 25
    for name, taken in TRAINING_EXTRA.items():
        assert taken.kind in takes(types[name]), name


def test_what_an_optimizer_reads_of_optim_args_is_what_we_say() -> None:
    from transformers import trainer_optimizer

    source = inspect.getsource(trainer_optimizer)
    for handler, optim in (("_get_sgd", "sgd"), ("_get_adagrad", "adagrad"), ("_get_rmsprop", "rmsprop")):
        body = inspect.getsource(getattr(trainer_optimizer, handler))
        assert set(re.findall(r'"([a-z_]+)"(?=[,)\] ])', body)) >= set(OPTIM_ARGS[optim])
    assert all(f'optim_args.get("{name}"' in source or f'"{name}" in ctx' in source for name in OPTIM_ARGS["ademamix"])


def test_compile_backends_are_torchs() -> None:
    from torch._dynamo import list_backends

    assert set(BACKENDS) <= set(list_backends(exclude_tags=()))


def test_every_optimizer_is_one_of_the_librarys() -> None:
    from transformers.training_args import OptimizerNames

    assert set(get_args(training.Optimizer)) <= {name.value for name in OptimizerNames}


def test_the_columns_of_a_format_are_those_the_readers_read() -> None:
    from lorafit.data.formats import FORMATS

    assert {name: set(columns) for name, columns in FORMAT_COLUMNS.items()} == {
        name: {*fields.required, *fields.optional} for name, fields in FORMATS.items()
    }


def test_a_phase_that_is_a_share_of_the_run_reaches_the_schedule_in_steps() -> None:
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    arguments = phases_in_steps({"num_decay_steps": 0.5, "decay_type": "linear"}, 10)
    schedule = get_scheduler("warmup_stable_decay", optimizer, 0, 10, scheduler_specific_kwargs=arguments)
    assert [schedule.lr_lambdas[0](step) for step in range(10)] == [
        1,
        1,
        1,
        1,
        1,
        1,
        0.8,
        0.6,
        0.4,
        0.19999999999999996,
    ]
