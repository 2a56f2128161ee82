"""The step that is planned, for real: the same model with random weights, adapter, trainer and batches, measured."""

from __future__ import annotations

import gc
import time
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import bitsandbytes as bnb
import torch
from torch.profiler import ProfilerActivity, profile

from lorafit.planning.empty_base import quantization_state
from lorafit.planning.fake_fsdp2 import local, spread_over
from lorafit.planning.fake_model import materialise
from lorafit.planning.fake_step import Batch, FakeRun
from lorafit.planning.plan_result import Measurement

STEPS = 3
"""Of which the last is as every later one: optimizer states and the kernels' workspaces are there."""


class RealRun(FakeRun):
    """A run with memory, on `device`; it measures once."""

    def _stand_in(self) -> None:
        """Nothing is replaced."""

    def measure(self, batch: Batch, *, eval_batch: Batch | None = None, passes: int = 1) -> Measurement:
        """The most that is allocated in a step (and an evaluation) after the first."""
        materialise(self._model, nullcontext(), device=self._device)
        self._fill()
        if self._spread > 1:
            spread_over(self._spread, self._model, bf16=self._bf16, mode=nullcontext())
        self._optimizer = self._trainer.create_optimizer()
        silent: Any = SimpleNamespace(place=lambda *_: None, name=lambda *_: None)
        hooks: Any = SimpleNamespace(is_forward=False)
        self._first_optimizer_step(silent)

        def step() -> None:
            self._one_step(silent, hooks, batch, passes=passes)

        def evaluation() -> None:
            if eval_batch is not None:
                self._evaluate(silent, eval_batch)

        if self._device == "cpu":
            return self._on_cpu(step, evaluation)
        return _on_gpu(step, evaluation)

    def _on_cpu(self, step: Any, evaluation: Any) -> Measurement:
        """By the allocator's own events: the process's memory holds much else."""
        step()  # kernels keep what they have prepared
        gc.collect()
        static = self._static_bytes()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as observed:
            step()
            evaluation()
        seconds = min(_seconds(step) for _ in range(STEPS))  # without the profiler, and what else ran meanwhile
        events = [event for event in observed.profiler.kineto_results.events() if event.name() == "[memory]"]
        now = most = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            now += event.nbytes()
            most = max(most, now)
        return Measurement(static + most, None, seconds)

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        """With values: which rows are padded, and where documents begin, is looked at."""
        inputs = self._page.measured_batch(batch)
        return {
            name: part.to(self._device) if isinstance(part, torch.Tensor) else part for name, part in inputs.items()
        }

    @torch.no_grad()
    def _fill(self) -> None:
        for tensor in (*self._model.parameters(), *self._model.buffers()):
            if tensor.is_floating_point():
                tensor.normal_(0, 0.02)
        for module in self._model.modules():
            state = getattr(getattr(module, "weight", None), "quant_state", None)
            if state is None:
                continue
            state.code = bnb.functional.get_4bit_type(state.quant_type, device=self._device)
            for scale in quantization_state(module):
                scale.zero_()
            if state.nested:
                state.state2.code = bnb.functional.create_dynamic_map().to(self._device)

    def _static_bytes(self) -> int:
        tensors = [*self._model.parameters(), *self._model.buffers()]
        tensors += [scale for module in self._model.modules() for scale in quantization_state(module)]
        states = (state for states in self._optimizer.state.values() for state in states.items())
        tensors += [value for name, value in states if isinstance(value, torch.Tensor) and not name.startswith("qmap")]
        if ranks := getattr(self._model.base_model, "rankallocator", None):
            for averages in (ranks.ipt, ranks.exp_avg_ipt, ranks.exp_avg_unc):
                tensors += averages.values()
        storages = [local(tensor).untyped_storage() for tensor in tensors]
        return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def _seconds(step: Any) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def _on_gpu(step: Any, evaluation: Any) -> Measurement:
    for _ in range(STEPS - 1):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    step()
    end.record()
    evaluation()
    torch.cuda.synchronize()
    return Measurement(
        torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved(), start.elapsed_time(end) / 1000
    )
