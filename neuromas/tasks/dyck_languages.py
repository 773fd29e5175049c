"""Dyck languages, in the grammar of BIG-Bench-Hard: close the brackets that a sequence leaves open.

A complete sequence is a word of the grammar S -> ( S ) | S S | nothing, with probabilities 1/2, 1/4, 1/4, given its length, and
each pair is one of four kinds; the last one to three brackets are missing. Depths agree with the published items at all
lengths (docs/families.md). Lengths follow the published ones, so very short sequences are rarer than in the grammar.
"""

import random
from dataclasses import dataclass
from functools import cache

from neuromas.tasks.answers import bracket_form
from neuromas.tasks.task import GeneratedTask, Problem

PROMPT = "Complete the rest of the sequence, making sure that the parentheses are closed properly. Input: "
CLOSERS = {"(": ")", "[": "]", "{": "}", "<": ">"}
MAX_MISSING = 3

# Pairs of brackets in the complete sequence: (from, to), and the number of the 250 published items in that range.
PAIR_WEIGHTS = {(2, 2): 13, (3, 6): 100, (7, 11): 49, (12, 20): 39, (21, 30): 22, (31, 50): 27}

# Weight of S S relative to ( S ) in the grammar above, with empty words summed out: an empty word has probability z with
# z = 1/4 + z * z / 4, so z = 2 - sqrt(3), and S S of two other words weighs (z / 4) / (1 - z / 2) = 1 / sqrt(3) - 1 / 2.
SPLIT_WEIGHT = 3**-0.5 - 0.5

_ANSWER = bracket_form()


@dataclass(frozen=True, slots=True)
class Brackets:
    """The shown brackets, e.g. `Brackets("<[[")` with the answer `] ] >`."""

    shown: str

    @property
    def question(self) -> str:
        return PROMPT + " ".join(self.shown)

    @property
    def answer(self) -> str:
        return " ".join(reversed(_closers_due(self.shown)))

    @classmethod
    def parse(cls, question: str) -> "Brackets":
        """Return the problem of a question; ValueError if it is not of this grammar."""
        brackets = cls(question.removeprefix(PROMPT).replace(" ", ""))
        try:
            complete = not _closers_due(brackets.shown)
        except ValueError as error:
            raise ValueError(f"not a Dyck languages question: {question!r}") from error
        if complete or brackets.question != question:
            raise ValueError(f"not a Dyck languages question: {question!r}")
        return brackets


def _closers_due(brackets: str) -> list[str]:
    """Return the closing brackets still due, outermost first; ValueError for a bracket that closes nothing."""
    due: list[str] = []
    for bracket in brackets:
        if bracket in CLOSERS:
            due.append(CLOSERS[bracket])
        elif not due or due.pop() != bracket:
            raise ValueError(f"unexpected {bracket!r}")
    return due


@cache
def _weight(pairs: int) -> float:
    """Return the probability of all words of this many pairs, up to a factor that depends on the number of pairs alone."""
    if pairs == 0:
        return 1.0
    return _weight(pairs - 1) + SPLIT_WEIGHT * sum(_weight(k) * _weight(pairs - k) for k in range(1, pairs))


def draw_complete(rng: random.Random, pairs: int) -> str:
    """Draw a complete sequence of this many pairs."""
    if pairs == 0:
        return ""
    if rng.random() * _weight(pairs) < _weight(pairs - 1):
        opener = rng.choice(list(CLOSERS))
        return f"{opener}{draw_complete(rng, pairs - 1)}{CLOSERS[opener]}"
    first = rng.choices(range(1, pairs), weights=[_weight(k) * _weight(pairs - k) for k in range(1, pairs)])[0]
    return draw_complete(rng, first) + draw_complete(rng, pairs - first)


def draw_brackets(rng: random.Random, pairs: int) -> Brackets:
    """Draw a sequence of this many pairs that lacks one to three brackets, each number with the same chance."""
    missing = rng.randint(1, min(MAX_MISSING, pairs))
    while True:
        complete = draw_complete(rng, pairs)
        if all(bracket not in CLOSERS for bracket in complete[-missing:]):
            return Brackets(complete[:-missing])


def _draw_pairs(rng: random.Random) -> int:
    return rng.randint(*rng.choices(list(PAIR_WEIGHTS), weights=list(PAIR_WEIGHTS.values()))[0])


class DyckLanguages(GeneratedTask):
    """Sequences with one to three brackets to close; difficulty is the number of pairs when complete, 2 to 50 as published."""

    name = "dyck_languages"
    answer_format = 'Write "Answer: " and the missing brackets, as in "Answer: ) ]".'
    difficulties = range(3, 101)
    difficulty_unit = "pairs of brackets"

    def generate(self, rng: random.Random) -> Problem:
        brackets = draw_brackets(rng, self.difficulty or _draw_pairs(rng))
        return Problem(brackets.question, brackets.answer)

    def parse_answer(self, text: str) -> str | None:
        return _ANSWER.read(text)
