"""The tokenizer as it is saved with the adapter gives the prompts that were trained on, without any argument."""

from __future__ import annotations

from datetime import date
from typing import Any, cast

import jinja2
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lorafit.data.digest import DATE
from lorafit.data.prepare import PreparedData
from lorafit.data.prompts import Prompt
from lorafit.data.templates import saved_chat_template
from lorafit.errors import DiskError, Problem, VerificationError
from lorafit.recipe.sections import DataSection
from lorafit.storage.stage import scratch

SHOWN = 40
"""Characters from where two prompts part."""


def refuse_other_prompts(data: PreparedData, section: DataSection, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises VerificationError with the first prompt of each shape that the saved tokenizer renders otherwise.

    Rows without a chat template have none to hold against it: text, and the layout `plain`. Nor has a run that goes on
    with the tokens of another day, where the template writes the date.
    """
    if not data.prompts or data.parts[DATE] not in ("None", str(date.today())):
        return
    saved = _as_saved(section, tokenizer)
    problems: dict[str, Problem] = {}
    for prompt in data.prompts:
        if message := _difference(prompt, saved):
            problems.setdefault(message, Problem(f"{data.files[prompt.place[0]]}:{prompt.place[1]}", message))
    if problems:
        raise VerificationError(problems.values())


def _as_saved(section: DataSection, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer that the adapter will have, really saved and loaded again."""
    own = tokenizer.chat_template
    with scratch() as directory:
        tokenizer.chat_template = saved_chat_template(section, tokenizer)
        try:
            tokenizer.save_pretrained(directory)
        except OSError as error:
            message = f"the tokenizer cannot be saved to be checked ({error.strerror}); make room, or set TMPDIR"
            raise DiskError(message, where=str(directory)) from None
        finally:
            tokenizer.chat_template = own
        # The code of a tokenizer from the Hub is not saved with it; its class is here already.
        is_foreign = type(tokenizer).__module__.startswith("transformers_modules")
        return (type(tokenizer) if is_foreign else AutoTokenizer).from_pretrained(directory)


def _difference(prompt: Prompt, saved: PreTrainedTokenizerBase) -> str:
    """What is wrong with a prompt; nothing where its tokens are those that were trained on."""
    trained = prompt.ids
    try:
        tools: list[Any] | None = prompt.tools
        found = cast(  # token ids, asked for so
            list[int],
            saved.apply_chat_template(prompt.messages, tools=tools, add_generation_prompt=True, return_dict=False),
        )
    except (jinja2.TemplateError, ValueError, TypeError, LookupError) as error:
        said = " ".join(str(error).split())
        return f"the chat template that is saved refuses the prompt of this row ({said}); use another data.template"
    # A token that holds the end of the prompt and the beginning of the answer is trained; the audit counts such rows.
    if found == trained or (prompt.is_shared and found[: len(trained)] == trained):
        return ""
    same = next((index for index, pair in enumerate(zip(found, trained, strict=False)) if pair[0] != pair[1]), None)
    if same is None:
        same = min(len(found), len(trained))
    there, here = (str(saved.decode(ids[same:]))[:SHOWN] for ids in (found, trained))
    if not here:
        return (
            f"generation will go on with {there!r} after the prompt of this row, where the trained answer begins; name "
            "as data.template a copy of the template that does not write it under add_generation_prompt, or that has "
            "it before answers as well"
        )
    return (
        f"the chat template that is saved renders the prompt of this row with {there!r}, where it was trained on "
        f"{here!r}; use a data.template that renders it so without any argument"
    )
