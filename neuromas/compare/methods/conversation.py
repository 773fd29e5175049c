"""Untrained methods as conversations: plain functions that yield what to ask the bare backbone next, and return an answer.

A conversation is written for one example, as a generator. It yields lists of calls that may run at once, is handed their
texts in the same order, and returns the text that answers:

    def twice(example: Example, task: Task) -> Conversation:
        (first,) = yield [Call("first", example.answer_format)]
        (second,) = yield [Call("second", f"Your answer was: {first}\\nThink again.\\n{example.answer_format}")]
        return second

Conversations of all examples go through the engine together; see `converse`.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass

from neuromas.types import Example


@dataclass(frozen=True, slots=True)
class Call:
    """One text to be written. The model reads the question, then `text`; if its last line is the format, it is to answer."""

    key: str
    """Seeds the sampling, which depends on (seed, example, key) alone. Unique in a conversation."""
    text: str
    works_first: bool = False
    """Whether it asks for work before the answer. Where an output node's answer is begun for it (`Wording.begin_answer`), so is
    that of a call, and that of such a call when its work has ended."""


Conversation = Generator[list[Call], list[str], str]


@dataclass(slots=True)
class Answered:
    """An example with the text that answers it, and what that text cost."""

    example: Example
    text: str = ""
    calls: int = 0
    prompt_tokens: int = 0
    sampled_tokens: int = 0


def lines(*parts: str) -> str:
    """Join the parts of a prompt that are not empty."""
    return "\n".join(filter(None, parts))


def listing(head: str, texts: Sequence[str]) -> str:
    """Return the texts as a numbered list under a heading; an empty string where there are none."""
    return lines(head, *(f"{number}. {text.strip()}" for number, text in enumerate(texts, start=1))) if texts else ""
