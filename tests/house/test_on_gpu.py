"""What only a GPU can show: `pytest -m gpu`. `ON=cpu` before it tries these tests on a CPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import plan_vs_gpu
import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen3Config
from trl import SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from lorafit.lines import heard
from lorafit.merging.merge import merge
from lorafit.preflight import this_machine
from lorafit.recipe import LoadedRecipe
from lorafit.speed.fused_lora import fuse
from lorafit.speed.varlen_attention import packed_attention, use_varlen_attention, why_not
from lorafit.training.invariants import remember
from lorafit.training.smoke import smoke
from lorafit.training.train import run_training, train
from support.eval_cases import evaluated
from support.forked import Crash, CrashAfter
from support.out_of_memory import Memory
from support.runs import cache_of, run, small_recipe
from support.tiny import build_base, llama_config, write_jsonl

pytestmark = pytest.mark.gpu
MIB = 2**20
HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def device() -> str:
    """Where the test computes."""
    if torch.cuda.is_available():
        return "cuda"
    if os.environ.get("ON") == "cpu":
        return "cpu"
    pytest.skip("there is no CUDA device here")


def apart(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference, as a share of what was expected."""
    return ((got.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-9)).item()


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    ("head", "heads", "groups", "window"),
    [(64, 8, 8, None), (128, 8, 2, None), (96, 4, 4, None), (256, 8, 4, None), (128, 8, 2, 50), (80, 4, 1, None)],
)
def test_attention_by_document_is_dense_attention_under_a_mask(
    head: int, heads: int, groups: int, window: int | None, dtype: torch.dtype, device: str
) -> None:
    torch.manual_seed(0)
    lengths = [5, 130, 64, 301, 12]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
    shape: dict[str, Any] = {"device": device, "dtype": dtype, "requires_grad": True}
    query, key, value = (torch.randn(1, count, sum(lengths), head, **shape) for count in (heads, groups, groups))
    named: dict[str, Any] = {"cu_seq_lens_q": bounds, "max_length_q": max(lengths), "sliding_window": window}
    out, _ = packed_attention(nn.Module(), query, key, value, None, scaling=head**-0.5, **named)

    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
    place = torch.arange(sum(lengths), device=device)
    mask = (document[:, None] == document) & (place[:, None] >= place)
    if window is not None:
        mask &= place[:, None] - place < window
    exact = [states.detach().float().requires_grad_() for states in (query, key, value)]
    dense = functional.scaled_dot_product_attention(
        exact[0], exact[1], exact[2], attn_mask=mask, scale=head**-0.5, enable_gqa=heads != groups
    ).transpose(1, 2)
    upstream = torch.randn_like(dense)
    out.backward(upstream.to(dtype))
    dense.backward(upstream)
    assert apart(out, dense) < 0.01
    for ours, theirs in zip((query, key, value), exact, strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert apart(ours.grad, theirs.grad) < 0.02


SMALL: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("kind", "more"),
    [(LlamaConfig, {}), (Qwen3Config, {}), (MistralConfig, {"sliding_window": 8}), (Gemma3TextConfig, {})],
)
def test_every_architecture_takes_attention_by_document(
    kind: Any, more: dict[str, Any], weights: torch.dtype, device: str
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**SMALL | more), dtype=weights).to(device)
    assert why_not(model, dtype=torch.bfloat16) is None
    use_varlen_attention(model)


def four_bits(columns: int, rows: int) -> nn.Module:
    return Linear4bit(columns, rows, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")


def eight_bits(columns: int, rows: int) -> nn.Module:
    return Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False)


class Block(nn.Module):
    """Two linear layers, with the little that peft asks of a model."""

    def __init__(self, layer: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.config = {"model_type": "block"}
        self.up, self.down = layer(256, 512), layer(512, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(functional.silu(self.up(x)))


@pytest.mark.parametrize("autocast", [None, *HALF], ids=str)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layer", [nn.Linear, four_bits, eight_bits])
def test_fused_lora_has_the_gradients_of_peft(
    layer: Any, weights: torch.dtype, autocast: torch.dtype | None, device: str
) -> None:
    torch.manual_seed(0)
    model = get_peft_model(Block(layer).to(weights).to(device), LoraConfig(target_modules=["up", "down"], r=8)).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        nn.init.normal_(parameter, std=0.05)
    x = torch.randn(3, 40, 256, device=device, dtype=weights, requires_grad=True)
    upstream = torch.randn(3, 40, 256, device=device)

    def step() -> list[torch.Tensor]:
        model.zero_grad()
        x.grad = None
        with torch.autocast(device, autocast) if autocast else nullcontext():
            out = checkpoint(model, x, use_reentrant=False)
        (out.float() * upstream).sum().backward()
        return [out.detach(), *(cast(torch.Tensor, tensor.grad).clone() for tensor in (x, *trained))]

    expected = step()
    assert fuse(model) == (2, {})
    for ours, theirs in zip(step(), expected, strict=True):
        assert ours.isfinite().all()
        assert apart(ours, theirs) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
def test_a_frozen_tensor_has_the_same_hash_wherever_it_lies(dtype: torch.dtype, device: str) -> None:
    """FSDP2 reads a base on the CPU and moves it; a hash that changed on the way would throw a finished run away."""
    torch.manual_seed(0)
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.randint(0, 255, (1 << 20,)).to(dtype), requires_grad=False)
    here = remember(layer).frozen
    assert here["weight"] not in (0, None)
    assert remember(layer.to(device)).frozen == here


def test_log_probabilities_of_trained_positions_are_those_of_cross_entropy(device: str) -> None:
    """TRL takes them by a kernel of its own on a GPU."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL), dtype=torch.bfloat16).to(device)
    ids = torch.randint(0, SMALL["vocab_size"], (2, 50), device=device)
    labels = ids.clone()
    labels[:, :20] = -100
    logits = model(input_ids=ids).logits[:, :-1].float().flatten(0, 1)
    expected = functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    assert apart(-model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs.sum(), expected) < 1e-3
    without_labels = model(input_ids=ids, labels=torch.full_like(labels, -100), fused_lm_head=True).loss
    without_labels.backward()
    assert without_labels.item() == 0


QLORA = {"quantization": {"load_in_4bit": True}, "model": {"dtype": "bfloat16"}}


def test_a_quantised_run_is_trained_merged_and_evaluated(tmp_path: Path, device: str) -> None:
    base = build_base(tmp_path / "base", dtype=torch.bfloat16)
    optim = "paged_adamw_8bit" if device == "cuda" else "adamw_torch"
    training = {"max_steps": 12, "learning_rate": 2e-2, "optim": optim, "bf16": True, "packing": True}
    loaded = small_recipe(tmp_path, base, **QLORA | {"training": training})
    trained, said = run(loaded)
    assert trained.eval_loss_before is not None and trained.eval_loss_after is not None
    assert trained.eval_loss_after < trained.eval_loss_before - 0.5
    assert any(line.startswith("fused LoRA on") for line in said), said
    merged = merge(
        Path(trained.run), out=None, dtype=None, max_shard_size=None, base=None, onto=None, verify=True,
        progress=lambda total: lambda done: None, cache_dir=None,
    )  # fmt: skip
    assert Path(merged.out).is_dir()
    result, _ = evaluated(trained.run)
    assert (result.held_out.difference["loss"].mean or 0) < -0.5


def test_a_gpu_without_bfloat16_trains_in_float16(tmp_path: Path, device: str) -> None:
    """On a CPU the same in float32: there is no half precision."""
    base = build_base(tmp_path / "base", dtype=torch.float16 if device == "cuda" else torch.float32)
    half = {"fp16": True, "bf16": False} if device == "cuda" else {"bf16": False}
    loaded = small_recipe(tmp_path, base, training={"max_steps": 12, "learning_rate": 1e-2} | half)
    smoke(loaded, output_dir=None)
    trained, said = run(loaded)
    assert any(line.startswith("self-test passed") for line in said)
    assert trained.eval_loss_before is not None and trained.eval_loss_after is not None
    assert trained.eval_loss_after < trained.eval_loss_before - 0.5


def adapter_in(loaded: LoadedRecipe) -> dict[str, torch.Tensor]:
    return load_file(loaded.output_dir() / "adapter" / "adapter_model.safetensors")


def in_place(place: Path, base: Path, **sections: Any) -> LoadedRecipe:
    place.mkdir()
    return small_recipe(place, base, **sections)


def assert_close(one: LoadedRecipe, other: LoadedRecipe) -> None:
    """To rounding: a GPU sums in no fixed order."""
    expected = adapter_in(one)
    for name, tensor in adapter_in(other).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=2e-4, msg=name)


def test_a_resumed_run_ends_where_an_undisturbed_one_does(tmp_path: Path, tiny_base: Path) -> None:
    sections = {"lora": {"r": 4, "lora_dropout": 0.2}, "checkpoints": {"every": 2}, "training": {"max_steps": 6}}
    whole, broken = (in_place(tmp_path / name, tiny_base, **sections) for name in ("whole", "broken"))
    run(whole)
    with pytest.raises(Crash):
        run_training(broken, cache_dir=cache_of(broken.path.parent), watchers=[CrashAfter(5)])
    assert train(broken, cache_dir=cache_of(broken.path.parent), begin="resume").steps == 6
    assert_close(whole, broken)


@contextmanager
def limited_to(rows: int, *, device: str, peaks: tuple[int, int]) -> Iterator[None]:
    """Memory for micro-batches of so many rows: half way between the peaks of that and of the next size."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(sum(peaks) / 2 / this_machine().memory_bytes)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return
    memory = Memory(lambda trainer, now: now > rows, after_backward=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SFTTrainer, "training_step", lambda *rest, **named: memory.step(*rest, **named))
        yield


def test_a_batch_that_does_not_fit_is_halved_to_the_same_result(tmp_path: Path, device: str) -> None:
    base = build_base(tmp_path / "base", config=llama_config(hidden_size=256, intermediate_size=1024))
    said: list[str] = []

    def trained(name: str, *, size: int, limit: AbstractContextManager[None]) -> tuple[LoadedRecipe, int]:
        training = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 16 // size, "max_length": 512}
        more = {
            "training": training | {"gradient_checkpointing": False},
            "health": {"on_oom": "halve_batch"},
            "data": {"eval": []},
        }
        loaded = in_place(tmp_path / name, base, **more)
        rows = [{"prompt": f"{number}:", "completion": "0123456789" * 48} for number in range(48)]
        write_jsonl(loaded.path.parent / "train.jsonl", rows)
        with limit, heard(said.append):
            done = run_training(loaded, cache_dir=cache_of(loaded.path.parent))
        return loaded, done.result.peak_memory_bytes

    _, high = trained("large", size=16, limit=nullcontext())
    half, low = trained("half", size=8, limit=nullcontext())
    if device == "cuda":
        assert high - low > 64 * MIB, "too near to set a limit between them"
    halved, _ = trained("halved", size=16, limit=limited_to(8, device=device, peaks=(low, high)))
    assert sum("per_device_train_batch_size 16 -> 8" in line for line in said) == 1
    assert_close(half, halved)


def test_the_plan_is_what_the_allocator_gives_out(device: str) -> None:
    """A model of 135 M parameters and rows of 2,048 tokens: larger by far than what lies around a step."""
    gpu = plan_vs_gpu.apart("device") if device == "cuda" else None
    cases = plan_vs_gpu.CASES[:5] if gpu else plan_vs_gpu.CASES[:1]
    shape = "smollm2-135m" if gpu else "tiny"
    rows = list(plan_vs_gpu.rows(cases, shape=shape, gpu=gpu, budget=600))
    assert len(rows) == len(cases)
    for row in rows:
        assert abs(row["memory_off"]) <= plan_vs_gpu.ALLOWED, plan_vs_gpu.line(row)
