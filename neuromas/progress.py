"""What a person sees while a run trains: a live bar in a terminal, a line now and then in a log."""

import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

LINE_EVERY_SECONDS = 10.0


class Progress:
    """Shows steps as they end. Everything goes to standard error, so that standard output stays for results."""

    def __init__(self, num_steps: int) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._num_steps = num_steps
        self._started = time.monotonic()
        self._first: int | None = None
        self._last_line = -LINE_EVERY_SECONDS
        self._bar = Bar(
            MofNCompleteColumn(), BarColumn(bar_width=10), TextColumn("{task.description}"),
            TimeRemainingColumn(compact=True), TextColumn("left"), console=self._console,
            disable=not self._console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("scoring before training", total=num_steps)

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._bar.stop()

    def note(self, text: str) -> None:
        self._console.print(text, markup=False)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show step `step` (0-based) as done."""
        text = (
            f"reward {metrics['reward/mean']:.2f} parsed {metrics['answer_parsed/frac']:.0%} "
            f"faults {metrics['message_fault/frac']:.0%} {metrics['sampled_tokens_per_second/mean']:,.0f} tok/s"
        )
        if "validation/accuracy/mean" in metrics:
            self.note(
                f"step {step + 1}: validation {metrics['validation/accuracy/mean']:.1%} "
                f"({metrics['validation/low/value']:.1%} to {metrics['validation/high/value']:.1%}, "
                f"floor {metrics['validation/floor/value']:.1%})"
            )
        self._bar.update(self._task, completed=step + 1, description=text)
        now = time.monotonic()
        if self._first is None:
            self._first, self._started = step, now
        due = now - self._last_line >= LINE_EVERY_SECONDS or step + 1 == self._num_steps
        if not self._console.is_terminal and due:
            self._last_line = now
            done = step - self._first
            left = f"  {(now - self._started) / done * (self._num_steps - step - 1):.0f} s left" if done else ""
            self.note(f"step {step + 1}/{self._num_steps}  {text}{left}")
