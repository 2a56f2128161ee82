"""`health`: what is done when training goes wrong."""

from typing import Literal

from lorafit.recipe.sections.base import Section

Action = Literal["stop", "warn", "ignore"]


class HealthSection(Section):
    """`stop` ends the run with exit 6, `warn` says it in one line and goes on, `ignore` does not look. Either way it
    is in events.jsonl of the run. Only what no run comes back from stops by default."""

    on_nan: Action = "stop"
    """A loss, held-out loss or gradient norm that is not finite, named with its rows. `stop` ends before any weight is
    touched; with the others the weights are lost at that step, and no adapter that is not finite is ever written."""

    on_divergence: Action = "stop"
    """The loss stays far above the lowest level it had for three logged steps, or begins above twice what guessing
    costs (ln of the vocabulary)."""

    on_spike: Action = "warn"
    """The loss jumps for one or two logged steps and comes back. `warn`: most runs recover from a bad batch."""

    on_plateau: Action = "warn"
    """After 30 logged steps and a fifth of the run the loss is where it began. `warn`: the base may know the data."""

    on_vanishing_gradient: Action = "warn"
    """The gradient norm is zero, or ten thousand times smaller than it was while the loss is still high, for three
    logged steps. `warn`: a run that ends without having moved is refused anyway."""

    on_exploding_gradient: Action = "warn"
    """The gradient norm before clipping jumps to twenty times what it was, or stays above 1000 times `max_grad_norm`.
    `warn`: clipping bounds each step."""

    on_zero_b: Action = "stop"
    """Ten steps in, B matrices of the adapter (E of AdaLoRA) are as they were, or so slow that the run will not change
    the model. `stop`: the finished run would be refused."""

    on_overfitting: Action = "warn"
    """The held-out loss rises while the training loss falls. `warn`: stopping there is what `early_stopping` is for."""

    on_oom: Literal["stop", "halve_batch"] = "stop"
    """Memory runs out in a training step. `stop` ends with exit 4 and what would fit; `halve_batch` does the step again
    in halves of the micro-batch with twice the accumulation (whole documents with `packing`), and again until it fits:
    the same global batch, order of rows and result."""
