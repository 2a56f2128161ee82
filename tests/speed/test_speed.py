"""Every lever gives what the plain path gives, and stands back where it does not."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Gemma2Config,
    GPT2Config,
    MistralConfig,
    PreTrainedModel,
    Qwen3Config,
)
from trl.trainer.utils import add_fused_lm_head

from lorafit.builders.adapter import attach_adapter
from lorafit.builders.lora_config import lora_config
from lorafit.builders.model_modules import weight_of
from lorafit.errors import Problem
from lorafit.recipe.sections import LoraSection
from lorafit.speed.answer_head import AnswerLoss, use_answer_head
from lorafit.speed.answer_head import why_not as why_no_answer_head
from lorafit.speed.fused_lora import FusedLinear, FusedLinear4bit, FusedLinear8bit, fuse
from lorafit.speed.varlen_attention import NAME, SHORT, packed_attention, use_varlen_attention
from lorafit.speed.varlen_attention import why_not as why_no_varlen_attention
from support.models import HEADS, SMALL, apart, built, packed
from support.runs import run, small_recipe
from support.tiny import build_base, llama_config


def test_the_answer_loss_is_cross_entropy_with_its_gradient() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(700, 32, requires_grad=True), torch.randn(50, 32)
    targets, upstream = torch.randint(0, 50, (700,)), torch.randn(700)
    none = torch.empty(0, dtype=torch.long)
    nll, entropy, is_top1 = AnswerLoss.apply(hidden, weight, targets, torch.float32, none, weight[:0])
    (ours,) = torch.autograd.grad((nll * upstream).sum(), hidden)
    logits = hidden @ weight.T
    expected = functional.cross_entropy(logits, targets, reduction="none")
    (theirs,) = torch.autograd.grad((expected * upstream).sum(), hidden)
    torch.testing.assert_close(nll, expected)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=logits).entropy())
    assert torch.equal(is_top1, logits.argmax(1) == targets)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_the_answer_head_answers_as_trl_does(bf16: bool) -> None:
    outputs: list[Any] = []
    gradients: list[Any] = []
    for ours in (False, True):
        model = built(llama_config())
        model.get_output_embeddings().weight.requires_grad_(False)
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
        if ours:
            assert why_no_answer_head(model) is None
            use_answer_head(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = model(**packed(9, 30, 4), fused_lm_head=True)
        (-output.log_probs.sum()).backward()
        outputs.append(output)
        gradients.append(weight_of(model.get_input_embeddings()).grad)
    close: dict[str, Any] = {"rtol": 2e-2, "atol": 2e-2} if bf16 else {}
    for name in ("log_probs", "entropy", "loss"):
        torch.testing.assert_close(outputs[1][name], outputs[0][name], **close)
    assert torch.equal(outputs[1].is_top1.bool(), outputs[0].is_top1.bool())
    assert torch.equal(outputs[1].label_mask, outputs[0].label_mask)
    assert apart(gradients[1], gradients[0]) < (0.03 if bf16 else 1e-5)


@pytest.mark.parametrize("is_off", [False, True], ids=["adapter on", "adapter off"])
@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
def test_the_answer_head_trains_rows_of_tokens_as_trl_does(tied: bool, is_off: bool) -> None:
    losses: list[torch.Tensor] = []
    gradients: list[dict[str, Any]] = []
    for ours in (False, True):
        base = built(llama_config(tie_word_embeddings=tied))
        config = lora_config(LoraSection(), adalora=None, model=base, where=Problem, token_ids=(5, 77))
        model = attach_adapter(
            base,
            config,
            init_method=True,
            seed=0,
            autocast_adapter_dtype=True,
            batches=list,
            base_directory="",
        )
        with torch.no_grad():
            for name, tensor in model.named_parameters():
                if "trainable_tokens_delta" in name:
                    tensor.mul_(3)
        add_fused_lm_head(base)
        if ours:
            assert why_no_answer_head(base) is None
            use_answer_head(base)
        batch = packed(9, 30, 4)
        batch["input_ids"][0, 1], batch["input_ids"][0, 12], batch["labels"][0, 8] = 5, 77, 5
        with model.disable_adapter() if is_off else nullcontext():
            losses.append(base(**batch, fused_lm_head=True).loss)
        if not is_off:
            losses[-1].backward()
            trained = {name: p.grad for name, p in model.named_parameters() if "trainable_tokens_delta" in name}
            assert len(trained) == (1 if tied else 2)
            gradients.append(trained)
    torch.testing.assert_close(losses[1], losses[0])
    for name in gradients[0] if gradients else ():
        assert apart(gradients[1][name], gradients[0][name]) < 1e-5


def test_a_batch_without_a_trained_position_gives_a_zero_that_goes_backward() -> None:
    model = built(llama_config())
    model.get_output_embeddings().weight.requires_grad_(False)
    add_fused_lm_head(model)
    use_answer_head(model)
    batch = packed(6, 5)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss = model(**batch, fused_lm_head=True).loss
    loss.backward()
    assert loss.item() == 0.0
    gradient = weight_of(model.get_input_embeddings()).grad
    assert gradient is not None and not gradient.any()


def test_generation_goes_on_as_before_under_the_answer_head() -> None:
    model = built(llama_config()).eval()
    prompt = torch.arange(3, 12)[None]
    settings = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(prompt), "pad_token_id": 0}
    before = model.generate(prompt, **settings)
    add_fused_lm_head(model)
    use_answer_head(model)
    assert torch.equal(model.generate(prompt, **settings), before)


def test_heads_that_do_more_than_a_product_stay_with_trl() -> None:
    capped = built(Gemma2Config(**SMALL, **HEADS, final_logit_softcapping=30.0))
    capped.get_output_embeddings().weight.requires_grad_(False)
    assert why_no_answer_head(capped) == "the model scales its logits (final_logit_softcapping)"
    trained = built(llama_config())
    assert why_no_answer_head(trained) == "the head is not a plain frozen linear layer"


def adapted(base: PreTrainedModel, **lora: Any) -> PeftModel:
    """With B filled, so that the adapter matters."""
    torch.manual_seed(2)
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = get_peft_model(base, LoraConfig(**(settings | lora)))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def gradients_of(model: PeftModel, *, bf16: bool) -> dict[str, torch.Tensor]:
    """Gradients of one step, by name, and the loss."""
    model.train()
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model(**packed(20, 9), use_cache=False).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {"loss": loss.detach()}


@pytest.mark.parametrize(
    ("config", "dtype", "bf16", "allowed"),
    [
        (llama_config(), torch.float32, False, 1e-5),
        (llama_config(attention_bias=True), torch.float32, False, 1e-5),
        (GPT2Config(vocab_size=264, n_embd=64, n_layer=2, n_head=4), torch.float32, False, 1e-5),
        (llama_config(), torch.float32, True, 0.03),
        (llama_config(), torch.bfloat16, True, 0.03),
    ],
    ids=["float32", "bias", "Conv1D", "autocast", "bfloat16"],
)
def test_fused_lora_has_the_gradients_of_peft(config: Any, dtype: torch.dtype, bf16: bool, allowed: float) -> None:
    base: Any = built(config)
    model = adapted(base.to(dtype), fan_in_fan_out=isinstance(config, GPT2Config))
    expected = gradients_of(model, bf16=bf16)
    assert fuse(model) == (sum(isinstance(layer, FusedLinear) for layer in model.modules()), {})
    got = gradients_of(model, bf16=bf16)
    assert got.keys() == expected.keys()
    assert len(got) > 10
    for name, gradient in expected.items():
        assert apart(got[name], gradient) <= allowed, name


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}


@pytest.mark.parametrize(("bits", "kind"), [(NF4, FusedLinear4bit), ({"load_in_8bit": True}, FusedLinear8bit)])
def test_fused_lora_takes_a_quantised_base(bits: dict[str, Any], kind: type, tmp_path: Path) -> None:
    base = build_base(tmp_path, dtype=torch.bfloat16)
    model = adapted(AutoModelForCausalLM.from_pretrained(base, quantization_config=BitsAndBytesConfig(**bits)))
    expected = gradients_of(model, bf16=True)
    assert fuse(model) == (14, {})
    assert sum(isinstance(layer, kind) for layer in model.modules()) == 14
    got = gradients_of(model, bf16=True)
    assert max(apart(got[name], gradient) for name, gradient in expected.items()) < 0.03


def test_evaluation_saving_and_unloading_stay_those_of_peft(tmp_path: Path) -> None:
    model = adapted(built(llama_config()))
    batch = packed(12, 7)
    model.eval()
    with torch.no_grad():
        before = model(**batch, use_cache=False).logits
        fuse(model)
        assert torch.equal(model(**batch, use_cache=False).logits, before)
        with model.disable_adapter():
            without = model(**batch, use_cache=False).logits
        model.train()
        with model.disable_adapter():
            torch.testing.assert_close(model(**batch, use_cache=False).logits, without)
        model.eval()
        model.save_pretrained(str(tmp_path))
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(**batch, use_cache=False).logits, before)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 28


@pytest.mark.parametrize(
    ("lora", "reason"),
    [
        ({"use_dora": True}, "DoRA or another variant"),
        ({"lora_dropout": 0.1}, "lora_dropout"),
        ({"bias": "all"}, "a trained bias"),
        ({"lora_bias": True}, "lora_bias"),
    ],
)
def test_other_adapters_keep_the_path_of_peft(lora: dict[str, Any], reason: str) -> None:
    model = adapted(built(llama_config(attention_bias=True, mlp_bias=True)), **lora)
    assert fuse(model) == (0, {reason: 14})


class _Traffic(torch.utils._python_dispatch.TorchDispatchMode):
    """Bytes of the tensors that operations read and write; views move none."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and "detach" not in func.name():
            tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return out


def test_fused_lora_moves_half_of_what_peft_moves_for_the_adapter() -> None:
    moved = {}
    for kind in ("base", "peft", "fused"):
        layer = torch.nn.Sequential(torch.nn.Linear(512, 512, bias=False, dtype=torch.bfloat16))
        model = get_peft_model(layer, LoraConfig(r=8, target_modules=["0"]))
        if kind == "fused":
            assert fuse(model) == (1, {})
        x = torch.randn(1024, 512, dtype=torch.bfloat16, requires_grad=True)
        with _Traffic() as traffic, torch.autocast("cpu", torch.bfloat16):
            if kind == "base":
                with model.disable_adapter():
                    model(x).sum().backward()
            else:
                model(x).sum().backward()
        moved[kind] = traffic.bytes
    assert moved["fused"] - moved["base"] < 0.5 * (moved["peft"] - moved["base"])


@pytest.mark.parametrize(
    "config",
    [
        llama_config(),
        Qwen3Config(**SMALL, **HEADS),
        MistralConfig(**SMALL, **HEADS, sliding_window=6),
        GPT2Config(vocab_size=264, n_embd=64, n_layer=2, n_head=4, attn_pdrop=0.0),
    ],
    ids=["llama", "qwen3", "sliding window", "gpt2"],
)
def test_packed_documents_come_out_as_they_do_alone(config: Any) -> None:
    model = built(config).eval()
    assert why_no_varlen_attention(model, dtype=torch.float32) is None
    use_varlen_attention(model)
    assert model.config._attn_implementation == NAME
    batch = packed(20, 3, 11)
    together = model(**batch, use_cache=False).logits[0]
    model.set_attn_implementation("sdpa")
    bounds = batch["cu_seq_lens_q"].tolist()
    for start, end in pairwise(bounds):
        alone = model(batch["input_ids"][:, start:end], use_cache=False).logits[0]
        torch.testing.assert_close(together[start:end], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lengths", [(5, 30, 9), (2 * SHORT, 30)], ids=["short", "long"])
def test_under_autocast_documents_of_any_length_are_as_near_as_bfloat16_is(lengths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    states = [torch.randn(1, heads, sum(lengths), 16, requires_grad=True) for heads in (4, 2, 2)]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    query, key, value = states
    named: dict[str, Any] = {"cu_seq_lens_q": bounds, "max_length_q": max(lengths)}
    exact, _ = packed_attention(nn.Identity(), query, key, value, None, **named)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, _ = packed_attention(nn.Identity(), query, key, value, None, **named)
    assert (exact.dtype, rounded.dtype) == (torch.float32, torch.bfloat16)
    direction = torch.randn_like(exact)
    gradients = [torch.autograd.grad((out * direction).sum(), states) for out in (exact, rounded)]
    for one, other in zip((exact, *gradients[0]), (rounded, *gradients[1]), strict=True):
        assert 0 < (one - other).norm() / one.norm() < 0.01


def test_padded_batches_and_single_rows_are_unchanged() -> None:
    model = built(MistralConfig(**SMALL, **HEADS, sliding_window=6)).eval()
    ids, mask = torch.randint(3, 264, (2, 15)), torch.ones(2, 15, dtype=torch.long)
    mask[1, 9:] = 0
    before = model(ids, attention_mask=mask).logits, model(ids[:1]).logits
    assert why_no_varlen_attention(model, dtype=torch.float32) is None
    use_varlen_attention(model)
    after = model(ids, attention_mask=mask).logits, model(ids[:1]).logits
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[1], before[1])


def test_a_model_that_drops_the_bounds_of_documents_keeps_its_attention() -> None:
    model = built(llama_config())
    inner = model.base_model.forward

    def without_bounds(*inputs: Any, cu_seq_lens_q: Any = None, **named: Any) -> Any:
        return inner(*inputs, **named)

    model.base_model.forward = without_bounds
    reason = why_no_varlen_attention(model, dtype=torch.float32)
    assert reason is not None
    assert reason.startswith("its states differ by")
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Gemma2Config(**SMALL, **HEADS), "attention is eager"),
        (GPT2Config(vocab_size=264, n_embd=64, n_layer=2, n_head=4), "the model drops attention out (attn_pdrop)"),
    ],
)
def test_attention_of_another_kind_is_left_alone(config: Any, reason: str) -> None:
    assert why_no_varlen_attention(built(config), dtype=torch.float32) == reason


LEVERS = {
    "varlen_attention": "packed attention by document on",
    "fused_lora": "fused LoRA on 14 of 14 modules",
    "answer_head": "answer head on",
}


def test_a_run_says_which_levers_it_uses_and_ends_where_the_plain_run_ends(tmp_path: Path) -> None:
    base = build_base(tmp_path / "base")
    training = {"packing": True, "max_steps": 6, "per_device_train_batch_size": 2}
    weights, losses = [], []
    for name, value in (("fast", True), ("plain", False)):
        directory = tmp_path / name
        directory.mkdir()
        loaded = small_recipe(
            directory,
            base,
            training={"max_length": 64, "learning_rate": 5e-3, "logging_steps": 1, "bf16": False} | training,
            speed=dict.fromkeys(LEVERS, value),
        )
        result, said = run(loaded)
        assert [line in said for line in LEVERS.values()] == [value] * 3
        weights.append(load_file(Path(result.adapter) / "adapter_model.safetensors"))
        assert result.eval_loss_after is not None
        losses.append(result.eval_loss_after)
    assert abs(losses[0] - losses[1]) < 1e-4
    for key, tensor in weights[1].items():
        assert apart(weights[0][key], tensor) < 1e-3, key


@pytest.mark.parametrize("lever", LEVERS)
def test_each_lever_can_be_turned_off(lever: str, tmp_path: Path) -> None:
    base = build_base(tmp_path / "base")
    _, said = run(small_recipe(tmp_path, base, training={"packing": True}, speed={lever: False}))
    assert [name for name, line in LEVERS.items() if line not in said] == [lever]
