"""The part of the page that speaks of a rank sweep: which rank, how each was decided, what it cost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lorafit.report.page.contents import Contents, Facts
from lorafit.report.page.html import Html, element, is_number, joined, number, section, table
from lorafit.report.page.plot import Interval, Plot, Series, figure
from lorafit.report.page.run import duration, tile_row

MOST_SPECTRA = 40
"""Modules whose singular values are drawn, evenly picked: more are a grey patch."""

MOST_PATTERN = 200


def sweep_plots(contents: Contents) -> list[Plot]:
    """Loss and difference against rank, the tokens that each rank cost, the singular values of the update."""
    trials = [trial for trial in contents.sweep.get("trials", ()) if is_number(trial.get("rank"))]
    ranks = tuple(float(trial["rank"]) for trial in trials)
    unit = contents.task.loss_unit
    plots = [
        *_losses(contents.sweep, trials, ranks, unit=unit),
        *_differences(contents.sweep, trials, ranks, unit=unit),
    ]
    spent = [(float(trial["rank"]), float(trial["tokens"])) for trial in trials if is_number(trial.get("tokens"))]
    if spent:
        described = "Tokens trained at each rank: " + ", ".join(f"{rank:.0f}: {tokens:,.0f}" for rank, tokens in spent)
        plots.append(
            _against_rank(
                "tokens", "Tokens trained at each rank", described, "tokens", (Series("", spent, "bars"),), ranks
            )
        )
    return [*plots, *_spectrum(contents.spectrum)]


def _against_rank(
    name: str,
    title: str,
    description: str,
    y: str,
    series: tuple[Series, ...],
    ranks: tuple[float, ...],
    *,
    band: tuple[float, float] | None = None,
    height: int = 200,
) -> Plot:
    return Plot(
        name=name,
        title=title,
        description=description,
        x="rank",
        y=y,
        series=series,
        height=height,
        is_log_x=True,
        x_ticks=ranks,
        x_range=ranks,
        band=band,
        band_name="as good as the reference" if band else "",
    )


def _losses(sweep: Facts, trials: Sequence[Facts], ranks: tuple[float, ...], *, unit: str) -> Iterator[Plot]:
    """Of what was trained to the end: losses after a share of the steps do not compare with them."""
    whole = [trial for trial in trials if trial.get("share") == 1 and is_number(trial.get("loss"))]
    kinds = (("trained", "direct"), ("cut", "truncated"))
    series = []
    for label, decided in kinds:
        of_kind = [trial for trial in whole if trial.get("decided_by") == decided]
        if of_kind:
            series.append(Series(label, intervals=tuple(_interval(trial, trial["loss"]) for trial in of_kind)))
    if not series:
        return
    reference = next((trial["loss"] for trial in whole if trial["rank"] == sweep.get("reference_rank")), None)
    band = (reference, reference + sweep["eps"]) if reference is not None and is_number(sweep.get("eps")) else None
    told = ", ".join(f"{trial['rank']}: {trial['loss']:.4f}" for trial in whole)
    described = f"Held-out loss in {unit} by rank, with intervals. {told}"
    yield _against_rank("rank_loss", "Held-out loss", described, unit, tuple(series), ranks, band=band, height=270)


def _interval(trial: Facts, value: float) -> Interval:
    low, high = trial.get("low"), trial.get("high")
    return Interval(
        float(trial["rank"]), float(value), float(value if low is None else low), float(value if high is None else high)
    )


def _differences(sweep: Facts, trials: Sequence[Facts], ranks: tuple[float, ...], *, unit: str) -> Iterator[Plot]:
    """Of all that were compared, also those that were given up early."""
    compared = [trial for trial in trials if isinstance(trial.get("difference"), dict)]
    series = []
    for label, is_enough in (("as good", True), ("worse", False)):
        of_kind = [trial for trial in compared if bool(trial.get("is_sufficient")) == is_enough]
        dots = tuple(
            _interval({"rank": trial["rank"], **trial["difference"]}, trial["difference"]["mean"]) for trial in of_kind
        )
        if dots:
            series.append(Series(label, intervals=dots))
    if series and is_number(sweep.get("eps")):
        told = ", ".join(f"{trial['rank']}: {trial['difference']['mean']:+.4f}" for trial in compared)
        described = f"{unit.capitalize()} by which a rank is worse than the reference, with intervals. {told}"
        title = "Worse than the reference by"
        yield _against_rank(
            "rank_difference",
            title,
            described,
            unit,
            tuple(series),
            ranks,
            band=(0.0, sweep["eps"]),
            height=230,
        )


def _spectrum(spectrum: Any) -> Iterator[Plot]:
    modules = spectrum.get("modules", ()) if isinstance(spectrum, dict) else ()
    every = max(1, math.ceil(len(modules) / MOST_SPECTRA))
    curves = [
        [(float(index), value) for index, value in enumerate(module.get("singular_values", ()), 1) if value > 0]
        for module in modules[::every]
    ]
    series = tuple(Series("", points, "faint") for points in curves if len(points) > 1)
    if series:
        chosen = spectrum.get("chosen_rank")
        yield Plot(
            name="spectrum",
            title="Singular values of the update, one line a module",
            description="How much of the update each further rank holds, falling, for each module of the largest rank.",
            x="index of the singular value; dotted: the chosen rank",
            y="singular value",
            series=series,
            height=240,
            is_log_y=True,
            marks=(float(chosen),) if is_number(chosen) else (),
        )


def sweep(contents: Contents, plots: Sequence[Plot]) -> Html:
    """The chosen rank, and how each was decided."""
    found = contents.sweep
    if not found:
        return Html("")
    tiles: list[tuple[str, Html, Html | str]] = [("Smallest rank as good", number(found.get("chosen_rank")), "")]
    if found.get("reference_rank") is not None:
        tiles[0] = (*tiles[0][:2], joined(["as rank ", number(found["reference_rank"])]))
    if is_number(found.get("eps")):
        tiles.append(("May be worse by", number(found["eps"], ".4g"), contents.task.loss_unit))
    if is_number(found.get("tokens_trained")) and is_number(found.get("tokens_exhaustive")):
        aside = joined(["of ", number(found["tokens_exhaustive"]), " for all"])
        tiles.append(("Tokens trained", number(found["tokens_trained"]), aside))
    if is_number(found.get("seconds")):
        tiles.append(("Time", duration(found["seconds"]), ""))
    broken = "A smaller rank beats the largest: more rank overfits here, so all were evaluated."
    return section(
        "Rank sweep",
        tile_row(tiles),
        *([element("p", broken, css="warn")] if found.get("is_monotone") is False else []),
        *(figure(plot) for plot in plots if plot.name != "spectrum"),
        *_trials(found.get("trials", ())),
        *(figure(plot) for plot in plots if plot.name == "spectrum"),
        *_pattern(contents.spectrum),
        *_rates(found.get("learning_rates", ())),
        *(
            [element("p", "Ready to train: ", element("code", Path(str(found["recipe"])).name))]
            if found.get("recipe")
            else []
        ),
    )


def _trials(trials: Sequence[Facts]) -> Iterator[Html]:
    """How each rank was decided, and what it costs: two tables that fit on a page."""
    ranks = [number(trial.get("rank")) for trial in trials]
    decided = [element("span", str(trial.get("decided_by", "")), css="quote") for trial in trials]
    losses = [_or_dash(trial.get("loss"), ".4f") for trial in trials]
    differences = [_difference(trial.get("difference")) for trial in trials]
    yield table(
        ("rank", "decided by", "loss", "worse than the reference by"),
        list(zip(ranks, decided, losses, differences, strict=True)),
    )
    parameters = [_or_dash(trial.get("parameters"), ",") for trial in trials]
    sizes = [_or_dash(trial.get("adapter_bytes"), ",.1f", per=1e6, unit="MB") for trial in trials]
    memory = [_or_dash(trial.get("peak_memory_bytes"), ",.2f", per=2**30, unit="GiB") for trial in trials]
    times = [duration(trial["seconds"]) if is_number(trial.get("seconds")) else Html("–") for trial in trials]
    yield element("h3", "What each costs")
    yield table(
        ("rank", "parameters", "adapter", "peak memory", "time"),
        list(zip(ranks, parameters, sizes, memory, times, strict=True)),
    )


def _or_dash(value: Any, form: str, *, per: float = 1, unit: str = "") -> Html:
    return number(value, form, per=per, unit=unit) if is_number(value) else Html("–")


def _difference(found: Any) -> Html:
    if not isinstance(found, dict):
        return Html("–")
    interval = [number(found.get("low"), "+.4f"), " to ", number(found.get("high"), "+.4f")]
    mean = element("div", number(found.get("mean"), "+.4f"))
    return joined([mean, element("div", *interval, css="quiet whole-line")])


def _pattern(spectrum: Any) -> Iterator[Html]:
    pattern = spectrum.get("rank_pattern") if isinstance(spectrum, dict) else None
    if isinstance(pattern, dict) and pattern:
        lines = [f"  {module}: {rank}" for module, rank in pattern.items()]
        rest = ["  …"] if len(lines) > MOST_PATTERN else []
        yield element("h3", "Suggested rank of modules that want another")
        yield element("pre", "\n".join(["rank_pattern:", *lines[:MOST_PATTERN], *rest]), css="quote")


def _rates(rates: Sequence[Facts]) -> Iterator[Html]:
    if rates:
        rows = [(number(rate.get("learning_rate"), "g"), _or_dash(rate.get("loss"), ".4f")) for rate in rates]
        yield element("h3", "Learning rates tried at the largest rank")
        yield table(("learning rate", "loss"), rows)
