"""How a problem of each family is worked out step by step, as text.

A trace starts from a state and goes on by numbered steps: `start (0,0);1:3 left (-3,0);2:...`. A state is text that holds all
that the next step needs beside the question, so that whoever reads it can go on.

Questions to learn from are drawn with a mark that no benchmark item and no item of the task's generator has: a number above the
task's largest, an unknown name, people out of order, a bracket of another kind. So they are disjoint from both by construction.
"""

import random
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from neuromas.types import Example


@dataclass(frozen=True, slots=True)
class Card:
    """One step from anywhere: what is given, and what follows."""

    given: str
    learned: str


class Trace(ABC):
    """One problem and how to work it out."""

    tasks: ClassVar[tuple[str, ...]]
    """Names of the tasks whose problems these are."""
    max_steps: ClassVar[int]
    """Most steps of one message."""
    share: ClassVar[float] = 1.0
    """How often its problems are drawn, against the other families."""
    question: str
    answer_format: str
    start: str
    """The state before the first step."""

    @classmethod
    @abstractmethod
    def parse(cls, question: str) -> "Trace":
        """Read an item of one of `tasks`."""

    @classmethod
    @abstractmethod
    def draw(cls, rng: random.Random) -> "Trace":
        """Draw a problem to learn from, with the mark."""

    @abstractmethod
    def finished(self, done: int, state: str) -> bool:
        """Say whether nothing is left to do after so many steps."""

    @abstractmethod
    def step(self, done: int, state: str) -> tuple[str, str]:
        """Return the next step, as it is written before its result, and the state after it.

        A step restates what it is about: naming states alone is learned badly.
        """

    @abstractmethod
    def answer(self, state: str) -> str:
        """Return the answer, given the last state."""

    @abstractmethod
    def wrong(self, rng: random.Random, state: str) -> str:
        """Return another state than the true one."""

    @abstractmethod
    def guess(self, rng: random.Random) -> str: ...

    @abstractmethod
    def sentences(self) -> list[str]:
        """Return what can be restated of the question."""

    @classmethod
    @abstractmethod
    def card(cls, rng: random.Random) -> Card: ...

    def states(self) -> list[str]:
        """Return the state before the first step and after every step."""
        states = [self.start]
        while not self.finished(len(states) - 1, states[-1]):
            states.append(self.step(len(states) - 1, states[-1])[1])
        return states

    def example(self) -> Example:
        """Return the question as nodes read it, with the answer of the trace."""
        return Example("", self.question, self.answer(self.states()[-1]), self.answer_format)
