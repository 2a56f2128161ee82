"""The command line: parse, load, call, print. `app.py` holds what commands share; each other file, its commands.

The only place that imports inside functions: `lorafit --help` and `lorafit validate` must answer without torch.
"""

import io
import os
import sys
import traceback
from pathlib import Path

import typer

from lorafit.cli.app import app
from lorafit.cli.stderr import lines_on_stderr
from lorafit.errors import HealthStop, LorafitError, RecipeError, StopRequested
from lorafit.launching import launch
from lorafit.launching.signals import ends_clean
from lorafit.report.escape_control import inert
from lorafit.storage.no_room import no_room_is_said

# Each adds its commands, which `lorafit --help` lists in this order.
# isort: off
from lorafit.cli import train  # noqa: F401
from lorafit.cli import merge  # noqa: F401
from lorafit.cli import eval  # noqa: F401
from lorafit.cli import rank_sweep  # noqa: F401
from lorafit.cli import plan  # noqa: F401
from lorafit.cli import recipe  # noqa: F401
from lorafit.cli import report  # noqa: F401
from lorafit.cli import doctor  # noqa: F401
# isort: on


def _report(error: LorafitError) -> int:
    """Print every problem as one line on stderr, by one process of those that train together; the exit code."""
    agreed_on = isinstance(error, StopRequested | HealthStop)  # by all machines: the first of them says it
    if launch.is_first_to_fail() and not (agreed_on and launch.machine_rank()):
        is_of_all = isinstance(error, StopRequested) or not launch.is_worker()
        process = "" if is_of_all else f"process {launch.rank()}: "
        for problem in error.problems:
            print(inert(f"error: {process}{problem}"), file=sys.stderr)  # paths and rows may hold anything
    return error.exit_code


def _exit_code(arguments: list[str]) -> int:
    try:
        _refuse_no_directory()
        arguments = [_at_home(word) for word in arguments]
        # What a command has begun goes with it; `train` listens for itself.
        with ends_clean(), no_room_is_said(), lines_on_stderr():
            code = app(arguments, prog_name="lorafit", standalone_mode=False, obj=launch.take_variables()) or 0
        if code == 130:  # what typer makes of it
            raise KeyboardInterrupt
        return code
    except LorafitError as error:
        if "--debug" in arguments:
            traceback.print_exc()
        return _report(error)
    except typer.TyperException as error:
        known = {command.callback.__name__ for command in app.registered_commands if command.callback}
        command = "lorafit " + " ".join(word for word in arguments[:1] if word in known)
        said = error.format_message().replace(" Value error,", "")
        return _report(RecipeError(f"{said} (see `{command.strip()} --help`)"))
    except (KeyboardInterrupt, typer.Abort):
        return _report(StopRequested("stopped on request; nothing was written"))


def _refuse_no_directory() -> None:
    """Relative paths start somewhere. Raises RecipeError."""
    try:
        Path.cwd()
    except FileNotFoundError:
        message = "the current directory no longer exists; change into one that does (`cd`)"
        raise RecipeError(message) from None


def _at_home(word: str) -> str:
    """`~/x` and `--option=~/x` with the home directory in them, where no shell has done it."""
    option, equals, value = word.partition("=")
    if equals and option.startswith("--") and value.startswith("~"):
        return f"{option}={os.path.expanduser(value)}"  # noqa: PTH111
    return os.path.expanduser(word) if word.startswith("~") else word  # noqa: PTH111


def main() -> None:
    """Entry point of the `lorafit` command."""
    launch.end_with_launcher()
    launch.use_expandable_segments()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal or a pipe without UTF-8, as stderr has it
    try:
        sys.exit(_exit_code(sys.argv[1:]))
    except Exception:
        if launch.is_worker():
            from lorafit.launching.signals import ENDED_WITH_ANOTHER, has_lost_another

            # One that fails only because another did says nothing.
            if has_lost_another(within_seconds=2) or not launch.is_first_to_fail():
                sys.exit(ENDED_WITH_ANOTHER)
        raise
