"""Untrained methods as conversations: plain functions that say what to ask the bare backbone next, and end with an answer.

A conversation is written for one example, as a generator. It yields lists of calls that may run at once, is handed their
texts in the same order, and returns the text that answers:

    def twice(example: Example, task: Task) -> Conversation:
        (first,) = yield [Call("first", example.answer_format)]
        (second,) = yield [Call("second", f"Your answer was: {first}\\nThink again.\\n{example.answer_format}")]
        return second

Conversations of all examples go through the engine together; see `driver.converse`.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from neuromas.baselines.base import CellResult, CellSpec
from neuromas.types import Example


@dataclass(frozen=True, slots=True)
class Call:
    """One text to be written. The model reads the question, then `text`."""

    key: str
    """Names the draw: it depends on (seed, example, key) alone. Unique in a conversation."""
    text: str


Conversation = Generator[list[Call], list[str], str]


@dataclass(slots=True)
class Spoken:
    """An example's answering text and what it took."""

    example: Example
    text: str = ""
    calls: int = 0
    prompt_tokens: int = 0
    sampled_tokens: int = 0


@dataclass(kw_only=True)
class Untrained:
    """A method that only asks: one conversation an example, on the bare backbone."""

    name: str
    title: str
    source: str
    talk: Callable[..., Conversation]
    """Makes the conversation of (example, task, **settings)."""
    settings: dict[str, int | float] = field(default_factory=dict)
    temperature: float = 0.0
    """Of all calls of the method: an engine has one temperature at a time. 0 is greedy, as the paper evaluates."""
    trained: bool = False

    def run(self, spec: CellSpec, folder: Path) -> CellResult:
        """Answer the evaluation sets; nothing is kept in `folder`."""
        from neuromas.baselines.driver import run_untrained  # loads torch

        return run_untrained(self, spec)


def lines(*parts: str) -> str:
    """Join the parts of a prompt that are not empty."""
    return "\n".join(filter(None, parts))


def listing(head: str, texts: Sequence[str]) -> str:
    """Return numbered texts under a heading, nothing for no texts."""
    return lines(head, *(f"{number}. {text.strip()}" for number, text in enumerate(texts, start=1))) if texts else ""
