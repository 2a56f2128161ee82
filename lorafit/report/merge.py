"""What a merge shows on a terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]


def merge_table(result: Any) -> str:
    """What a merge came to, one fact a line. `result` is a `MergeResult`."""
    rows = [("merged model", result.out)]
    if result.max_abs_logit_difference is not None:
        rows += [
            ("largest logit difference", f"{result.max_abs_logit_difference:.3g} to base + adapter"),
            ("same next token", f"{result.top1_agreement:.2%} of positions"),
            ("update retained", f"{result.delta_retained:.2%} after rounding"),
        ]
    rows += [("merged", "streamed" if result.streamed else "by peft, in memory"), ("seconds", f"{result.seconds:.1f}")]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def progress_in_bytes(*, is_shown: bool) -> Callable[[int], Callable[[int], Any]]:
    """Given the bytes to come, a bar that takes the bytes done since it was last told."""
    return lambda total: tqdm(total=total, unit="B", unit_scale=True, disable=not is_shown).update
