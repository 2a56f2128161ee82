"""`lora`: becomes `peft.LoraConfig`; `adalora`: becomes `peft.AdaLoraConfig` together with it."""

from typing import Annotated, Any, Literal

from pydantic import Field

from lorafit.recipe.sections.base import Extra, Frozen, Index, Indices, Names, Section

Rank = Annotated[int, Field(ge=1)]


class LoraSection(Section):
    """The adapter: which modules get a low-rank update B·A, of what rank, scaled and initialised how."""

    r: int = Field(default=16, ge=1)
    """Rank of the update. Adapter size and optimizer memory grow linearly with it, time hardly. Default 16, the value
    most published recipes use; `lorafit rank-sweep` finds the smallest that is as good."""

    lora_alpha: int | None = Field(default=None, ge=1)
    """Numerator of the scale: alpha / r, or alpha / sqrt(r) with use_rslora. null means 2 x r."""

    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of adapter inputs zeroed in training. Default 0.0 (PEFT's): above 0 it keeps faster paths from
    being used."""

    target_modules: str | Names = "all-linear"
    """Module names (suffixes), a regular expression, or `all-linear`: every linear layer but the output head. Every
    listed name must match something. Default: all linear layers (the QLoRA paper's finding)."""

    exclude_modules: str | Names | None = None
    """Modules left out of `target_modules`: names (suffixes) or a regular expression."""

    target_parameters: Names | None = None
    """Parameters (not modules) to adapt, e.g. the fused experts of a mixture: `mlp.experts.gate_up_proj`."""

    use_rslora: bool = False
    """Scale by alpha / sqrt(r) instead of alpha / r (rsLoRA, arXiv 2312.03732); steadier at high ranks."""

    use_dora: bool = False
    """Train direction and magnitude apart (DoRA, arXiv 2402.09353); costs memory and about 1.5 to 2 times the time."""

    init_lora_weights: bool | Literal["gaussian", "orthogonal", "olora", "pissa", "eva", "corda", "loftq"] = True
    """How A and B start: `true` (A random, B zero), `gaussian`, `orthogonal`, `olora` (arXiv 2406.01775), `pissa`
    (arXiv 2404.02948), `eva` (arXiv 2410.07170), `corda` (arXiv 2406.05223), `loftq` (arXiv 2310.08659); `false` starts
    both at random and changes the model from the first step."""

    eva_config: Annotated[dict[str, Any], Frozen] | None = None
    """Settings of EVA (`rho`, `tau`, ...); only with `init_lora_weights: eva`."""

    corda_config: Annotated[dict[str, Any], Frozen] | None = None
    """Settings of CorDA (`corda_method`, ...); only with `init_lora_weights: corda`."""

    rank_pattern: Annotated[dict[str, Rank], Frozen] = {}
    """Another rank for the modules whose name matches the key (name or regular expression)."""

    alpha_pattern: Annotated[dict[str, Rank], Frozen] = {}
    """Another alpha for the modules whose name matches the key."""

    layers_to_transform: Index | Indices | None = None
    """Only these layer indices (from 0) get an adapter. null means all."""

    layers_pattern: str | Names | None = None
    """Name of the list of layers (`layers`, `h`) when `layers_to_transform` is set and PEFT does not know the model."""

    modules_to_save: Names | None = None
    """Modules trained and saved whole, e.g. `lm_head`: each costs its full size in weights, gradients and optimizer."""

    trainable_token_indices: Indices | Annotated[dict[str, Indices], Frozen] | None = None
    """Token ids whose embeddings are trained (new special tokens), without training the whole embedding."""

    bias: Literal["none", "all", "lora_only"] = "none"
    """Which bias vectors of the base are trained too. Default none; otherwise the base is changed even when the
    adapter is switched off."""

    lora_bias: bool = False
    """Give B a bias of its own."""

    extra: Extra = {}
    """Further arguments of `peft.LoraConfig`."""


class AdaLoraSection(Section):
    """AdaLoRA instead of LoRA (arXiv 2303.10512): starts at `init_r` and prunes to `target_r` on average."""

    target_r: int = Field(default=8, ge=1)
    """Average rank at the end. Default 8, PEFT's."""

    init_r: int = Field(default=12, ge=1)
    """Rank every module starts with. Default 12, PEFT's."""

    tinit: int = Field(default=0, ge=0)
    """Optimizer steps before the ranks begin to shrink."""

    tfinal: int = Field(default=0, ge=0)
    """Optimizer steps at the end during which the ranks stay as they are."""

    delta_t: int = Field(default=1, ge=1)
    """Steps between two re-allocations (`deltaT` in PEFT)."""

    orth_reg_weight: float = Field(default=0.5, ge=0)
    """Weight of the term that keeps the factors orthogonal. Default 0.5, PEFT's."""
