"""Runs in forked children of one process that has imported everything: a second each, and they may be killed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import TrainerCallback

from lorafit.lines import heard
from lorafit.recipe import LoadedRecipe, load
from lorafit.training.start_point import Begin
from lorafit.training.train import train
from support.runs import cache_of
from support.tiny import build_base, llama_config, sums, write_jsonl

SMALL = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
STEPS = 12
TRAINING = {
    "max_length": 64,
    "max_steps": STEPS,
    "learning_rate": 5e-3,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "logging_steps": 2,
    "bf16": False,
}
ADALORA = {"init_r": 6, "target_r": 5, "tinit": 2, "tfinal": 3, "delta_t": 2}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 3}
RISING = {"learning_rate": 0.1, "lr_scheduler_type": "constant"}
"""The held-out loss falls until step 6, then rises."""
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"lora": {"r": 4, "lora_dropout": 0.2}},
    "accumulation 3": {"training": {"gradient_accumulation_steps": 3}},
    "packing": {"training": {"packing": True, "max_length": 96}},
    "dora": {"lora": {"r": 4, "use_dora": True}},
    "neftune": {"training": {"neftune_noise_alpha": 5.0}},
    "lora+": {"optimizer": {"loraplus_lr_ratio": 4.0}},
    "workers": {"training": {"dataloader_num_workers": 1}},
    "evaluated": {"training": EVALUATED, "lora": {"r": 4, "lora_dropout": 0.2}},
    "all of these": {
        "lora": {"r": 4, "use_dora": True},
        "optimizer": {"loraplus_lr_ratio": 4.0},
        "training": EVALUATED
        | {"gradient_accumulation_steps": 3, "packing": True, "max_length": 96}
        | {"neftune_noise_alpha": 5.0, "dataloader_num_workers": 1},
    },
    "evaluated by epoch": {"training": {"eval_strategy": "epoch", "max_steps": None, "num_train_epochs": 2}},
    "best": {"training": EVALUATED | RISING | {"load_best_model_at_end": True}},
    "early stopping": {"training": EVALUATED | RISING, "early_stopping": {"patience": 1}},
    "by length": {"training": {"train_sampling_strategy": "group_by_length"}},
    "plateau": {"training": EVALUATED | {"lr_scheduler_type": "reduce_lr_on_plateau"}},
    "adafactor": {"training": {"optim": "adafactor"}},
    "checkpointing": {"training": {"gradient_checkpointing": True}},
    "adalora": {"lora": None, "adalora": ADALORA},
    "adalora best": {"lora": None, "adalora": ADALORA, "training": EVALUATED | {"load_best_model_at_end": True}},
    "pissa": {"lora": {"r": 4, "init_lora_weights": "pissa"}},
    "olora": {"lora": {"r": 4, "init_lora_weights": "olora"}},
    "corda": {"lora": {"r": 4, "init_lora_weights": "corda", "corda_config": {"corda_method": "kpm"}}},
    "eva": {"lora": {"r": 4, "init_lora_weights": "eva"}},
    "bfloat16": {"training": {"bf16": True}},
    "8-bit optimizer": {
        "lora": {"r": 64, "target_modules": ["q_proj", "o_proj"]},
        "training": {"optim": "adamw_8bit"},
    },
    "qlora": {"quantization": {"load_in_4bit": True}},
    "qlora best": {
        "quantization": {"load_in_4bit": True},
        "training": EVALUATED | RISING | {"load_best_model_at_end": True},
    },
    "int8": {"quantization": {"load_in_8bit": True}},
    "embedding": {"lora": {"r": 4, "target_modules": ["q_proj", "embed_tokens"]}},
    "trained head": {"lora": {"r": 4, "modules_to_save": ["lm_head"]}},
    "trained tokens": {"lora": {"r": 4, "trainable_token_indices": [1, 2]}},
    "added tokens": {"model": {"add_tokens": ["What is", *(f"<{number}>" for number in range(8))]}},
    "two processes": {"training": {"per_device_train_batch_size": 1}, "launch": {"num_processes": 2}},
}
"""What a checkpoint has to hold differs from one to the next."""


def base_model(directory: Path) -> Path:
    """One layer, wide enough to be quantised."""
    return build_base(directory, config=llama_config(**SMALL))


def recipe(directory: Path, base: Path, *, every: int | str = 2, **sections: Any) -> LoadedRecipe:
    """24 rows, 12 steps, a checkpoint every second; `sections` are merged in."""
    directory.mkdir(parents=True, exist_ok=True)
    write_jsonl(directory / "train.jsonl", sums(24))
    # Answers that training makes less likely after a while.
    write_jsonl(directory / "eval.jsonl", [row | {"completion": "No # | ~"} for row in sums(4, first=100)])
    whole: dict[str, Any] = {
        "output_dir": str(directory / "run"),
        "model": {"model_name_or_path": str(base)} | sections.pop("model", {}),
        "lora": {"r": 4},
        "data": {"train": [{"path": "train.jsonl"}], "eval": [{"path": "eval.jsonl"}]},
        "checkpoints": {"every": every},
        "training": TRAINING | sections.pop("training", {}),
    }
    whole |= sections
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump({name: section for name, section in whole.items() if section is not None}))
    return load(path)


def adapter_hash(loaded: LoadedRecipe) -> str:
    """Of the bytes of the final adapter."""
    return hashlib.sha256((loaded.output_dir() / "adapter/adapter_model.safetensors").read_bytes()).hexdigest()


class Crash(Exception):
    """Nothing that anything in lorafit waits for."""


class CrashAfter(TrainerCallback):
    """Ends a run in the middle of a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self._step:
            raise Crash


class Child:
    """`work` in a forked process of a group of its own, its output in a file."""

    def __init__(self, work: Callable[[], Any], *, log: Path, environment: dict[str, str] | None = None) -> None:
        self._log = log
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                os.setpgid(0, 0)
                os.environ |= environment or {}
                output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(output, 1)
                os.dup2(output, 2)
                torch.set_num_threads(1)
                work()
                code = 0
            except BaseException as error:
                import traceback

                traceback.print_exc()
                code = getattr(error, "exit_code", 1)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

    def wait(self, *, timeout: float = 120) -> int:
        """Its exit code, or the negative number of the signal that killed it; what is left of its group is killed."""
        until = time.monotonic() + timeout
        while True:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done or time.monotonic() > until:
                break
            time.sleep(0.005)
        self.kill()
        if not done:
            os.waitpid(self.pid, 0)
            raise AssertionError(f"still running after {timeout} s: {self.said()}")
        return os.waitstatus_to_exitcode(status)

    def kill(self) -> None:
        """SIGKILL to it and to its data loader's processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def said(self) -> str:
        """Its output."""
        return self._log.read_text(encoding="utf-8")


def train_in(loaded: LoadedRecipe, begin: Begin) -> None:
    """One session of a run."""
    with heard(lambda line: print(line, flush=True)):
        result = train(loaded, cache_dir=cache_of(loaded.path.parent), begin=begin)
    print(f"outcome: {result}")


def session(loaded: LoadedRecipe, begin: Begin, *, arm: Callable[[], Any] | None = None) -> list[Child]:
    """A session in as many forked processes as the recipe asks for; `arm` runs in the first of them before it."""

    def work() -> None:
        if arm is not None:
            arm()
        train_in(loaded, begin)

    count = loaded.recipe.launch.num_processes
    log = loaded.path.parent / "session.log"
    if count == "auto" or count == 1:
        return [Child(work, log=log)]
    port = str(20000 + os.getpid() % 20000)
    together = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        Child(
            work if rank == 0 else lambda: train_in(loaded, begin),
            log=log.with_suffix(f".{rank}.log"),
            environment=together | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(count)
    ]


def run_to_end(loaded: LoadedRecipe, begin: Begin) -> str:
    """The hash of the adapter that a session ends with."""
    children = session(loaded, begin)
    for child in children:
        assert child.wait() == 0, child.said()
    return adapter_hash(loaded)
