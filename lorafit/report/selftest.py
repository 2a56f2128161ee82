"""What a self-test compared, as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorafit.training.selftest import SelfTest

_MEANING = {
    "accumulation": "8 micro-batches of 1 row and 2 of 4 give one loss and gradient",
    "packing": "a packed document is computed as it is alone",
    "padding": "a padded row is computed as it is alone",
    "adapter off": "with its adapter switched off the model is its base",
}


def selftest_table(tested: SelfTest) -> str:
    """One line a check: the difference measured, the largest allowed, and what it means."""
    lines = [f"{'check':<14}{'difference':>12}{'allowed':>12}   what holds"]
    lines += [
        f"{check.name:<14}{check.difference:>12.2g}{check.tolerance:>12.2g}   {_MEANING[check.name]}"
        for check in tested.checks
    ]
    kind, attention = tested.combination["model"], tested.combination["attention"]
    return "\n".join([*lines, f"{kind} with {attention} attention: passed in {tested.seconds:.1f} s"])
