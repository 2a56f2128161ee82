"""The base of a recipe, as far as its files lie on this machine: looked at in milliseconds. No torch, no network."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.builders.adapter_fit import adapter_misfits
from lorafit.builders.architectures import model_type_problems, task_problems
from lorafit.builders.experts import advise_on_experts
from lorafit.builders.model_files import (
    TOKENIZER_FILES,
    config_problems,
    directory_at_hand,
    is_on_hub,
    quantization_problems,
    read_config,
    read_json,
    stop_problems,
    stop_token_ids,
    weight_problems,
)
from lorafit.builders.modules import Modules, modules_on_disk
from lorafit.builders.positions import advise_on_positions, positions, positions_exceeded
from lorafit.builders.template_files import DEFAULT, chat_templates, chosen
from lorafit.builders.weight_files import shard_names, tensor_table
from lorafit.errors import AdapterError, DataError, LorafitError, ModelError, Problem, RecipeError
from lorafit.recipe import Advice, LoadedRecipe
from lorafit.recipe.paths import NAMED_TEMPLATE, TEMPLATES
from lorafit.recipe.sections import ModelSection
from lorafit.tasks import TASKS

TOKENIZER, SETTINGS, SPECIAL = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
NAMES_ITS_OWN_END = ("PreTrainedTokenizerFast", "TokenizersBackend", "PreTrainedTokenizer", None)
"""Tokenizer classes that end texts with what the files name; others know a token of their own."""


@dataclass(frozen=True)
class BaseAtHand:
    """What could be told of a base."""

    directory: Path | None
    """None where it is not on this machine."""
    problems: tuple[Problem, ...]
    error: type[LorafitError]
    """Of the first of the problems."""
    advice: tuple[Advice, ...]
    not_checked: tuple[str, ...]
    """What could not be looked at, and why."""
    has_template: bool
    """Whether chats can be laid out."""

    @property
    def tokenizer(self) -> Path | None:
        """Where its tokenizer lies, in the file that is read without transformers."""
        file = self.directory / TOKENIZER if self.directory else None
        return file if file and file.is_file() else None


def look_at_base(loaded: LoadedRecipe) -> BaseAtHand:
    """The files of the base, and the recipe held against them, as `train` does before it reads a row."""
    look = _Look(loaded)
    directory = None
    try:
        directory = directory_at_hand(loaded.recipe.model)
        if directory is None:
            name = loaded.recipe.model.model_name_or_path
            look.not_checked.append(
                f"the base, {name} is not in the cache of this machine: names of modules, ranks, positions, tokenizer"
            )
        else:
            look.at(directory, read_config(directory))
    except ModelError as error:
        look.add(ModelError, error.problems)
    return BaseAtHand(
        directory,
        tuple(look.problems),
        look.error,
        tuple(look.advice),
        tuple(look.not_checked),
        look.has_template,
    )


class _Look:
    """What is found on the way through the files."""

    def __init__(self, loaded: LoadedRecipe) -> None:
        self._loaded, self._recipe = loaded, loaded.recipe
        self.problems: list[Problem] = []
        self.error: type[LorafitError] = ModelError
        self.advice: list[Advice] = []
        self.not_checked: list[str] = []
        self.has_template = True
        """For chats; where there is no base, nothing is known against it."""

    def add(self, error: type[LorafitError], problems: Iterator[Problem] | tuple[Problem, ...]) -> None:
        for problem in problems:
            self.error = self.error if self.problems else error
            self.problems.append(self._loaded.at_its_line(problem))

    def at(self, directory: Path, config: Mapping[str, Any]) -> None:
        """Settings first, then weights and tokenizer, each by itself: one that is broken hides no other."""
        section, where = self._recipe.model, str(directory / "config.json")
        self.add(ModelError, model_type_problems(directory, config=config, section=section))
        self.add(ModelError, task_problems(config, where=where, task=TASKS[self._recipe.task]))
        self.add(ModelError, config_problems(directory, config=config, section=section))
        quantization = self._recipe.quantization
        self.add(ModelError, quantization_problems(directory, config=config, quantization=quantization))
        known = positions({**config, **section.extra})
        exceeded = positions_exceeded(self._recipe.training, known)
        self.add(RecipeError, tuple(self._loaded.problem(one.key, one.message) for one in exceeded))
        self.advice += [*advise_on_positions(self._recipe, known), *advise_on_experts(self._recipe, config)]
        modules = self._modules(directory, config)
        for look in (lambda: self._stops(directory, config, modules), lambda: self._tokenizer(directory)):
            try:
                look()
            except ModelError as error:
                self.add(ModelError, error.problems)

    def _modules(self, directory: Path, config: Mapping[str, Any]) -> Modules | None:
        """The modules, where the headers of the weights tell them, held against the `lora` section."""
        name, kind = self._recipe.model.model_name_or_path, config["model_type"]
        shards = shard_names(directory)
        if is_on_hub(self._recipe.model) and not (shards and all((directory / shard).is_file() for shard in shards)):
            self.not_checked.append(f"the weights of {name}, they are not in the cache: names of modules, ranks")
            return None
        try:
            tensors = tensor_table(directory)
        except ModelError as error:
            self.add(ModelError, error.problems)
            return None
        self.add(ModelError, weight_problems(directory, tensors=tensors, config=config))
        modules = modules_on_disk(tensors, config=config) if "quantization_config" not in config else None
        if modules is None:
            self.not_checked.append(
                f"names of modules and ranks, the files of a {kind} do not tell them: see `lorafit targets {name}`"
            )
            return None
        self.add(AdapterError, adapter_misfits(self._recipe, modules, self._loaded.problem))
        return modules

    def _stops(self, directory: Path, config: Mapping[str, Any], modules: Modules | None) -> None:
        stops = stop_token_ids(directory, config=config)
        rows = modules.rows if modules else config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
        rows = None if self._recipe.model.add_tokens else rows
        self.add(ModelError, stop_problems(directory, stops=stops, rows=rows, data=self._recipe.data))

    def _tokenizer(self, directory: Path) -> None:
        """Whether it ends texts, and lays out a chat where the recipe leaves that to it."""
        settings = read_json(directory / SETTINGS) if (directory / SETTINGS).is_file() else {}
        if (directory / SPECIAL).is_file():
            read_json(directory / SPECIAL)
        ends = settings.get("eos_token") or (directory / SPECIAL).is_file() or self._recipe.data.stop_token
        has_files = any((directory / name).is_file() for name in TOKENIZER_FILES)  # else that is said already
        if has_files and not ends and settings.get("tokenizer_class") in NAMES_ITS_OWN_END:
            message = 'the tokenizer has no end-of-text token: write "eos_token": "..." in tokenizer_config.json'
            self.add(ModelError, (Problem(str(directory), message),))
        self._stop_token(directory / TOKENIZER)
        self._templates(directory)

    def _stop_token(self, file: Path) -> None:
        """Whether the token that the recipe names stands in the tokenizer's file, which is not parsed for that."""
        token = self._recipe.data.stop_token
        if token is None or token in self._recipe.model.add_tokens or not file.is_file():
            return
        content = file.read_bytes()
        if not any(json.dumps(token, ensure_ascii=ascii).encode() in content for ascii in (True, False)):
            message = f'"{token}" is no token of the tokenizer; name one of its tokens, or add it with model.add_tokens'
            self.add(ModelError, (Problem("data.stop_token", message),))

    def _templates(self, directory: Path) -> None:
        """What the tokenizer brings along, and whether it reads the variables of the recipe."""
        section = self._recipe.data
        if section.template in ("alpaca", "plain"):
            return
        is_file = section.template not in TEMPLATES and not section.template.startswith(NAMED_TEMPLATE)
        if is_file:
            path = Path(section.template)
            found = {DEFAULT: path.read_text(encoding="utf-8-sig", errors="replace")} if path.is_file() else {}
        else:
            named = chat_templates(directory)
            found = chosen(section.template, named) if named else {}
        self.has_template = bool(found)
        if found and (is_file or section.template_kwargs):
            self._read(found, where=section.template if is_file else "")

    def _read(self, templates: Mapping[str, str], *, where: str) -> None:
        """Whether they are Jinja, and read the variables that the recipe hands over."""
        import jinja2  # 0.05 s, for few recipes

        from lorafit.data.template_text import unread_variables

        try:
            unread = list(unread_variables(self._recipe.data.template_kwargs, templates.values()))
        except jinja2.TemplateSyntaxError as error:
            place = f"{where}:{error.lineno}" if where else "the tokenizer's chat template"
            self.add(DataError, (Problem(place, f"{error.message}; mend the template"),))
        else:
            self.add(RecipeError, tuple(Problem(f"data.template_kwargs.{name}", said) for name, said in unread))


def positions_at_hand(model: str) -> int | None:
    """Positions that a base knows, where its config.json is on this machine and says so."""
    try:
        directory = directory_at_hand(ModelSection(model_name_or_path=model))
        known = positions(read_config(directory)) if directory else None
    except ModelError:  # `validate` says what is wrong there
        return None
    return known.count if known else None
