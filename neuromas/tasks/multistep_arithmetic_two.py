"""Multistep arithmetic, in the grammar of BIG-Bench-Hard: `((-1 + 2 + 9 * 5) - (-2 + -4 + -4 * -7)) =`.

Two sums in parentheses, joined by one operation. As in the published items, numbers are from -9 to 9 and operations are +, -
and *, all equally likely; those items have four numbers in each pair of parentheses.
"""

import random
import re
from dataclasses import dataclass

from neuromas.tasks.answers import number_form
from neuromas.tasks.task import GeneratedTask, Problem

LARGEST_NUMBER = 9
OPERATIONS = ("+", "-", "*")
PUBLISHED_NUMBERS = 4

ZEROS_KEPT = 0.15
"""Share of the problems with the answer 0 that are kept. 0 is the answer of 1 published item in 250, and would be that of 1
problem in 40: a better constant answer than any in the published items."""

_QUESTION = re.compile(r"\(\(([^()]+)\) ([-+*]) \(([^()]+)\)\) =")
_ANSWER = number_form()


@dataclass(frozen=True, slots=True)
class Sum:
    """The sum in one pair of parentheses, e.g. `Sum((3, -3, 6), ("*", "+"))` is 3 * -3 + 6."""

    numbers: tuple[int, ...]
    operations: tuple[str, ...]

    def __str__(self) -> str:
        rest = zip(self.operations, self.numbers[1:], strict=True)
        return " ".join([str(self.numbers[0]), *(f"{operation} {number}" for operation, number in rest)])

    @property
    def value(self) -> int:
        terms = [self.numbers[0]]
        for operation, number in zip(self.operations, self.numbers[1:], strict=True):
            if operation == "*":
                terms[-1] *= number
            else:
                terms.append(number if operation == "+" else -number)
        return sum(terms)

    @classmethod
    def parse(cls, text: str) -> "Sum":
        """Return the sum that a text spells; ValueError if it is none."""
        words = text.split(" ")
        if not all(operation in OPERATIONS for operation in words[1::2]) or len(words) % 2 == 0:
            raise ValueError(f"not a sum: {text!r}")
        return cls(tuple(int(word) for word in words[::2]), tuple(words[1::2]))


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """Two sums and the operation between them."""

    left: Sum
    operation: str
    right: Sum

    @property
    def question(self) -> str:
        return f"(({self.left}) {self.operation} ({self.right})) ="

    @property
    def answer(self) -> str:
        return str(Sum((self.left.value, self.right.value), (self.operation,)).value)

    @classmethod
    def parse(cls, question: str) -> "Arithmetic":
        """Return the problem of a question; ValueError if it is not of this grammar."""
        match = _QUESTION.fullmatch(question)
        try:
            arithmetic = cls(Sum.parse(match[1]), match[2], Sum.parse(match[3])) if match else None
        except ValueError as error:
            raise ValueError(f"not a multistep arithmetic question: {question!r}") from error
        # A number such as 07 is parsed, but written as 7.
        if arithmetic is None or arithmetic.question != question:
            raise ValueError(f"not a multistep arithmetic question: {question!r}")
        return arithmetic


def draw_sum(rng: random.Random, count: int) -> Sum:
    """Draw a sum of `count` numbers."""
    numbers = tuple(rng.randint(-LARGEST_NUMBER, LARGEST_NUMBER) for _ in range(count))
    return Sum(numbers, tuple(rng.choices(OPERATIONS, k=count - 1)))


class MultistepArithmeticTwo(GeneratedTask):
    """Sums with a whole number as answer; difficulty is the number of numbers in each pair of parentheses, 4 as published."""

    name = "multistep_arithmetic_two"
    answer_format = 'Write "Answer: " and the number, as in "Answer: -12".'
    verifier = "number"
    difficulties = range(2, 13)
    difficulty_unit = "numbers in each pair of parentheses"

    def generate(self, rng: random.Random) -> Problem:
        count = self.difficulty or PUBLISHED_NUMBERS
        while True:
            arithmetic = Arithmetic(draw_sum(rng, count), rng.choice(OPERATIONS), draw_sum(rng, count))
            if arithmetic.answer != "0" or rng.random() < ZEROS_KEPT:
                return Problem(arithmetic.question, arithmetic.answer)

    def parse_answer(self, text: str) -> str | None:
        return _ANSWER.read(text)
