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

    last_layer: bool = True
    """The last layer for the trained positions alone, but for its keys and values: of others nothing reaches the loss.
    On CPUs, in training, on models whose last layer has `mlp`, `q_proj` or `o_proj`; states and gradients are compared
    with those of the whole layer before it is used."""

    fixed_length: bool = True
    """Packed rows of one length under `training.torch_compile`, so that the model is compiled once: each micro-batch is
    filled up to `per_device_train_batch_size` x `max_length` with padding that is not trained, a held-out one to the
    longest there can be. Costs the share of a row that packing leaves empty."""
