"""The frozen lists of what libraries take are those of the installed versions."""

import dataclasses
import inspect
import re
from typing import get_args

from lorafit.recipe.library_keys import LIBRARY_KEYS, NOT_FOR_RECIPES
from lorafit.recipe.rules.data import FORMAT_COLUMNS
from lorafit.recipe.rules.run import SCHEDULE_KEYS
from lorafit.recipe.sections import training


def test_the_lists_are_those_of_the_installed_libraries() -> None:
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, PreTrainedModel
    from trl import SFTConfig

    def init_fields(config: type) -> set[str]:
        return {field.name for field in dataclasses.fields(config) if field.init}

    from_pretrained = inspect.signature(PreTrainedModel.from_pretrained).parameters.keys()
    from_pretrained -= {"cls", "pretrained_model_name_or_path", "model_args", "kwargs"}
    source = inspect.getsource(PreTrainedModel.from_pretrained)
    popped = set(re.findall(r'kwargs\.pop\("([a-z]\w*)"', source)) | set(re.findall(r'"(attn_\w+)" in kwargs', source))
    assert LIBRARY_KEYS["lora"] == init_fields(LoraConfig)
    assert LIBRARY_KEYS["training"] == init_fields(SFTConfig)
    assert LIBRARY_KEYS["quantization"] == inspect.signature(BitsAndBytesConfig).parameters.keys() - {"kwargs"}
    assert LIBRARY_KEYS["model"] >= from_pretrained | popped
    assert len(popped) > 15
    for key in LIBRARY_KEYS["model"] - from_pretrained:
        assert f'"{key}"' in source or f"{key}" in inspect.getsource(inspect.getmodule(PreTrainedModel)), key


def test_what_lorafit_sets_itself_cannot_be_set_by_extra() -> None:
    import lorafit.builders.sft_config as builder

    settings = set(re.findall(r'^ +"(\w+)": ', inspect.getsource(builder.sft_config), re.MULTILINE))
    own = set(training.TrainingSection.model_fields)
    assert len(settings) > 40
    assert settings - own <= NOT_FOR_RECIPES["training"].keys()


def test_every_schedule_and_its_arguments_are_the_librarys() -> None:
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
    from transformers.trainer_utils import SchedulerType

    assert set(SCHEDULE_KEYS) == set(get_args(training.Scheduler))
    ours = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    for name, known in SCHEDULE_KEYS.items():
        function = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]
        if name == "reduce_lr_on_plateau":
            from torch.optim.lr_scheduler import ReduceLROnPlateau as function
        assert inspect.signature(function).parameters.keys() - ours == known, name


def test_every_optimizer_is_one_of_the_librarys() -> None:
    from transformers.training_args import OptimizerNames

    assert set(get_args(training.Optimizer)) <= {name.value for name in OptimizerNames}


def test_the_columns_of_a_format_are_those_the_readers_read() -> None:
    from lorafit.data.formats import FORMATS

    assert {name: set(columns) for name, columns in FORMAT_COLUMNS.items()} == {
        name: {*fields.required, *fields.optional} for name, fields in FORMATS.items()
    }
