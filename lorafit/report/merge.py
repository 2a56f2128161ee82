"""What a merge or a combination came to, as text."""

from __future__ import annotations

from typing import Any


def merge_table(result: Any) -> str:
    """What a merge came to, one fact a line. `result` is a `MergeResult`."""
    rows = [("merged model", result.out)]
    if result.max_abs_logit_difference is not None:
        rows += [
            ("largest logit difference", f"{result.max_abs_logit_difference:.3g} to base + adapter"),
            ("same next token", f"{result.top1_agreement:.2%} of positions"),
            ("update retained", f"{result.delta_retained:.2%} after rounding"),
        ]
    rows += [
        (f"onto the {base.onto} base", f"mean KL {base.mean_kl:.3g} from the quantised model") for base in result.bases
    ]
    if result.bases:
        rows.append(("merged into", f"the {result.onto} base"))
    rows += [("merged", "streamed" if result.streamed else "by peft, in memory"), ("seconds", f"{result.seconds:.1f}")]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def combine_table(result: Any) -> str:
    """What a combination came to, one fact a line, and the losses as a table. `result` is a `CombineResult`."""
    rows = [
        ("combined adapter", result.out),
        ("method", f"{result.method}, rank {result.rank}"),
        ("inputs", ", ".join(f"{name} x {weight:g}" for name, weight in result.inputs.items())),
        ("off the exact sum", f"{result.off_the_sum:.2%} in the module that is farthest off"),
    ]
    if result.cosine is not None:
        words = f"cosine {result.cosine:+.3f}, opposite signs in {result.sign_conflict:.1%} of the entries"
        rows.insert(3, ("overlap", f"{words} (0 and 50.0% if unrelated)"))
        worst = max((one for one in result.modules if one.cosine is not None), key=lambda one: one.sign_conflict)
        rows.insert(4, ("most in conflict", f"{worst.module}: {worst.sign_conflict:.1%}, cosine {worst.cosine:+.3f}"))
    for loss in result.losses:
        told = ", ".join(f"{name} {value:.4f}" for name, value in loss.losses.items())
        rows.append((f"held-out loss, {loss.rows_of}", f"{told} ({loss.rows} rows)"))
    rows.append(("seconds", f"{result.seconds:.1f}"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
