"""The connection to the other machines, in the process that starts those that train here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lorafit.errors import LorafitError
from lorafit.launching import launch
from lorafit.launching.machines import Link, taken_over
from lorafit.launching.signals import end_after_lost_machine
from lorafit.storage.stage import scratch


@contextmanager
def handed_over(handed: str | None) -> Iterator[Link | None]:
    """The other machines of the run, watched from now on; how this one ends badly is told to them."""
    if handed is None:
        yield None
        return
    link = taken_over(handed)
    with scratch() as directory:
        sign = directory / "lost-machine"
        launch.name_sign_of_lost_machine(sign)
        link.watch(lambda: end_after_lost_machine(sign, lambda: link.lost, is_over=link.is_over))
        try:
            yield link
        except LorafitError as error:
            link.close(error.exit_code, said=str(error).splitlines()[0])
            raise
        finally:
            link.close(1)
