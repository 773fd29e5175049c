"""Ctrl-C and SIGTERM as a request: finish what is being computed, save, and say how to go on."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


class Interrupted(Exception):
    """The user asked to stop; everything is saved."""


@dataclass(slots=True)
class Stop:
    """Whether the user has asked to stop."""

    asked: bool = False

    def leave_if_asked(self, where: str) -> None:
        """Raise Interrupted if the user has asked."""
        if self.asked:
            raise Interrupted(f"stopped {where}; continue with the same command and --resume")


@contextmanager
def stop_signals(tell: Callable[[str], None], how: str = "stopping as soon as this step is saved") -> Iterator[Stop]:
    """Turn the first Ctrl-C or SIGTERM into a request, and tell so; a second one ends the program at once."""
    stop = Stop()
    # Known before any signal can come.
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, _frame: object) -> None:
        stop.asked = True
        signal.signal(number, before[signal.Signals(number)])
        tell(f"{how}; once more stops at once, without saving it")

    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
