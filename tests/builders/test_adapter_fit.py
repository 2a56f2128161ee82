"""What a recipe asks of its base: names, ranks and positions, from the base's files as from the model itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from lorafit.builders.adapter_fit import adapter_misfits
from lorafit.builders.model_modules import modules_of
from lorafit.builders.modules import CALLED_AS_ON_DISK, Modules, modules_on_disk
from lorafit.builders.positions import IN_A_TABLE, WITHOUT, Positions, positions
from lorafit.builders.weight_files import TensorInfo
from lorafit.errors import Problem
from support.recipes import SMALLEST, loaded, problems

SMALL = {
    **dict.fromkeys(("hidden_size", "n_embd", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim"), 128),
    **dict.fromkeys(("num_hidden_layers", "n_layer"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_key_value_heads"), 4),
    **{"head_dim": 16, "vocab_size": 264, "pad_token_id": 0, "max_position_embeddings": 64, "n_positions": 64},
}


def empty(kind: str, **changes: Any) -> PreTrainedModel:
    """A small model of an architecture, without weights."""
    config = AutoConfig.for_model(kind)
    for name, value in (SMALL | changes).items():
        if hasattr(config, name) and not isinstance(getattr(type(config), name, None), property):
            setattr(config, name, value)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def on_disk(model: PreTrainedModel, *, without: str = "") -> Modules:
    """What the headers of its files would tell, tied weights and a prefix left out."""
    tied = {name for name, source in (model.all_tied_weights_keys or {}).items() if name != source}
    tensors = {
        name.removeprefix(without): TensorInfo("model.safetensors", "F32", tuple(tensor.shape), 0, 0)
        for name, tensor in model.state_dict().items()
        if name not in tied
    }
    found = modules_on_disk(tensors, config=model.config.to_dict())
    assert found is not None
    return found


@pytest.mark.parametrize("kind", CALLED_AS_ON_DISK)
def test_the_headers_of_a_base_tell_the_modules_of_its_model(kind: str) -> None:
    model = empty(kind)
    assert not get_model_conversion_mapping(model, add_legacy=False)
    told, real = on_disk(model), modules_of(model)
    assert told.shapes == real.shapes
    assert (told.beside_layers, told.rows) == (real.beside_layers, real.rows)
    assert {*told.names} <= {*real.names}
    assert {*told.parameters} <= {*real.parameters, *model.state_dict()}


def test_gpt2s_own_files_lack_the_prefix_of_its_names() -> None:
    model = empty("gpt2")
    assert on_disk(model, without="transformer.").shapes == modules_of(model).shapes


def test_architectures_that_are_renamed_on_loading_are_not_told_by_their_files() -> None:
    assert modules_on_disk({}, config={"model_type": "mixtral"}) is None


MISFITS = {
    "target_modules: [q_proj, qq_proj]": "lora.target_modules: 'qq_proj' matches nothing in this model; did you mean "
    "q_proj or v_proj or o_proj?",
    "target_modules: [q_proj, self_attn]": "lora.target_modules: 'self_attn' matches nothing in this model; it has "
    "down_proj, embed_tokens, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj",
    "target_modules: 'q_proj|v_proj'": "lora.target_modules: the expression 'q_proj|v_proj' matches no module; write "
    "'.*\\.(q_proj|v_proj)'",
    "exclude_modules: [mpl]": "lora.exclude_modules: 'mpl' matches nothing in this model; it has down_proj, "
    "embed_tokens, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj",
    "modules_to_save: [lm_haed]": "lora.modules_to_save: 'lm_haed' matches nothing in this model; did you mean "
    "lm_head?",
    "rank_pattern: {x_proj: 4}": "lora.rank_pattern: 'x_proj' matches no module with an adapter; did you mean v_proj "
    "or q_proj or o_proj?",
    "alpha_pattern: {lm_head: 4}": "lora.alpha_pattern: 'lm_head' matches no module with an adapter; it has down_proj, "
    "gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj",
    "{target_modules: [q_proj], layers_to_transform: [0, 2]}": "lora.layers_to_transform: layer 2 does not exist; this "
    "model has layers 0 to 1",
    "target_parameters: [mlp.experts]": "lora.target_parameters: 'mlp.experts' matches nothing in this model; it has "
    "none",
    "trainable_token_indices: [264]": "lora.trainable_token_indices: token 264 does not exist; ids run from 0 to 263",
    "r: 65": "lora.r: 65 is more than the shorter side of down_proj (64), gate_proj (64), k_proj (32), o_proj "
    "(64), q_proj (64), up_proj (64), v_proj (32), an adapter larger than what it adapts; write at most 32",
    "r: 48": "lora.r: 48 is more than the shorter side of k_proj (32), v_proj (32), an adapter larger than what it "
    "adapts; write at most 32, or lora.rank_pattern: {k_proj: 32, v_proj: 32}",
    "rank_pattern: {k_proj: 33}": "lora.rank_pattern: 33 is more than the shorter side of k_proj (32), an adapter "
    "larger than what it adapts; write at most 32",
}
FITTING = (
    *("r: 32", "target_modules: [q_proj, model.layers.0.self_attn.k_proj]"),
    *("target_modules: '.*_proj'", "exclude_modules: [mlp, lm_head]", "rank_pattern: {'layers\\.1\\..*': 8}"),
    *(
        "{r: 64, target_modules: [q_proj]}",
        "{r: 48, rank_pattern: {'[kv]_proj': 32}}",
        "{r: 64, exclude_modules: '.*'}",
    ),
    "modules_to_save: [norm]",
)


def said(directory: Path, lora: str, modules: Modules) -> list[str]:
    """What the section is told of such modules."""
    recipe = loaded(directory, f"{SMALLEST}lora: {lora if lora[0] == '{' else f'{{{lora}}}'}\n")
    found = adapter_misfits(recipe.recipe, modules, lambda key, message: Problem(key, message))
    return [str(problem) for problem in found]


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return empty("llama", num_key_value_heads=2)


@pytest.mark.parametrize("lora", MISFITS)
def test_what_does_not_fit_is_named_alike_from_files_and_model(
    lora: str, tmp_path: Path, llama: PreTrainedModel
) -> None:
    assert said(tmp_path, lora, modules_of(llama)) == said(tmp_path, lora, on_disk(llama)) == [MISFITS[lora]]


@pytest.mark.parametrize("lora", FITTING)
def test_what_fits_is_not_minded(lora: str, tmp_path: Path, llama: PreTrainedModel) -> None:
    assert said(tmp_path, lora, modules_of(llama)) == said(tmp_path, lora, on_disk(llama)) == []


def test_a_gate_of_few_outputs_does_not_mind_the_rank_unless_it_is_listed(tmp_path: Path) -> None:
    gate = "model.layers.0.mlp.shared_expert_gate"
    modules = Modules((gate,), {gate: (1, 64), "model.layers.0.q_proj": (64, 64)}, (), frozenset(), 264)
    assert said(tmp_path, "r: 16", modules) == []
    assert said(tmp_path, "{r: 16, target_modules: '.*gate'}", modules) == []
    (line,) = said(tmp_path, "{r: 16, target_modules: [shared_expert_gate]}", modules)
    assert line.startswith("lora.r: 16 is more than the shorter side of shared_expert_gate (1)")


def test_ranks_of_adalora_and_of_a_sweep_are_held_against_the_matrices(tmp_path: Path, llama: PreTrainedModel) -> None:
    held_out = SMALLEST.replace("]}", "], eval_fraction: 0.1}")
    for section, key in (
        ("adalora: {init_r: 40}", "adalora.init_r: 40"),
        ("rank_sweep: {ranks: [8, 40]}", "rank_sweep.ranks: 40"),
    ):
        recipe = loaded(tmp_path, f"{held_out}{section}\n").recipe
        (problem,) = adapter_misfits(recipe, modules_of(llama), lambda key, message: Problem(key, message))
        assert str(problem).startswith(f"{key} is more than the shorter side of k_proj (32), v_proj (32)")


def test_names_in_one_text_are_offered_as_a_list(tmp_path: Path) -> None:
    assert problems(tmp_path, f'{SMALLEST}lora: {{target_modules: "q_proj, v_proj"}}\n') == [
        'x.yaml:3: lora.target_modules: "q_proj, v_proj": text is a regular expression for whole names, and no name '
        "has commas or spaces; write a list, [q_proj, v_proj]"
    ]


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("config", "known"),
    [
        ({"model_type": "gpt2", "n_positions": 1024}, Positions(1024, True)),
        ({"model_type": "opt", "max_position_embeddings": 2048}, Positions(2048, True)),
        ({"model_type": "llama", "max_position_embeddings": 4096}, Positions(4096, False)),
        ({"model_type": "qwen2", "max_position_embeddings": 32768, "rope_scaling": YARN}, Positions(131072, False)),
        ({"model_type": "qwen3", "max_position_embeddings": 131072, "rope_parameters": YARN}, Positions(131072, False)),
        (
            {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "max_position_embeddings": 8192}},
            Positions(8192, False),
        ),
        ({"model_type": "bloom", "seq_length": 2048}, None),
        ({"model_type": "falcon", "max_position_embeddings": 2048, "alibi": True}, None),
        ({"model_type": "mamba"}, None),
    ],
)
def test_positions_are_those_the_base_knows(config: dict[str, Any], known: Positions | None) -> None:
    assert positions(config) == known


@pytest.mark.parametrize("kind", sorted(IN_A_TABLE - {"gpt-sw3"}))
def test_beyond_a_table_of_positions_a_model_fails(kind: str) -> None:
    config = AutoConfig.for_model(kind)
    for name, value in (
        SMALL | {"rotary_dim": 8, "attention_types": [[["global"], 2]], "num_layers": 2, "dff": 64}
    ).items():
        if hasattr(config, name):
            setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model(input_ids=torch.ones(1, 64, dtype=torch.long))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.ones(1, 67, dtype=torch.long))


def test_kinds_without_positions_and_with_a_table_are_no_others() -> None:
    assert not WITHOUT & IN_A_TABLE
