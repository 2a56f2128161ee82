"""What a task is called, by the recipe, the libraries and the reports: names alone, without the libraries."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

TaskName = Literal["causal_lm"]
"""What `task` of a recipe may say; `TASKS` has an entry for each."""


@dataclass(frozen=True)
class ModelKind:
    """The models that adapters of one `task_type` belong to."""

    peft_type: str
    """`task_type`, as an adapter records it."""
    auto_class: str
    """Of transformers."""
    is_kept_by_base: bool = False
    """A base says itself which class it is of, and its output head is its own."""
    has_labels: bool = False
    """Its head has a row for each label, and the adapter holds it whole."""
    reads_one_text: bool = False
    """It answers with the last token that is no padding, known by its id: a text is given to it by itself."""
    is_encoder_decoder: bool = False
    """It wants what its decoder reads beside what its encoder reads."""


MODEL_KINDS: Mapping[str, ModelKind] = {
    kind.peft_type: kind
    for kind in (
        ModelKind("CAUSAL_LM", "AutoModelForCausalLM", is_kept_by_base=True),
        ModelKind("SEQ_2_SEQ_LM", "AutoModelForSeq2SeqLM", is_encoder_decoder=True),
        ModelKind("SEQ_CLS", "AutoModelForSequenceClassification", has_labels=True, reads_one_text=True),
        ModelKind("TOKEN_CLS", "AutoModelForTokenClassification", has_labels=True),
    )
}
"""By `task_type`. Adapters of all of them can be merged, also of those for which there is no task to train them."""


@dataclass(frozen=True)
class BaseModels:
    """Which bases a task can train."""

    table: str
    """Of transformers' modeling_auto.py: the architectures that have such a model."""
    other_class: re.Pattern[str]
    """What the name of a class says that is for something else."""
    wanted: tuple[str, str]
    """What such a model does, and what it is called."""


@dataclass(frozen=True)
class Figure:
    """The held-out loss put as something to imagine."""

    name: str
    of_loss: Callable[[float], float]


@dataclass(frozen=True)
class LibraryArguments:
    """The library's class that `training` becomes."""

    name: str
    own_keys: frozenset[str]
    """What it takes beside the keys of `transformers.TrainingArguments`."""


@dataclass(frozen=True)
class Task:
    """One thing that can be trained."""

    name: TaskName
    model: ModelKind
    bases: BaseModels
    arguments: LibraryArguments
    unit: str
    """Of the loss."""
    counted: str
    """What the loss is a mean over."""
    figure: Figure
    guess: str
    """What guessing costs, in words."""
    pipeline_tag: str
    """Of the Hugging Face Hub: what the trained model does."""
    tag: str
    """Of the Hub: how it was trained."""

    @property
    def loss_unit(self) -> str:
        """Of the loss as a mean: `nats per token`."""
        return f"{self.unit} per {self.counted}"


MAX_EXPONENT = 700
"""exp of more is not a float."""


def perplexity(loss: float) -> float:
    """exp(loss): among how many equally likely tokens the model hesitates."""
    return math.exp(loss) if loss < MAX_EXPONENT else math.inf


TASKS: Mapping[TaskName, Task] = {
    "causal_lm": Task(
        name="causal_lm",
        model=MODEL_KINDS["CAUSAL_LM"],
        bases=BaseModels(
            table="MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
            other_class=re.compile(r"For(MaskedLM|SequenceClassification|TokenClassification|QuestionAnswering)$"),
            wanted=("predicts the next token", "a causal language model"),
        ),
        arguments=LibraryArguments(
            "trl.SFTConfig",
            frozenset(
                (
                    *(
                        "max_length",
                        "truncation_mode",
                        "pad_to_multiple_of",
                        "packing",
                        "packing_strategy",
                        "padding_free",
                    ),
                    *("eval_packing", "shuffle_dataset", "dataset_text_field", "dataset_kwargs", "dataset_num_proc"),
                    *("completion_only_loss", "assistant_only_loss", "loss_type", "router_aux_loss_coef"),
                    *("chat_template_path", "eos_token", "pad_token", "model_init_kwargs", "trust_remote_code"),
                    "activation_offloading",
                )
            ),
        ),
        unit="nats",
        counted="token",
        figure=Figure("perplexity", perplexity),
        guess="ln of the vocabulary",
        pipeline_tag="text-generation",
        tag="sft",
    ),
}
"""By what `task` of a recipe says."""

DEFAULT_TASK = TASKS["causal_lm"]
"""Of a recipe that names none, and of an adapter whose `task_type` is empty."""


def model_kind(task_type: object) -> ModelKind:
    """Of an adapter's `task_type`; of one that lorafit does not know, that of the default task."""
    return MODEL_KINDS.get(str(task_type), DEFAULT_TASK.model)
