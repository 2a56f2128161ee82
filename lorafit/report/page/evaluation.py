"""The part of the page that speaks of `lorafit eval`: what the adapter changed, with intervals, and samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lorafit.report.evaluation import figure_name
from lorafit.report.page.contents import Facts
from lorafit.report.page.html import Html, element, facts, is_number, joined, number, section, table
from lorafit.report.page.run import duration, gibibytes
from lorafit.tasks import Task

MODELS = ("base", "adapter", "merged")
MOST_SAMPLES = 20
MOST_LETTERS = 2_000
"""Of one text of a sample."""

MOST_LABELS = 20
DASH = Html("–")


def evaluation(found: Facts, task: Task) -> Html:
    """Verdict, figures of each model, differences with their intervals, what was lost, samples side by side."""
    if not found:
        return Html("")
    figures = {model: found[model] for model in MODELS if isinstance(found.get(model), dict)}
    general = found.get("general")
    return section(
        "Evaluation",
        element("p", element("strong", str(found.get("verdict", "")), css="quote")),
        element("p", *_measured_on(found), css="quiet"),
        _comparison(figures, found, task),
        *(_under("On general text", general, task) if isinstance(general, dict) else ()),
        *(part for name, of in (found.get("tasks") or {}).items() for part in _under(f"Task {name}", of, task)),
        *(part for model, about in figures.items() for part in _confusion(model, about.get("confusion"))),
        *_samples(found.get("samples") or ()),
        _cost(found),
    )


def _measured_on(found: Facts) -> Iterator[str]:
    if found.get("sequences") is not None:
        yield from (number(found["sequences"]), " sequences of ")
    yield element("span", str(found.get("rows", found.get("source", ""))), css="quote")
    if is_number(found.get("level")):
        yield from ("; intervals hold in ", number(found["level"], ".0%"), " of evaluations")


def _under(title: str, comparison: Facts, task: Task) -> Iterator[Html]:
    yield element("h3", title, css="quote")
    yield element("p", *_measured_on(comparison), css="quiet")
    yield _comparison(comparison.get("figures") or {}, comparison, task)


def _comparison(figures: dict[str, Facts], found: Facts, task: Task) -> Html:
    """A row for each figure: how adapter and merged model differ from the base, and every model's own."""
    models = [model for model in MODELS if model in figures]
    pairs = [("adapter less base", found.get("difference")), ("merged less base", found.get("merged_difference"))]
    told = [(name, differences) for name, differences in pairs if differences]
    names = [name for name in (figures[models[0]] if models else ()) if _is_figure(figures, name)]
    rows = [
        [
            element("span", figure_name(name, task), css="quote"),
            *(_difference(differences.get(name)) for _, differences in told),
            *(_value(figures[model].get(name)) for model in models),
        ]
        for name in names
    ]
    return table(["", *(name for name, _ in told), *models], rows)


def _is_figure(figures: dict[str, Facts], name: str) -> bool:
    return any(is_number(about.get(name)) for about in figures.values())


def _value(value: Any) -> Html:
    if not is_number(value):
        return joined(["not finite"])
    return number(value, _form(value))


def _form(value: float) -> str:
    """Counts whole, the others with four digits or more."""
    return "," if isinstance(value, int) else ",.4f" if abs(value) < 10 else ",.2f"


def _difference(found: Any) -> Html:
    """The difference with its verdict; beneath it from where to where it may be."""
    if not isinstance(found, dict) or not is_number(found.get("mean")):
        return DASH
    verdict = str(found.get("verdict", ""))
    css = {"worse": "warn", "better": "good"}.get(verdict, "quiet")
    shown = element(
        "div",
        number(found["mean"], f"+{_form(found['mean'])}"),
        " ",
        element("span", verdict, css=css),
        css="whole-line",
    )
    if not (is_number(found.get("low")) and is_number(found.get("high"))):
        return shown
    low, high = (number(found[end], f"+{_form(found[end])}") for end in ("low", "high"))
    interval = [low, " to ", high]
    return joined([shown, element("div", *interval, css="quiet whole-line")])


def _confusion(model: str, confusion: Any) -> Iterator[Html]:
    if not isinstance(confusion, dict) or not confusion.get("labels"):
        return
    labels = [str(label) for label in confusion["labels"]][:MOST_LABELS]
    f1 = confusion.get("f1", {})
    rows = [
        [
            element("span", label, css="quote"),
            *map(number, [*counts[: len(labels)], counts[-1]]),
            number(f1.get(label, ""), ".3f"),
        ]
        for label, counts in zip(labels, confusion["counts"], strict=False)
    ]
    yield element("h3", f"What {model} answered, by the label of the row")
    yield table(["", *labels, "other", "F1"], rows)


def _samples(samples: Sequence[Facts]) -> Iterator[Html]:
    if samples:
        yield element("h3", "Answers side by side")
    for sample in samples[:MOST_SAMPLES]:
        yield element("p", str(sample.get("where", "")), css="quiet quote")
        parts = [(name, str(sample[name])) for name in ("prompt", "reference", *MODELS) if name in sample]
        yield element("div", *(_part(name, text) for name, text in parts), css="pair")


def _part(name: str, text: str) -> Html:
    rest = " …" if len(text) > MOST_LETTERS else ""
    shown = element("div", text[:MOST_LETTERS] + rest, css="said") if text else element("p", "(empty)", css="quiet")
    return element("div", element("h4", name), shown, css="whole" if name == "prompt" else "")


def _cost(found: Facts) -> Html:
    speed = found.get("sequences_per_second")
    rates = [(f"{what.capitalize()} per second", number(rate, ",.2f")) for what, rate in (speed or {}).items()]
    memory, seconds = found.get("peak_memory_bytes"), found.get("seconds")
    about = facts(
        [
            *rates,
            ("Peak memory", Html("") if memory is None else gibibytes(memory)),
            ("Time", Html("") if seconds is None else duration(seconds)),
        ]
    )
    return joined([element("h3", "Cost of the evaluation"), about]) if about else Html("")
