"""Rules of `data`."""

import math
import re
from collections.abc import Iterator
from pathlib import Path

from lorafit.recipe.paths import NAMED_TEMPLATE, TEMPLATES
from lorafit.recipe.recipe import Recipe
from lorafit.recipe.rules.broken import Broken, Rule
from lorafit.recipe.sections import Source
from lorafit.recipe.suggest import nearest

FORMAT_COLUMNS = {
    "messages": ("messages", "system", "tools", "functions"),
    "prompt_completion": ("prompt", "completion", "system", "history", "tools", "functions"),
    "alpaca": ("instruction", "output", "input", "system", "history", "tools", "functions"),
    "sharegpt": ("conversations", "system", "tools", "functions"),
    "text": ("text",),
}
"""What each format reads from a row; a test compares it with the readers."""
GIVEN_TO_TEMPLATES = ("messages", "tools", "documents", "add_generation_prompt")
FUNCTIONS_OF_TEMPLATES = ("raise_exception", "strftime_now", "namespace", "dict", "range", "cycler", "joiner", "lipsum")
BOOLEANS = {"true": "true", "yes": "true", "on": "true", "false": "false", "no": "false", "off": "false"}
"""What people write for a boolean: YAML 1.2 reads `no` and `off` as text."""


def source_is_a_path_or_a_hub_data_set(recipe: Recipe) -> Iterator[Broken]:
    """Exactly one says where the rows are; three keys only mean something on the Hub."""
    for key, source in _sources(recipe):
        if source.path is not None and source.hub is not None:
            yield Broken(f"{key}.hub", "cannot stand beside path; keep one of the two", (f"{key}.path",))
        elif source.path is None and source.hub is None:
            message = "says nowhere where its rows are; write path: (a file) or hub: (a data set id)"
            yield Broken(key, message, (f"{key}.path", f"{key}.hub"))
        elif source.hub is None:
            for name in ("name", "split", "revision"):
                if name in source.model_fields_set:
                    message = "is only for a data set of the Hub; leave it out, or write hub: instead of path:"
                    yield Broken(f"{key}.{name}", message, (f"{key}.hub",))


def hub_names_a_data_set(recipe: Recipe) -> Iterator[Broken]:
    """Files are named by `path`; an address in a browser is not the id."""
    for key, source in _sources(recipe):
        hub = source.hub or ""
        page = re.match(r"https?://huggingface\.co/datasets/([^/]+/[^/?#]+)/?$", hub)
        if page:
            yield Broken(f"{key}.hub", f"is the address of a page; write hub: {page[1]}")
        elif "://" in hub or hub.lower().removesuffix(".gz").endswith((".jsonl", ".json", ".csv", ".parquet", ".txt")):
            yield Broken(f"{key}.hub", f"{hub} is a file, not a data set id; write path: {hub}", (f"{key}.path",))


def columns_belong_to_the_format(recipe: Recipe) -> Iterator[Broken]:
    """`columns` maps what the format reads to the names in the file, not the other way round."""
    for key, source in _sources(recipe):
        wanted = (
            [set(FORMAT_COLUMNS[source.format])] if source.format else [set(own) for own in FORMAT_COLUMNS.values()]
        )
        known = set().union(*wanted)
        others = (f"{key}.format",)
        unknown = [name for name in source.columns if name not in known]
        for name in unknown:
            guess = nearest(name, known)
            turned = source.columns[name] in known
            mend = (
                f"turn it round: {{{source.columns[name]}: {name}}}"
                if turned
                else f"it reads {', '.join(sorted(known))}"
            )
            mend = f"did you mean {guess}?" if guess and not turned else mend
            of = f"a column of {source.format}" if source.format else "a column of any format"
            yield Broken(f"{key}.columns.{name}", f"not {of}; {mend}", others)
        if not unknown and not any(set(source.columns) <= own for own in wanted):
            message = f"no format has {' and '.join(source.columns)} together; write format: and its own columns"
            yield Broken(f"{key}.columns", message, others)
        twice = [name for name in source.columns if list(source.columns.values()).count(source.columns[name]) > 1]
        if twice:
            message = f"{' and '.join(twice)} are read from one column, {source.columns[twice[0]]}; name one for each"
            yield Broken(f"{key}.columns", message)


def held_out_rows_come_from_one_place(recipe: Recipe) -> Iterator[Broken]:
    """`eval` and `eval_fraction` are two answers to one question."""
    if recipe.data.eval and recipe.data.eval_fraction is not None:
        yield Broken("data.eval_fraction", "cannot stand beside data.eval; keep one of the two", ("data.eval",))


def held_out_rows_are_not_trained_on(recipe: Recipe) -> Iterator[Broken]:
    """The held-out loss of rows that were trained on says nothing."""
    trained = {_place(source) for source in recipe.data.train}
    for number, source in enumerate(recipe.data.eval):
        if _place(source) in trained and (source.path or source.hub):
            at = f"data.eval.{number}.{'path' if source.path else 'hub'}"
            message = "is also in data.train; name other rows, or hold some out with data.eval_fraction"
            yield Broken(at, message, ("data.train",))


def template_is_known_or_a_file(recipe: Recipe) -> Iterator[Broken]:
    """What is not a template's name was taken for the path of a Jinja file."""
    template = recipe.data.template
    if template in TEMPLATES or template.startswith(NAMED_TEMPLATE) or Path(template).is_file():
        return
    name = Path(template).name
    guess = nearest(name, TEMPLATES)
    mend = f"did you mean {guess}?" if guess else f"there is no such file; write one of {', '.join(TEMPLATES)}"
    yield Broken("data.template", f'"{name}" is not a template or a Jinja file; {mend}')


def template_takes_arguments(recipe: Recipe) -> Iterator[Broken]:
    """Only Jinja templates have variables."""
    if recipe.data.template_kwargs and recipe.data.template in ("alpaca", "plain"):
        message = f"is ignored with template: {recipe.data.template}; leave it out"
        yield Broken("data.template_kwargs", message, ("data.template",))


def template_variables_do_what_they_say(recipe: Recipe) -> Iterator[Broken]:
    """A text is true to a template whatever it says; what the renderer sets, or templates call, is no setting."""
    for name, value in recipe.data.template_kwargs.items():
        at = f"data.template_kwargs.{name}"
        if name in GIVEN_TO_TEMPLATES:
            yield Broken(at, "comes from the rows and the renderer; leave it out")
        elif name in FUNCTIONS_OF_TEMPLATES:
            yield Broken(at, "is a function that templates call; leave it out")
        elif isinstance(value, str) and (meant := BOOLEANS.get(value.strip().lower())):
            yield Broken(at, f'is the text "{value}", which a template takes as true; write {meant}, without quotes')
        elif isinstance(value, float) and not math.isfinite(value):
            yield Broken(at, f"is {value}, which no template can hold; write a number")


def _sources(recipe: Recipe) -> Iterator[tuple[str, Source]]:
    sides = {"data.train": recipe.data.train, "data.eval": recipe.data.eval, "eval.general": recipe.eval.general}
    for side, sources in sides.items():
        for number, source in enumerate(sources):
            yield f"{side}.{number}", source


def _place(source: Source) -> tuple[str | None, ...]:
    """What names the same rows; a directory or glob and a file in it are told apart by the audit, row by row."""
    return (source.path, None, None, None) if source.path else (source.hub, source.name, source.split, source.revision)


RULES: tuple[Rule, ...] = (
    source_is_a_path_or_a_hub_data_set,
    hub_names_a_data_set,
    columns_belong_to_the_format,
    held_out_rows_come_from_one_place,
    held_out_rows_are_not_trained_on,
    template_is_known_or_a_file,
    template_takes_arguments,
    template_variables_do_what_they_say,
)
