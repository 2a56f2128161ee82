"""`rank_sweep`: which ranks `lorafit rank-sweep` compares, and when one is as good as another."""

from typing import Annotated, Literal

from pydantic import Field, Strict

from lorafit.recipe.sections.base import Section

Rank = Annotated[int, Field(ge=1, le=4096)]


class RankSweepSection(Section):
    """The search for the smallest rank that is as good as the largest. `train` reads none of it."""

    ranks: Annotated[tuple[Rank, ...], Strict(False)] = (4, 8, 16, 32, 64)
    """The ranks to choose from, rising. The largest is trained in full, whatever the answer is."""

    eps: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """Nats per held-out token by which a rank may be worse and still count as as good. `auto`: 0.005 (half a per cent
    of perplexity), or two standard errors of the comparison where the held-out rows cannot tell as little apart."""

    alpha: Literal["2r", "fixed", "rslora"] = "2r"
    """lora_alpha of each rank. `2r`: twice the rank, the same scale for all. `fixed`: lora.lora_alpha for all (2 x
    lora.r where it is not written), a scale that falls with the rank. `rslora`: the same alpha with use_rslora, a scale
    that falls with its root (arXiv 2312.03732)."""

    seeds: int = Field(default=1, ge=1, le=100)
    """Runs of each rank, with training.seed and the numbers after it; their losses are averaged. Each multiplies the
    cost."""

    exhaustive: bool = False
    """Train every rank in full, and believe nothing else; what the search is measured against."""

    budget: Annotated[float, Field(gt=0, le=1)] | None = None
    """Most tokens to train, as a share of training every rank in full. Past it nothing is begun, and the smallest rank
    found until then is the answer. null: 0.6, or as much as two full runs."""

    tune_lr: bool = False
    """First look for the learning rate at the largest rank (Optuna's TPE, within a factor of 4 of
    training.learning_rate), and use it for all ranks. These runs come on top of the budget."""

    lr_trials: int = Field(default=6, ge=2, le=1000)
    """Learning rates that tune_lr tries, the recipe's own first. One that is behind the median of the others after a
    third or two thirds of its steps ends there."""
