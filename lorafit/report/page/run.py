"""The parts of the page that speak of one run: how it ended, its curves, its health, its data, its merges."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from lorafit.data.audit import Audit
from lorafit.report.page.contents import Contents, Examples, Facts
from lorafit.report.page.html import Html, element, facts, is_number, joined, number, section, table
from lorafit.report.page.plot import Plot, Point, Series, figure
from lorafit.report.page.tokens import legend, token_row
from lorafit.training.seen import epochs_seen

CURVES = ("loss", "grad_norm", "learning_rate", "throughput")
MOST_EVENTS = 100
MOST_FILES = 20
MOST_MODULES = 5
MOST_MARKED = 40
"""Evaluations that are few enough to have a dot each."""

LOG_FROM = 20
"""A curve whose peak is this many times its median is drawn on a log scale."""


def summary(contents: Contents) -> Html:
    """Name, what was trained, how it ended, and the figures that matter most."""
    manifest, metrics = contents.manifest, contents.metrics
    outcome = manifest.get("outcome")
    is_well = outcome in ("finished", "stopped early") or contents.is_sweep
    ended = str(outcome or ("rank sweep" if contents.is_sweep else "not ended: it is still running, or was killed"))
    when = [" · ", element("time", str(manifest["started"])[:10])] if manifest.get("started") else []
    lead = element("p", element("span", ended, css="" if is_well else "warn"), *when, css="lead")
    return joined([element("h1", contents.path.resolve().name), lead, _tiles(manifest, metrics)])


def _tiles(manifest: Facts, metrics: Sequence[Facts]) -> Html:
    last = metrics[-1] if metrics else {}
    before, after = manifest.get("eval_loss_before"), manifest.get("eval_loss_after")
    tiles: list[tuple[str, Html, Html | str]] = []
    if after is not None:
        aside = joined([number(before, ".4f"), " before"]) if before is not None else ""
        tiles.append(("Held-out loss", number(after, ".4f"), aside))
    steps = manifest.get("steps", last.get("step"))
    planned = manifest.get("planned_steps")
    if steps is not None:
        share = f", {epochs_seen(manifest['epochs'])}" if is_number(manifest.get("epochs")) else ""
        tiles.append(("Steps", number(steps), joined(["of ", number(planned), share]) if planned is not None else ""))
    tokens, rate = manifest.get("tokens", last.get("tokens")), manifest.get("tokens_per_second")
    if tokens is not None:
        tiles.append(("Tokens", number(tokens), joined([number(rate, ",.0f"), " per second"]) if rate else ""))
    if manifest.get("seconds") is not None:
        tiles.append(("Time", duration(manifest["seconds"]), ""))
    if manifest.get("peak_memory_bytes"):
        tiles.append(("Peak memory", gibibytes(manifest["peak_memory_bytes"]), ""))
    return tile_row(tiles)


def tile_row(tiles: Iterable[tuple[str, Html, Html | str]]) -> Html:
    """Figures side by side, each beneath its name and above what it is compared with."""
    shown = [
        element(
            "div", element("dt", name), element("dd", value), *([element("dd", aside, css="aside")] if aside else [])
        )
        for name, value, aside in tiles
    ]
    return element("dl", *shown, css="tiles") if shown else Html("")


def duration(seconds: float) -> Html:
    """Seconds, minutes or hours, whichever reads best."""
    if not is_number(seconds) or seconds < 120:
        return number(seconds, ",.1f", unit="s")
    return (
        number(seconds, ",.1f", per=60, unit="min") if seconds < 7200 else number(seconds, ",.1f", per=3600, unit="h")
    )


def gibibytes(count: int) -> Html:
    """Bytes in GiB."""
    return number(count, ",.2f", per=2**30, unit="GiB")


def curve_plots(contents: Contents) -> list[Plot]:
    """Loss, gradient norm, learning rate and throughput over the steps, as far as they were logged."""
    steps = tuple(float(entry["step"]) for entry in contents.metrics)
    stopped = tuple(float(event["step"]) for event in contents.events if event.get("action"))[:MOST_EVENTS]
    kinds: tuple[tuple[str, str, str, tuple[tuple[str, str], ...]], ...] = (
        ("loss", "Loss", contents.task.loss_unit, (("train", "loss"), ("held-out", "eval_loss"))),
        ("grad_norm", "Gradient norm", "norm over all trained parameters", (("norm", "grad_norm"),)),
        ("learning_rate", "Learning rate", "step size of the optimizer", (("lr", "lr"),)),
        ("throughput", "Throughput", "tokens per second", (("tokens/s", "tokens_per_second"),)),
    )
    plots = []
    for name, title, y, keys in kinds:
        curves = [(label, key, _points(contents.metrics, key)) for label, key in keys]
        series = tuple(_series(label, key, points) for label, key, points in curves if points)
        if series:
            plots.append(
                Plot(
                    name=name,
                    title=title,
                    description=f"{title} over the steps of the run. {_described(series)}",
                    x="step",
                    y=y,
                    series=series,
                    height=270 if name == "loss" else 180,
                    is_log_y=name != "learning_rate" and _is_steep(series),
                    marks=stopped,
                    x_range=(min(steps), max(steps)),
                )
            )
    return plots


def _is_steep(series: Iterable[Series]) -> bool:
    values = sorted(value for one in series for _, value in one.points)
    return values[0] > 0 and values[-1] > LOG_FROM * values[len(values) // 2]


def _series(label: str, key: str, points: list[Point]) -> Series:
    return Series(label, points, kind="marked" if key == "eval_loss" and len(points) <= MOST_MARKED else "line")


def _points(metrics: Sequence[Facts], key: str) -> list[Point]:
    """Step and value; of a step that was done again after a resume the last."""
    values = {
        entry["step"]: float(entry[key]) for entry in metrics if is_number(entry.get(key)) and math.isfinite(entry[key])
    }
    return [(float(step), values[step]) for step in sorted(values)]


def _described(series: Iterable[Series]) -> str:
    return " ".join(
        f"{one.name}: from {one.points[0][1]:.4g} at step {one.points[0][0]:.0f} to {one.points[-1][1]:.4g} at step "
        f"{one.points[-1][0]:.0f}."
        for one in series
    )


def training(contents: Contents, plots: Sequence[Plot]) -> Html:
    """The curves, and what is missing in them."""
    broken = sorted(
        {
            entry["step"]
            for entry in contents.metrics
            for key in ("loss", "grad_norm", "eval_loss")
            if is_number(entry.get(key)) and not math.isfinite(entry[key])
        }
    )
    said: list[Html] = []
    if broken:
        first = [number(step) for step in broken[:5]]
        listed = joined(part for step in first for part in (step, ", "))
        said.append(element("p", "Not finite, and not drawn, at step ", listed, "…" * (len(broken) > 5), css="bad"))
    if contents.manifest and not contents.metrics:
        said.append(element("p", "No step was logged.", css="quiet"))
    return section("Training", *said, *map(figure, plots))


def health(contents: Contents) -> Html:
    """What happened besides the steps."""
    events = [event for event in contents.events if event.get("kind") != "memory"]
    if not contents.events and not contents.manifest:
        return Html("")
    if not events:
        return section("Health", element("p", "Nothing was reported.", css="quiet"))
    more = len(events) - MOST_EVENTS
    rest = element(
        "p", f"Only the last of the events are shown; all are in {contents.path.name}/events.jsonl.", css="quiet"
    )
    rows = [_event(event) for event in events[-MOST_EVENTS:]]
    return section("Health", table(("step", "what", "message"), rows), *([rest] if more > 0 else []))


def _event(event: Facts) -> tuple[Html, Html, Html]:
    kind = " · ".join(str(event[key]) for key in ("kind", "rule", "action") if event.get(key))
    css = {"stop": "bad", "warn": "warn"}.get(str(event.get("action")), "")
    figures = event.get("figures")
    values = figures.items() if isinstance(figures, dict) else ()
    listed = [part for name, value in values for part in (f"{name} ", number(value, ".6g"), "  ")]
    message = joined([str(event.get("message", "")), *([element("div", *listed, css="quiet")] if listed else [])])
    return number(event["step"]), element("span", kind, css=css), element("span", message, css="quote")


def memory(contents: Contents) -> Html:
    """The machine, its peak, and what was said of memory on the way."""
    manifest = contents.manifest
    pairs = [
        ("Machine", element("span", str(manifest["machine"]), css="quote") if "machine" in manifest else Html("")),
        ("Processes", number(manifest["world_size"]) if "world_size" in manifest else Html("")),
        ("Peak memory", gibibytes(manifest["peak_memory_bytes"]) if manifest.get("peak_memory_bytes") else Html("")),
        (
            "Computed in",
            element("span", "bfloat16" if manifest["bf16"] else "float32", css="quote")
            if "bf16" in manifest
            else Html(""),
        ),
    ]
    events = [_event(event) for event in contents.events if event.get("kind") == "memory"]
    return section("Machine and memory", facts(pairs), table(("step", "what", "message"), events[-MOST_EVENTS:]))


def data(contents: Contents, examples: Examples) -> Html:
    """How many rows and tokens, which of them are trained, what was found, and a few rows as the model sees them."""
    found = contents.manifest.get("data")
    if not found:
        return Html("")
    sides = {name: found[name] for name in ("train", "eval") if found.get(name)}
    is_split = any(side.get("sequences") != side.get("rows") for side in sides.values())
    keys = ["rows", *(["sequences"] if is_split else []), "tokens", "trained_tokens", "longest", "lost"]
    counts = [
        [element("span", name), *(number(side.get(key)) for key in keys), _share(side)] for name, side in sides.items()
    ]
    files = tuple(Path(str(file)).name for file in found.get("files", ()))
    warnings = Audit.from_dict(found, files=files).warnings if "train_findings" in found else ()
    names = ", ".join(files[:MOST_FILES]) + ", …" * (len(files) > MOST_FILES)
    return section(
        "Data",
        table(["", *(key.replace("_tokens", "") for key in keys), "share trained"], counts),
        *(element("p", warning, css="warn quote") for warning in warnings),
        facts([("Files", element("span", names, css="quote"))]),
        *_examples(examples),
    )


def _share(side: Facts) -> Html:
    return number(side["trained_tokens"] / side["tokens"] if side.get("tokens") else 0.0, ".1%")


def _examples(examples: Examples) -> Iterator[Html]:
    if examples.missing:
        yield element("p", f"No rows are shown: {examples.missing}", css="quiet quote")
    if not examples.rows:
        return
    yield element("h3", "As the model sees them")
    yield legend(examples.stop_tokens)
    for row in examples.rows:
        yield element("h3", f"{row['side']}, {Path(row['where']).name}", css="quote")
        yield token_row(row["tokens"])


def merges(contents: Contents) -> Html:
    """For each merged model how far it is from base + adapter."""
    return section("Merged model", *(part for name, report in contents.merges for part in _merge(name, report)))


def _merge(name: str, report: Facts) -> Iterator[Html]:
    def figure_of(key: str, form: str) -> Html:
        return number(report[key], form) if report.get(key) is not None else Html("")

    passed = "verified: it computes what base and adapter do" if report.get("passed") else "wrong"
    yield element(
        "h3", element("span", name, css="quote"), " ", element("span", str(report.get("dtype", "")), css="quiet quote")
    )
    yield facts(
        [
            ("Verification", element("span", passed, css="" if report.get("passed") else "bad")),
            ("Largest logit difference", figure_of("max_abs_logit_difference", ".3g")),
            ("Adapter's own effect", figure_of("adapter_effect", ".3g")),
            ("Same next token", figure_of("top1_agreement", ".2%")),
            ("Mean KL", figure_of("mean_kl", ".3g")),
            ("Update retained", figure_of("delta_retained", ".2%")),
            ("Positions compared", figure_of("positions", ",")),
            ("Merged into", joined([f"the {report['onto']} base" if report.get("onto") else ""])),
        ]
    )
    worst = [module for module in report.get("modules", ()) if is_number(module.get("retained"))][:MOST_MODULES]
    if worst:
        yield element("p", "Modules that keep least of their update", css="quiet")
        names = [element("span", str(module.get("name")), css="quote") for module in worst]
        kept = [number(module["retained"], ".2%") for module in worst]
        yield table(("module", "kept"), list(zip(names, kept, strict=True)))
    for wrong in report.get("wrong", ()):
        yield element("p", str(wrong), css="bad quote")


def adapter(contents: Contents) -> Html:
    """The adapted modules, those of one name and rank together."""
    modules = contents.manifest.get("modules") or ()
    groups: dict[tuple[str, int, float, float], list[int]] = {}
    for module in modules:
        key = (str(module["name"]).rpartition(".")[2], module["r"], module["alpha"], module["scale"])
        groups.setdefault(key, []).append(module["parameters"])
    rows = [
        (
            element("span", name, css="quote"),
            *(number(len(sizes)), number(rank), number(alpha, "g"), number(scale, ".3g"), number(sum(sizes))),
        )
        for (name, rank, alpha, scale), sizes in groups.items()
    ]
    head = ("modules", "count", "rank", "alpha", "scale", "parameters")
    return section("Adapter", table(head, rows[:MOST_EVENTS]))


def versions(contents: Contents) -> Html:
    """What the run was made with."""
    manifest = contents.manifest
    own = {name: manifest[name] for name in ("lorafit", "python") if name in manifest}
    everything = {**own, **manifest.get("versions", {})}
    base = manifest.get("base", {})
    pairs = [(str(name), element("span", str(version), css="quote")) for name, version in everything.items()]
    pairs += [("seed", number(manifest["seed"], "d"))] if "seed" in manifest else []
    prints = [("base", base.get("name")), ("base commit", base.get("commit")), ("base files", base.get("fingerprint"))]
    prints += [("data", manifest.get("data", {}).get("fingerprint"))]
    pairs += [(name, element("span", str(value), css="quote")) for name, value in prints if value]
    return section("Versions", facts(pairs))
