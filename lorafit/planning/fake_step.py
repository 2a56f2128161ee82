"""One training step of a recipe on fake tensors: the run's own model, adapter, optimizer and loss, no memory taken."""

from __future__ import annotations

import copy
import gc
import pickle
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import AdaLoraConfig
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig
from transformers.integrations.neftune import activate_neftune

from lorafit.builders.adapter import attach_adapter, rank_allocator
from lorafit.builders.lora_config import lora_config
from lorafit.launching.fork import Fork
from lorafit.planning.cuda_emulation import (
    Answers,
    CudaAutocast,
    kernel_temporaries,
    set_rows,
    stand_in_for_cuda,
    stand_in_for_values,
)
from lorafit.planning.empty_base import empty_base, quantization_state
from lorafit.planning.fake_fsdp2 import local, spread_over, watch_spreading
from lorafit.planning.fake_model import Layers, materialise
from lorafit.planning.planned_trainer import planned_trainer
from lorafit.planning.roofline import Work, WorkObserver
from lorafit.planning.storage_tracker import Moment, StorageTracker
from lorafit.recipe import LoadedRecipe
from lorafit.speed.levers import engage_planned
from lorafit.tasks import TASKS
from lorafit.tasks.pages import trainer_page

Rows = Literal["full", "padded", "packed"]
"""`full`: all rows are as long as the longest, no mask; `padded`: one is shorter; `packed`: documents in one row."""
UPDATE = ("clipping", "optimizer")
"""Labels of what is done once a step; all else is done for each forward pass."""


@dataclass(frozen=True)
class Batch:
    """What one forward pass reads."""

    rows: Rows
    size: int
    """Rows, each of `length` tokens."""
    length: int

    def __str__(self) -> str:
        kinds = {"full": "", "padded": ", one of them shorter", "packed": " packed with documents, in one row"}
        return f"{self.size} row{'s' * (self.size > 1)} of {self.length:,} tokens{kinds[self.rows]}"


@dataclass(frozen=True)
class Measured:
    """One run of the step."""

    layers: tuple[int, ...]
    moments: dict[str, Moment]
    trace: list[tuple[int, int]]
    work: dict[str, Counter[Work]]
    """Operations of one forward and backward `pass`, and of the optimizer's `update`."""

    @property
    def most_allocated(self) -> int:
        """The peak, wherever it is."""
        return max(moment.total for moment in self.moments.values())


class FakeRun:
    """A recipe's model, adapter and trainer without memory. `step` runs any part of its depth on any batch."""

    def __init__(
        self,
        loaded: LoadedRecipe,
        *,
        config: PreTrainedConfig,
        bf16: bool,
        checkpointing: bool,
        on_cuda: bool = True,
        device: str = "cpu",
        spread: int = 1,
    ) -> None:
        """`on_cuda`: as CUDA's kernels do it. `device`: where it runs, which fake tensors do on the CPU. `spread`: GPUs
        that FSDP2 shares the weights out to."""
        self._spread, self._bf16 = spread, bf16
        self.ends = 1 if spread == 1 else 2  # FSDP2 gathers the next layer ahead: two layers share a place
        self._recipe = loaded.recipe
        self._on_cuda = on_cuda
        self._device = device
        self._stand_in()
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        config, token_ids = _with_added_tokens(config, len(self._recipe.model.add_tokens))
        task, self._page = TASKS[self._recipe.task], trainer_page(self._recipe.task)
        base = empty_base(self._recipe.model, self._recipe.quantization, config=config, task=task)
        # Where an adapter starts changes none of its sizes, and is computed from weights that are not here.
        lora = self._recipe.lora.model_copy(
            update={"init_lora_weights": True, "eva_config": None, "corda_config": None}
        )
        settings = lora_config(
            lora,
            adalora=self._recipe.adalora,
            model=base,
            where=loaded.problem,
            by_fsdp=spread > 1,
            token_ids=token_ids,
            task=task,
        )
        with torch.device("meta"):
            model = attach_adapter(
                base,
                settings,
                init_method=True,
                seed=0,
                autocast_adapter_dtype=True,
                batches=lambda: [],
                base_directory="",
            )
        self.layers = Layers(base)
        self._trainer = planned_trainer(self._recipe, model, bf16=bf16, checkpointing=checkpointing, device=device)
        self.trained_bytes = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
        """Of the adapter in the whole depth, in the type it is trained in, before it is spread."""
        engage_planned(model, self._recipe, levers=self._page.LEVERS, on_cuda=on_cuda, in_16_bits=bf16)
        # FSDP2 casts by its own policy, without autocast.
        prepare = self._trainer.accelerator.prepare_model
        self._whole = self._model = model if spread > 1 else prepare(model, device_placement=False)
        if checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if self._recipe.training.neftune_noise_alpha is not None:
            activate_neftune(model, self._recipe.training.neftune_noise_alpha, self._trainer.accelerator)
        self._asked: tuple[Batch, Batch | None, int] | None = None
        self._measured: dict[tuple[int, ...], Measured] = {}
        self._elsewhere: StepElsewhere | None = None
        gc.freeze()  # all that was imported and built stays: collecting garbage after a step need not look at it

    def step(
        self,
        indices: Sequence[int],
        batch: Batch,
        *,
        eval_batch: Batch | None = None,
        passes: int = 1,
    ) -> Measured:
        """The step after the first (optimizer states are there) with the layers `indices`, and an evaluation.

        `passes` forward and backward passes: from the second on, the gradients of the first lie beside it. A step is
        run once, however often it is asked for before another batch is; with FSDP2 each time.
        """
        asked, kept = (batch, eval_batch, passes), tuple(indices)
        if asked != self._asked:
            self._asked, self._measured = asked, {}
        if kept not in self._measured or self._spread > 1:  # where DTensor's first step counts its own planning, too
            found = self._elsewhere.answer(kept, *asked) if self._elsewhere else None
            self._measured[kept] = found or self._run(kept, batch, eval_batch=eval_batch, passes=passes)
        return self._measured[kept]

    def begin(self, indices: Sequence[int], batch: Batch, *, eval_batch: Batch | None, passes: int) -> None:
        """Run a step in a copy of this process, which has run none of any run, while others are run here."""
        kept = tuple(indices)
        self._elsewhere = StepElsewhere(
            (kept, batch, eval_batch, passes),
            lambda: self._run(kept, batch, eval_batch=eval_batch, passes=passes),
        )

    def _run(self, indices: tuple[int, ...], batch: Batch, *, eval_batch: Batch | None, passes: int) -> Measured:
        set_rows(packed=batch.rows == "packed", padded=batch.rows == "padded")
        self.layers.keep(indices)
        if self._spread > 1:  # a model is sharded for good
            empty = {id(tensor): tensor for tensor in (*self._whole.parameters(), *self._whole.buffers())}
            self._model = self._trainer.model = copy.deepcopy(self._whole, empty)
        materialise(self._model, self._mode)
        if self._spread > 1:
            spread_over(self._spread, self._model, bf16=self._bf16, mode=self._mode)
        tracker = StorageTracker(kernel_temporaries()) if self._on_cuda else StorageTracker(round_to=1)
        self._optimizer = self._trainer.create_optimizer()
        with ExitStack() as stack:
            if self._spread > 1:
                stack.enter_context(watch_spreading(tracker))
            stack.enter_context(CudaAutocast() if self._on_cuda else nullcontext())
            stack.enter_context(self._mode)
            stack.enter_context(tracker)
            stack.enter_context(Answers())
            stack.callback(self._release)
            hooks = _Places(tracker, dict(zip(indices, self.layers.of(self._model), strict=True)))
            stack.callback(hooks.remove)
            self._take_down(tracker)
            self._first_optimizer_step(tracker)
            tracker.forget_peaks()
            observer = WorkObserver(lambda: "update" if tracker.label in UPDATE else "pass")
            with observer:
                self._one_step(tracker, hooks, batch, passes=passes)
            if eval_batch is not None:
                self._evaluate(tracker, eval_batch)
        for work in observer.work["pass"]:
            observer.work["pass"][work] //= passes
        return Measured(indices, tracker.moments, tracker.trace, observer.work)

    @property
    def trainable(self) -> list[nn.Parameter]:
        """What is trained, of the layers that are in the model."""
        return [parameter for parameter in self._model.parameters() if parameter.requires_grad]

    def _release(self) -> None:
        for parameter in self._model.parameters():
            parameter.grad = None
        del self._optimizer
        self._trainer.optimizer = None
        gc.collect()

    def _take_down(self, tracker: StorageTracker) -> None:
        """What lies in memory before the first step."""
        tracker.place("model", "weights")
        tracker.add(local(parameter) for parameter in self._model.parameters() if not parameter.requires_grad)
        tracker.add(self._model.buffers())
        tracker.place("model", "quantization state")
        tracker.add(scale for module in self._model.modules() for scale in quantization_state(module))
        tracker.place("model", "adapter")
        tracker.add(local(parameter) for parameter in self.trainable)

    def _first_optimizer_step(self, tracker: StorageTracker) -> None:
        """Leaves the optimizer's states."""
        tracker.place("model", "gradients")
        for parameter in self.trainable:
            parameter.grad = torch.zeros_like(parameter)
        tracker.place("model", "optimizer")
        self._update()
        gc.collect()

    def _update(self) -> None:
        """The optimizer's step, and AdaLoRA's averages of the importance of each rank."""
        self._optimizer.step()
        if isinstance(self._model.peft_config["default"], AdaLoraConfig):
            rank_allocator(self._model).update_ipt(self._model)
        self._optimizer.zero_grad(set_to_none=True)

    def _one_step(self, tracker: StorageTracker, hooks: _Places, batch: Batch, *, passes: int) -> None:
        self._trainer.current_gradient_accumulation_steps = passes
        self._model.train()
        watched = [
            parameter.register_post_accumulate_grad_hook(lambda p: tracker.name([p.grad], "gradients"))
            for parameter in self.trainable
            if self._spread == 1
        ]
        for _ in range(passes):
            tracker.place("inputs", "activations")
            inputs = self._inputs(batch)
            count = torch.ones((), dtype=torch.long, device=self._device)
            hooks.is_forward = True
            tracker.place("embedding", "activations")
            loss = self._loss(inputs, count)
            hooks.is_forward = False
            tracker.place("head backward", "loss head")
            self._trainer.accelerator.backward(loss)
            del loss, inputs, count
            tracker.name((local(parameter.grad) for parameter in self.trainable), "gradients")
        tracker.place("clipping", "temporary")
        if self._recipe.training.max_grad_norm > 0:
            self._trainer._clip_grad_norm(self._model)
        tracker.place("optimizer", "temporary")
        self._update()
        for watch in watched:
            watch.remove()

    def _stand_in(self) -> None:
        stand_in_for_values()
        if self._on_cuda:
            stand_in_for_cuda()

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        return self._page.planned_batch(batch)

    def _loss(self, inputs: dict[str, Any], count: torch.Tensor) -> torch.Tensor:
        with self._trainer.compute_loss_context_manager():
            return self._trainer.compute_loss(self._model, inputs, num_items_in_batch=count)

    def _evaluate(self, tracker: StorageTracker, batch: Batch) -> None:
        set_rows(packed=batch.rows == "packed", padded=batch.rows == "padded")
        tracker.place("evaluation", "activations")
        self._model.eval()
        with torch.no_grad(), self._trainer.compute_loss_context_manager():
            self._page.score(self._model, self._inputs(batch))


class StepElsewhere:
    """A step in a copy of this process, which ends with it."""

    def __init__(self, asked: tuple[Any, ...], run: Callable[[], Measured]) -> None:
        self._asked = asked
        with tempfile.TemporaryFile() as errors:  # what goes wrong there goes wrong here, too, and is said
            self._process = Fork(lambda _, said: pickle.dump(run(), said), errors=errors)

    def answer(self, *asked: Any) -> Measured | None:
        """What it has found, if it was asked for this and found anything."""
        if asked != self._asked:
            return None
        said, _ = self._process.communicate()
        return pickle.loads(said) if said else None


class _Places:
    """Tells the tracker where the step is, by the decoder layers that it passes."""

    def __init__(self, tracker: StorageTracker, layers: dict[int, nn.Module]) -> None:
        self.is_forward = False
        self._tracker = tracker
        self._handles: list[Any] = []
        last = max(layers)
        for index, layer in layers.items():
            self._handles += [
                layer.register_forward_pre_hook(self._enters(index)),
                layer.register_forward_hook(self._leaves(index, is_last=index == last)),
            ]

    def remove(self) -> None:
        """Leave the layers as they were."""
        for handle in self._handles:
            handle.remove()

    def _enters(self, index: int) -> Any:
        def hook(*_: Any) -> None:
            if self.is_forward:
                self._tracker.place(f"forward {index}", "activations")

        return hook

    def _leaves(self, index: int, *, is_last: bool) -> Any:
        def begins(_: Any) -> None:
            if not self.is_forward:
                self._tracker.place(f"backward {index}", "temporary")

        def hook(_: Any, __: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if self.is_forward and hidden.requires_grad:
                hidden.register_hook(begins)
            if self.is_forward and is_last:
                self._tracker.place("head", "loss head")

        return hook


def _with_added_tokens(config: PreTrainedConfig, count: int) -> tuple[PreTrainedConfig, range]:
    """A config whose embedding has grown by `count` rows, and their ids: as if the base had none to spare."""
    grown = copy.deepcopy(config)
    text = grown.get_text_config()
    text.vocab_size += count
    return grown, range(text.vocab_size - count, text.vocab_size)
