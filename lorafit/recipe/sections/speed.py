"""`speed`: what is computed another way than the libraries do, with the same result."""

from lorafit.recipe.sections.base import Section


class SpeedSection(Section):
    """Each lever is tried on the run's own model and stands back where it does not apply, which is said in one line;
    false turns it off."""

    varlen_attention: bool = True
    """Attention of packed rows document by document, without a dense mask. With `training.packing`, on models whose
    attention is sdpa; in 16 bits on a GPU. States and gradients are compared with transformers' before it is used."""

    fused_lora: bool = True
    """Plain LoRA (no dropout, bias or DoRA) as one autograd function, in half of peft's memory traffic. Evaluation and
    everything saved stay peft's."""

    answer_head: bool = True
    """The loss of the trained positions alone, its gradient taken tile by tile. On CPUs; on CUDA TRL's own head does
    this."""
