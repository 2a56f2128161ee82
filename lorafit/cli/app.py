"""The application: its options, and what every command says and prints through."""

import json
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lorafit import __version__
from lorafit.cli.stderr import keep_quiet
from lorafit.errors import RecipeError
from lorafit.pulse import Counted, Counting, counting_in_lines, counting_unseen
from lorafit.report.escape_control import inert


class _Commands(TyperGroup):
    """The commands, and what to say about a word that is none of them."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Raises RecipeError with the command that was meant, or with all there are."""
        if not ctx.resilient_parsing and args[0] not in self.commands:  # a shell that completes asks about half words
            shown = [name for name, command in self.commands.items() if not command.hidden]
            meant = nearest_command(args[0], shown)
            mend = f"did you mean {meant}?" if meant else f"there are {', '.join(shown)}"
            raise RecipeError(f"no such command; {mend}", where=args[0])
        return super().resolve_command(ctx, args)


def nearest_command(word: str, commands: Sequence[str]) -> str | None:
    """The command that `word` misspells by a letter or two, shortens or lengthens, if it is that near to any."""
    from lorafit.recipe.suggest import nearest

    plain = word.lower().replace("_", "-")
    if len(plain) > 2:
        for name in commands:
            if name.startswith(plain) or plain.startswith(name) or plain in name.split("-"):
                return name
    return nearest(plain, commands, share=4)  # with a third of the letters, `export` would be `report`


app = typer.Typer(
    name="lorafit",
    cls=_Commands,
    help="One validated YAML recipe in, a LoRA or QLoRA adapter out.",
    suggest_commands=False,
    invoke_without_command=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The YAML recipe.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one key of the recipe; may be repeated."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", callback=keep_quiet, help="Print only the result and errors.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error, too.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"lorafit {__version__}")
        raise typer.Exit


@app.callback()
def lorafit(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """One validated YAML recipe in, a LoRA or QLoRA adapter out."""
    if context.invoked_subcommand is None:
        print(context.get_help(), file=sys.stderr)
        raise typer.Exit(2)


def print_result(result: dict[str, Any], *, as_json: bool, text: str, is_styled: bool = False) -> None:
    """The result on stdout: JSON for scripts, `text` for people, in which paths and names of theirs steer nothing."""
    if not as_json:
        print(text if is_styled else inert(text))
        return
    line = json.dumps(result, ensure_ascii=False, allow_nan=False)
    try:
        line.encode(sys.stdout.encoding)
    except UnicodeEncodeError:  # a terminal without UTF-8, or a file name that is none
        line = json.dumps(result, allow_nan=False)
    print(line)


def counting(*, quiet: bool) -> Counting:
    """Shows what is counted: a bar on a terminal, a line every half a minute elsewhere."""
    if quiet:
        return counting_unseen
    return _bar if sys.stderr.isatty() else counting_in_lines


def _bar(what: str, total: int) -> Counted:
    from tqdm import tqdm

    bar = tqdm(desc=what, total=total, unit_scale=True, dynamic_ncols=True, leave=False)

    def counted(more: int) -> None:
        bar.update(more)
        if bar.n >= total:
            bar.close()

    return counted


def quiet_libraries(*, debug: bool, reads_rows: bool = True) -> None:
    """Keep the libraries' own notices and bars off the terminal; `--debug` shows them.

    What they warn of and matters is checked by lorafit itself, which then says so in its own words. `reads_rows`: with
    datasets, which a command that reads none does without.
    """
    if debug:
        return
    warnings.filterwarnings("ignore", category=FutureWarning)
    for library in ("transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes", "torch.distributed"):
        logging.getLogger(library).setLevel(logging.ERROR)
    if reads_rows:
        from datasets.utils.logging import disable_progress_bar as hide_datasets_bars

        hide_datasets_bars()
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # importing it resets the level set above
