"""How much of its rows a run has seen, in words."""


def epochs_seen(epochs: float) -> str:
    """`7 % of an epoch`, `1 epoch`, `2.5 epochs`."""
    if epochs < 0.995:
        return f"{100 * epochs:.{0 if epochs >= 0.01 else 2}f} % of an epoch"
    return f"{epochs:.3g} epoch{'s' * (epochs >= 1.005)}"


def rows_seen(epochs: float | None, *, rows: int) -> str:
    """`about 518 of 7,398 rows (7 % of an epoch)`, `7,398 rows (1 epoch)`; runs of older versions do not say."""
    if epochs is None:
        return f"some of {rows:,} rows"
    share = epochs_seen(epochs)
    return f"about {epochs * rows:,.0f} of {rows:,} rows ({share})" if epochs < 0.995 else f"{rows:,} rows ({share})"
