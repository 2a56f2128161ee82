"""`training`: becomes the library's arguments of the task, `trl.SFTConfig` for supervised fine-tuning."""

from typing import Annotated, Any, Literal

from pydantic import Field, Strict

from lorafit.recipe.sections.base import Extra, Frozen, Section

Optimizer = Literal[
    "adamw_torch",
    "adamw_torch_fused",
    "adafactor",
    "sgd",
    "adagrad",
    "rmsprop",
    "adamw_8bit",
    "adamw_bnb_8bit",
    "ademamix",
    "ademamix_8bit",
    "lion_32bit",
    "lion_8bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "paged_ademamix_32bit",
    "paged_ademamix_8bit",
    "paged_lion_32bit",
    "paged_lion_8bit",
    "rmsprop_bnb",
    "rmsprop_bnb_8bit",
    "rmsprop_bnb_32bit",
]
Scheduler = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "reduce_lr_on_plateau",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
]


class Lengths(Section):
    """How long a row may be, which every task asks."""

    max_length: int = Field(default=2048, ge=2)
    """Longest sequence in tokens; also the length of a packed row. Activation memory grows linearly with it."""


class SFTKeys(Lengths):
    """What `trl.SFTConfig` has beside the arguments of every trainer. A class apart, so that they stand by the length:
    pydantic writes the keys of a later base first."""

    packing: bool = False
    """Fill rows of `max_length` with whole documents (best fit, none split); no document sees another. Saves the
    padding and makes a step's work even. Default false, TRL's."""

    loss_type: Literal["nll", "dft"] = "nll"
    """Loss: negative log-likelihood, or dynamic fine-tuning (arXiv 2508.05629)."""


class TrainingSection(Lengths):
    """What the training of every task has: the keys of `transformers.TrainingArguments`."""

    num_train_epochs: float = Field(default=1.0, gt=0, le=1e6)
    """Passes over the training rows. Default 1: one epoch is where published LoRA recipes start."""

    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; overrides `num_train_epochs`. null means the epochs decide."""

    per_device_train_batch_size: int = Field(default=4, ge=1)
    """Sequences (packed rows with `packing`) per process and forward pass. Activation memory grows linearly with it."""

    per_device_eval_batch_size: int = Field(default=8, ge=1)
    """Sequences per process and forward pass in evaluation. Default 8, the library's."""

    gradient_accumulation_steps: int = Field(default=4, ge=1)
    """Forward passes per optimizer step; raises the global batch without memory."""

    learning_rate: float = Field(default=2e-4, gt=0, le=10)
    """Peak learning rate. Default 2e-4 (QLoRA paper, 7B-13B); LoRA wants about ten times full fine-tuning's. At most
    10: Adam moves every entry of A and B by about the rate in a step, and weights are of the size of 0.01."""

    lr_scheduler_type: Scheduler = "cosine"
    """Shape of the learning rate after warm-up."""

    lr_scheduler_kwargs: Annotated[dict[str, Any], Frozen] | None = None
    """Arguments of the schedule, e.g. `{num_cycles: 2}`. `num_decay_steps` and `num_stable_steps` below 1 are a share
    of all steps."""

    warmup_steps: float = Field(default=0.03, ge=0)
    """Steps over which the learning rate rises; below 1 it is a share of all steps. Default 0.03 (QLoRA paper);
    left out, a run that it would take whole has none."""

    optim: Optimizer = "adamw_torch_fused"
    """Optimizer. `paged_adamw_8bit` takes a quarter of the state and survives memory peaks (CUDA)."""

    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decay of the adapter weights. Default 0.0, the library's."""

    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are scaled down to this norm; 0 switches clipping off. Default 1.0, the library's."""

    bf16: bool | Literal["auto"] = "auto"
    """bfloat16 autocast. `auto`: on where the device computes it natively (CUDA from Ampere on, CPU with AVX512-BF16 or
    AMX), unless `fp16` is on; the choice is printed with its reason."""

    fp16: bool = False
    """float16 autocast with loss scaling; only for GPUs without bfloat16."""

    gradient_checkpointing: bool | Literal["auto"] = "auto"
    """Recompute activations in the backward pass: much less memory, about 1.45 times the FLOPs of a LoRA step. `auto`:
    on a GPU off where `lorafit plan` finds that the peak stays under 85 % of its memory without it, else on; off on
    CPU. The choice is printed with its reason."""

    neftune_noise_alpha: float | None = Field(default=None, gt=0, le=1000)
    """Noise on the embeddings in training (NEFTune, arXiv 2310.05914; 5 is usual, 15 the paper's most). null means
    none."""

    eval_strategy: Literal["no", "steps", "epoch"] = "no"
    """When the held-out loss is measured during training; it always is before and after when there are eval rows."""

    eval_steps: float | None = Field(default=None, gt=0)
    """Steps between two evaluations with `eval_strategy: steps`; below 1 it is a share of all steps."""

    load_best_model_at_end: bool = False
    """Keep the adapter with the lowest held-out loss instead of the last. Needs eval data and an `eval_strategy`."""

    logging_steps: float = Field(default=10, gt=0)
    """Steps between two lines of metrics.jsonl; below 1 it is a share of all steps. Default 10, TRL's."""

    report_to: Annotated[tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...], Strict(False)] = ()
    """Loggers besides metrics.jsonl: `tensorboard`, `wandb`, `trackio`, `mlflow`. Default none."""

    run_name: str | None = Field(default=None, min_length=1)
    """Name of the run for the loggers. null means the name of the run directory."""

    seed: int = Field(default=42, ge=0, lt=2**32)
    """Seed of initialisation, row order, dropout and noise."""

    dataloader_num_workers: int = Field(default=0, ge=0)
    """Processes that collate batches ahead. Rows are tokenised before training, so 0 is usually enough."""

    train_sampling_strategy: Literal["random", "sequential", "group_by_length"] = "random"
    """Order of the rows in an epoch; `group_by_length` saves padding."""

    torch_compile: bool = False
    """Compile the model; pays off only in long runs of even shapes."""

    extra: Extra = {}
    """Further arguments of the library's class."""

    @property
    def is_packed(self) -> bool:
        """Whether a row holds several documents."""
        return False

    @property
    def loss(self) -> str:
        """Which loss of its library is learned by."""
        return "its own"


class SFTSection(TrainingSection, SFTKeys):
    """Lengths, batches, optimizer and schedule."""

    extra: Extra = {}
    """Further arguments of `trl.SFTConfig`."""

    @property
    def is_packed(self) -> bool:
        """As `packing` says."""
        return self.packing

    @property
    def loss(self) -> str:
        """As `loss_type` says."""
        return self.loss_type
