"""Adapters of every kind with a random update, the right merge of each, and the verdict on a written model."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, MixtralConfig

from lorafit.builders.base_model import check_base_model
from lorafit.builders.model_files import BaseModelFiles
from lorafit.merging.adapter_files import Adapter, read_adapter
from lorafit.merging.prompts_job import choose
from lorafit.merging.verification_prompts import Prompts, PromptsJob
from lorafit.merging.verify import MergeReport, judge, verification_job
from lorafit.merging.verify_job import Job
from lorafit.merging.verify_reference import reference, untie
from lorafit.merging.verify_written import compare
from lorafit.recipe.sections import ModelSection
from support.tiny import build_base, llama_config

SMALL: dict[str, Any] = {"vocab_size": 264, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2}
MIXTRAL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
BASES: dict[str, Any] = {
    "llama": lambda: llama_config(),
    "tied": lambda: llama_config(tie_word_embeddings=True),
    "biased": lambda: llama_config(attention_bias=True),
    "mixtral": lambda: MixtralConfig(**SMALL, **MIXTRAL),
    "gpt2": lambda: GPT2Config(**SMALL, n_embd=64, n_layer=2, n_head=4, n_positions=256),
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {}),
    "rslora": ("llama", {"use_rslora": True}),
    "dora": ("llama", {"use_dora": True}),
    "patterns": ("llama", {"rank_pattern": {"q_proj": 16}, "alpha_pattern": {"down_proj": 2}}),
    "head": ("llama", {"modules_to_save": ["lm_head"]}),
    "tokens": ("llama", {"trainable_token_indices": [5, 77]}),
    "bias": ("biased", {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    "tied embedding": ("tied", {"target_modules": ["q_proj", "embed_tokens"]}),
    "tied head": ("tied", {"target_modules": ["q_proj", "lm_head"]}),
    "tied tokens": ("tied", {"trainable_token_indices": [5, 77]}),
    "experts": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
}


@dataclass(frozen=True)
class Case:
    """A base, an adapter on it, and the right merge of both."""

    adapter: Adapter
    base_files: BaseModelFiles
    prompts: Prompts
    right: Path
    job: Job
    facts: dict[str, Any]
    """Of its reference."""


def random_adapter(base: Path, directory: Path, *, size: float = 1.0, **settings: Any) -> Path:
    """A plain PEFT adapter that changes its weights by `size` times some tenths of what they are."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    keys: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False}
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **(keys | settings)))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and ("lora_B" in name or "embedding_A" in name):
            parameter.data = 0.1 * size * torch.randn_like(parameter)
        elif parameter.requires_grad and ("lora_A" in name or "embedding_B" in name):
            parameter.data = 0.1 * torch.randn_like(parameter)
        elif parameter.requires_grad:
            parameter.data *= 1 + 0.1 * size * torch.randn_like(parameter)
    adapted.save_pretrained(str(directory), save_embedding_layers=False)
    return directory


def merged_by_peft(base: Path, adapter: Path, out: Path, *, dtype: str) -> Path:
    """The right merge: in float32, with weights of their own where they were tied, rounded once."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(model, adapter)
    untie(adapted)
    merged = adapted.merge_and_unload()
    first, last = merged.get_input_embeddings().weight, merged.get_output_embeddings().weight
    if torch.equal(first, last):
        merged.config.tie_word_embeddings = True
        merged.tie_weights()
    merged.to(getattr(torch, dtype)).save_pretrained(out)
    return out


def case(
    directory: Path,
    variant: str,
    *,
    dtype: str,
    size: float = 1.0,
    base_dtype: str = "float32",
    init_lora_weights: Any = False,
) -> Case:
    """Everything about one variant, with the reference computed in this process."""
    kind, settings = VARIANTS[variant]
    base = build_base(directory / "base", config=BASES[kind](), dtype=getattr(torch, base_dtype))
    plain = random_adapter(base, directory / "adapter", size=size, init_lora_weights=init_lora_weights, **settings)
    right = merged_by_peft(base, plain, directory / "right", dtype=dtype)
    adapter = read_adapter(plain, base=str(base))
    base_files = check_base_model(ModelSection(model_name_or_path=str(base)))
    ids, _ = choose(PromptsJob(adapter.base, None, frozenset(), base_files.vocab_size, cache_dir=None))
    prompts = Prompts(tuple(map(tuple, ids[:8])), "8 random sequences")
    (directory / "work").mkdir()
    job = verification_job(
        right, adapter=adapter, base_files=base_files, dtype=dtype, prompts=prompts, work=directory / "work"
    )
    return Case(adapter, base_files, prompts, right, job, reference(job))


def verdict(case: Case, written: Path) -> MergeReport:
    """On the model in `written`, compared in this process."""
    job = replace(case.job, written=str(written))
    findings = compare(job, case.facts)
    return judge(findings, job=job, prompts=case.prompts, adapter=case.adapter, onto="original")


def copied(case: Case, target: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A copy of the right model to break, and its tensors."""
    shutil.copytree(case.right, target)
    return target, load_file(target / "model.safetensors")


def rewrite(directory: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """`directory` with other weights."""
    save_file({name: t.contiguous() for name, t in tensors.items()}, directory / "model.safetensors", {"format": "pt"})
    return directory
