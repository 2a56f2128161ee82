"""The recipe that `lorafit init` writes: short, commented, ready to train."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lorafit.recipe.load import load
from lorafit.recipe.paths import looks_local, moved
from lorafit.recipe.recipe_yaml import dump, write_asked_for

Preset = Literal["lora", "qlora", "dora"]
Goal = Literal["style", "knowledge", "code"]


_FRACTION = "  eval_fraction: 0.05                 # held out; or give files: `eval: [{path: ...}]`\n"


@dataclass(frozen=True)
class _GoalSettings:
    why: str
    lora: str
    max_length: int
    packing: str


_GOALS: dict[Goal, _GoalSettings] = {
    "style": _GoalSettings(
        "a tone or a format is little to learn: a small adapter on the attention layers",
        "  r: 8\n  target_modules: all-linear\n  exclude_modules: '.*\\.mlp\\..*'      # attention only\n",
        2048,
        "false",
    ),
    "knowledge": _GoalSettings(
        "facts sit in the MLP layers, too, and need room: a large adapter on every linear layer",
        "  r: 64\n  use_rslora: true                    # steadier at high ranks\n  lora_alpha: 64\n"
        "  target_modules: all-linear\n",
        2048,
        "true",
    ),
    "code": _GoalSettings(
        "long sequences, and a good deal to learn: every linear layer",
        "  r: 32\n  target_modules: all-linear\n",
        4096,
        "true",
    ),
}

_QUANTIZATION = """\
quantization:                         # QLoRA: the frozen base in 4 bits
  load_in_4bit: true
  bnb_4bit_quant_type: nf4
  bnb_4bit_use_double_quant: true
"""


def starter_recipe(
    *,
    model: str,
    data: str,
    mapping: dict[str, Any],
    held_out: str | None = None,
    answer: str | None = None,
    positions: int | None = None,
    preset: Preset,
    goal: Goal,
    output: Path,
) -> str:
    """The text of a recipe at `output` for a model and a data set; paths start at the current directory.

    `held_out` is a file or glob of held-out rows; without it a share of `data` is held out. `mapping` holds the
    `format` and `columns` of the data set, where its columns have names of their own; `answer` the expression that
    finds the results in its answers, where they have one; `positions` is how many the model knows.
    """
    here = Path.cwd()
    source: dict[str, Any] = ({"path": data} if _is_file_like(data, here) else {"hub": data}) | mapping
    written: dict[str, Any] = {"model": {"model_name_or_path": model}, "data": {"train": [source]}}
    if held_out is not None:
        written["data"]["eval"] = [{"path": held_out} | mapping]
    told = moved(written, here, here / output.parent)
    settings = _GOALS[goal]
    shown = str(output) if str(output).isprintable() else ascii(str(output))
    dora = "  use_dora: true                      # direction and magnitude apart; about 1.5 to 2 times the time\n"
    return f"""\
# {preset} for {goal}: {settings.why}.
#
#   lorafit validate {shown}      every problem of this recipe and its data, and what it will do
#   lorafit preview {shown}       the rows as the model will see them
#   lorafit train {shown}
#
# Left out, a key has its default: `lorafit schema --output lorafit.schema.json` describes every one, and editors
# complete them where a recipe says `yaml-language-server: $schema=lorafit.schema.json` in a comment on its first line.

model:
{_indented(dump(told["model"]))}\
{_QUANTIZATION if preset == "qlora" else ""}\
lora:
{settings.lora}\
{dora if preset == "dora" else ""}\
data:
{_indented(dump(told["data"]))}\
{_FRACTION if held_out is None else ""}\
  template: {_template(model, here):<25} # chat (the tokenizer's) | alpaca | plain | a Jinja file
training:
  max_length: {_shorter(settings.max_length, positions):<23} # tokens; memory grows linearly with it
  packing: {settings.packing:<26} # true: no padding, rows are filled with whole documents
  num_train_epochs: 1
  per_device_train_batch_size: 4
  gradient_accumulation_steps: 4      # 16 sequences per step and process
  learning_rate: 2e-4                 # about ten times that of full fine-tuning
  lr_scheduler_type: cosine
  warmup_steps: 0.03                  # below 1 it is a share of all steps
{_evaluation(answer)}"""


def write_recipe(text: str, output: Path) -> None:
    """Write a new recipe and load it once. Raises RecipeError when `output` exists or cannot be written."""
    write_asked_for(output, text, option="--output", overwrite=False)
    load(output)


def _indented(text: str) -> str:
    return "".join(f"  {line}\n" for line in text.splitlines())


def _is_file_like(data: str, here: Path) -> bool:
    """Whether a data set is a file, directory or glob rather than a Hub id."""
    return looks_local(data, here) or bool(Path(data).suffix) or "*" in data or "/" not in data


def _evaluation(answer: str | None) -> str:
    """What `lorafit eval` may compare besides losses, commented out: it takes far longer."""
    if answer is None:
        return "# eval: {generate: {max_new_tokens: 256, metrics: [exact_match, rouge_l]}}   # compare answers, too\n"
    quoted = answer.replace("'", "''")
    return f"""\
# eval:                               # compare answers, too; the result of each is what `answer` finds
#   generate: {{max_new_tokens: 256, metrics: [exact_match], answer: '{quoted}'}}
"""


def _shorter(max_length: int, positions: int | None) -> int:
    return max_length if positions is None else min(max_length, positions)


def _template(model: str, here: Path) -> str:
    """`plain` for a directory whose tokenizer has no chat template, else `chat`."""
    directory = here / model
    settings = [directory / name for name in ("tokenizer_config.json", "chat_template.json", "processor_config.json")]
    if not settings[0].is_file() or (directory / "chat_template.jinja").is_file():
        return "chat"
    texts = [path.read_text(encoding="utf-8") for path in settings if path.is_file()]
    return "chat" if any('"chat_template"' in text for text in texts) else "plain"
