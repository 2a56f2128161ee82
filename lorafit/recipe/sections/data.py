"""`data`: where the rows come from, how they become text, which tokens are trained."""

from typing import Annotated, Any, Literal

from pydantic import Field, Strict

from lorafit.recipe.sections.base import Frozen, Section

TrainOn = Literal["answers", "last_answer", "all"]
Format = Literal["messages", "prompt_completion", "alpaca", "sharegpt", "text"]


class Source(Section):
    """One file, directory, glob or Hub data set."""

    path: str | None = Field(default=None, min_length=1)
    """File (`.jsonl .json .csv .parquet .txt`, each also `.gz`), directory or glob (both in the order of their names),
    relative to the recipe, or a URL that fsspec reads (`https:// s3:// gs:// hf://`; credentials from the environment).
    Exactly one of `path` and `hub`. A line of a `.txt` file is a row; CSV fields stay text. Other splits in a directory
    are refused; what `save_to_disk` wrote is read."""

    hub: str | None = Field(default=None, min_length=1)
    """Hub data set id (`openai/gsm8k`), read through `datasets`."""

    name: str | None = Field(default=None, min_length=1)
    """Configuration of the Hub data set (`main`). null means its only one."""

    split: str = Field(default="train", min_length=1)
    """Split of the Hub data set."""

    revision: str = Field(default="main", min_length=1)
    """Branch, tag or commit of the Hub data set."""

    format: Format | None = None
    """Shape of a row. null means detected from the columns; a row that fits two formats is refused, never guessed.
    `messages` and `sharegpt` (`conversations`) hold a list of messages, `prompt_completion` texts or lists of messages,
    `alpaca` has `instruction`, `input` and `output`; beside these `system`, `tools`, `functions` and `history` are
    read: pairs of an earlier question and its answer, which is trained as the answers of all turns are."""

    columns: Annotated[dict[str, str], Frozen] = {}
    """Names of the file's columns for the format's own: `{prompt: question, completion: answer}`."""

    limit: int | None = Field(default=None, ge=1)
    """Read only the first so many rows. null means all."""

    weight: float = Field(default=1.0, gt=0, le=1000)
    """How often the rows of this source are seen per epoch: 2.0 twice, 0.5 a random half (by `training.seed`)."""


class DataSection(Section):
    """Training and held-out rows, and how they become tokens and labels."""

    train: Annotated[tuple[Source, ...], Strict(False)] = Field(min_length=1)
    """Sources of the training rows."""

    eval: Annotated[tuple[Source, ...], Strict(False)] = ()
    """Sources of the held-out rows. Empty means none, unless `eval_fraction` is set."""

    eval_fraction: float | None = Field(default=None, gt=0, lt=1)
    """Hold out this share of the training rows (by `training.seed`; duplicates stay on one side) instead of `eval`."""

    template: str = Field(default="chat", min_length=1)
    """How a row becomes text: `chat` (the tokenizer's chat template), `chat:NAME` (one of its several), `alpaca`,
    `plain`, or the path of a Jinja file, relative to the recipe. Rows with tools take the tokenizer's `tool_use`
    template where it has one, as transformers does. Text rows need none."""

    template_kwargs: Annotated[dict[str, Any], Frozen] = {}
    """Variables of the chat template, e.g. `{enable_thinking: false}`; one that it never reads is refused. They are
    written into the template that is saved with the adapter, so that it prompts as it was trained."""

    train_on: TrainOn = "answers"
    """Which tokens are trained: the answers of every turn, up to and with what the template writes after them (the stop
    token first), the last answer of a row alone, or every token. Messages marked `train: false` or `weight: 0` are left
    out under each. Text rows are trained whole."""

    system: Literal["keep", "merge"] = "keep"
    """Where a system text goes: `keep` gives the template a system message; `merge` puts the text before the first
    user's message, with a blank line between, for templates that know no system message (Gemma 2, Mistral 7B). Whoever
    uses the model must then do the same."""

    stop_token: str | None = Field(default=None, min_length=1)
    """Token that answers end with, for a base whose generation config does not name it: one token of the tokenizer or
    of `model.add_tokens`. It is what `eos_token` means to templates, ends text where lorafit adds an end, counts as a
    stop beside the base's own, and is saved with the adapter and merged. null: the tokenizer's own."""

    over_length: Literal["error", "drop", "truncate"] = "error"
    """What happens to rows longer than `training.max_length`: refused, left out, or cut at the end; always counted."""

    max_lost_rows: float = Field(default=0.01, ge=0, le=1)
    """Stop (exit 3) when more than this share of the rows has no trainable answer left, or cannot be rendered."""
