"""What a person sees while something takes long: a live bar or line in a terminal, a line now and then in a log."""

import time
from collections.abc import Iterable, Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

from neuromas.system.terminal import one_line, printable

LINE_EVERY_SECONDS = 10.0


class StatusLine:
    """Says on standard error what is being done: a terminal shows the last line alone, a log all."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, markup=False)
        self._line = self._console.status("")

    def __enter__(self) -> "StatusLine":
        self._line.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._line.stop()

    def tell(self, text: str) -> None:
        if self._console.is_terminal:
            self._line.update(Text(printable(text)))
        else:
            self.note(text)

    def note(self, text: str) -> None:
        """Say what stays in a terminal too."""
        self._console.print(printable(text), soft_wrap=True)


class Progress:
    """Shows steps as they end. Everything goes to standard error, so that standard output stays for results."""

    def __init__(self, num_steps: int, train_tokens: int = 0) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._total, self._tokens = train_tokens or num_steps, train_tokens > 0
        self._started = time.monotonic()
        self._first: int | None = None
        self._last_line, self._last_told = -LINE_EVERY_SECONDS, self._started
        self._bar = Bar(
            MofNCompleteColumn(), BarColumn(bar_width=10), TextColumn("{task.description}"),
            TimeRemainingColumn(compact=True), TextColumn("left"), console=self._console,
            disable=not self._console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("scoring before training", total=self._total)

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._bar.stop()

    def note(self, text: str) -> None:
        self._console.print(printable(text), markup=False)

    def tell(self, text: str) -> None:
        """Say how far something long is: beside the bar of a terminal, and in a log every ten seconds."""
        self._bar.update(self._task, description=text)
        if not self._console.is_terminal and time.monotonic() - self._last_told >= LINE_EVERY_SECONDS:
            self._last_told = time.monotonic()
            self.note(text)

    def step(self, steps: int, metrics: Mapping[str, float], sampled_tokens: int, warnings: Iterable[str] = ()) -> None:
        """Show that `steps` steps are done, in which the nodes have sampled so many tokens, and the warnings that hold."""
        # A debate has no messages.
        faults = f" faults {metrics['message_fault/frac']:.0%}" if "message_fault/frac" in metrics else ""
        text = (
            f"reward {metrics['reward/mean']:.2f} parsed {metrics['answer_parsed/frac']:.0%}{faults} "
            f"{metrics['sampled_tokens_per_second/mean']:,.0f} tok/s"
            + "".join(f"  ! {one_line(warning)}" for warning in warnings)
        )
        if "validation/accuracy/mean" in metrics:
            self.note(
                f"step {steps}: validation {metrics['validation/accuracy/mean']:.1%} "
                f"({metrics['validation/low/value']:.1%} to {metrics['validation/high/value']:.1%}, "
                f"floor {metrics['validation/floor/value']:.1%})"
            )
        done = sampled_tokens if self._tokens else steps
        self._bar.update(self._task, completed=done, description=text)
        now = time.monotonic()
        if self._first is None:
            self._first, self._started = done, now
        due = now - self._last_line >= LINE_EVERY_SECONDS or done >= self._total
        if not self._console.is_terminal and due:
            self._last_line = now
            gained = done - self._first
            left = f"  {(now - self._started) / gained * max(0, self._total - done):.0f} s left" if gained else ""
            where = f"step {steps}, token {done}/{self._total}" if self._tokens else f"step {done}/{self._total}"
            self.note(f"{where}  {text}{left}")
