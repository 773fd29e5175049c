"""The interface of traces: the solution of a problem in steps, as text.

A trace starts from a state and continues with numbered steps: `start (0,0);1:3 left (-3,0);2:...`. A state is text that holds
all that the next step needs besides the question, so that any reader can continue it.

Training questions are drawn with a mark that no benchmark item and no item of the task's generator has: a number above the
task's largest, an unknown name, people out of order, a bracket of another kind. So they are disjoint from both by construction.
"""

import random
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from neuromas.types import Example


@dataclass(frozen=True, slots=True)
class Card:
    """One step from a random state: the given text, and the text to learn."""

    given: str
    learned: str


class Trace(ABC):
    """One problem and its solution in steps."""

    tasks: ClassVar[tuple[str, ...]]
    """Names of the tasks with problems of this family."""
    max_steps: ClassVar[int]
    """Most steps of one message."""
    share: ClassVar[float] = 1.0
    """Weight of the family when problems are drawn."""
    question: str
    answer_format: str
    start: str
    """The state before the first step."""

    @classmethod
    @abstractmethod
    def parse(cls, question: str) -> "Trace":
        """Return the trace of a question of one of `tasks`."""

    @classmethod
    @abstractmethod
    def draw(cls, rng: random.Random) -> "Trace":
        """Draw a training problem, with the mark."""

    @abstractmethod
    def finished(self, done: int, state: str) -> bool:
        """Return whether the problem is solved after `done` steps."""

    @abstractmethod
    def step(self, done: int, state: str) -> tuple[str, str]:
        """Return the text of the next step before its result, and the state after it.

        A step restates its part of the problem: a model learns badly to name states alone.
        """

    @abstractmethod
    def answer(self, state: str) -> str:
        """Return the answer, given the last state."""

    @abstractmethod
    def wrong(self, rng: random.Random, state: str) -> str:
        """Draw a wrong state."""

    @abstractmethod
    def guess(self, rng: random.Random) -> str:
        """Draw an answer without solving the problem."""

    @abstractmethod
    def sentences(self) -> list[str]:
        """Return the sentences of the question that a message may restate."""

    @classmethod
    @abstractmethod
    def card(cls, rng: random.Random) -> Card:
        """Draw one step from a random state."""

    def states(self) -> list[str]:
        """Return the state before the first step and after every step."""
        states = [self.start]
        while not self.finished(len(states) - 1, states[-1]):
            states.append(self.step(len(states) - 1, states[-1])[1])
        return states

    def example(self) -> Example:
        """Return the example of the problem, with the answer of the trace."""
        return Example("", self.question, self.answer(self.states()[-1]), self.answer_format)
